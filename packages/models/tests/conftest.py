"""Shapes and types of every annotated call are checked at run time."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

with jaxtyping.install_import_hook(("dovetail_models", "dovetail_kernels"), "beartype.beartype"):
    import dovetail_models
    import dovetail_models._public

import jax
import jax.numpy as jnp
from flax import nnx

from dovetail_kernels import DenseMixer, linear_cross_entropy
from dovetail_runtime import split_of

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(Path(__file__).parent))  # tests import model_toys from here


@pytest.fixture
def untyped() -> Iterator[None]:
    """Turn the run-time shape checks off, to see what a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The directory of the golden checkpoints."""
    return GOLDEN


@pytest.fixture(scope="session")
def small() -> dovetail_models.LlamaConfig:
    """A model whose every axis divides by 8 devices except the key-value heads."""
    return dovetail_models.LlamaConfig(
        vocab_size=48, features=16, hidden=32, layers=1, heads=8, kv_heads=2, head_dim=4, init_std=0.3
    )


@pytest.fixture(scope="session")
def build(small: Any) -> Callable[..., dovetail_models.Llama]:
    """build(**options) makes that model."""

    def make(config: Any = small, **options: Any) -> dovetail_models.Llama:
        return dovetail_models.Llama(config, rngs=nnx.Rngs(0), **options)

    return make


@pytest.fixture(scope="session")
def summed_loss() -> Callable[..., jax.Array]:
    """summed_loss(model, tokens, targets): the cross-entropy of a [batch, time] batch."""

    def loss(model: Any, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        hidden, aux, _ = model.hidden(tokens.reshape(-1), places(tokens), DenseMixer.of(tokens))
        assert not aux
        weight, bias, cap = model.unembedding()
        return linear_cross_entropy(hidden, weight, targets.reshape(-1), bias=bias, softcap=cap)

    return loss


@pytest.fixture(scope="session")
def logits() -> Callable[..., jax.Array]:
    """logits(model, tokens) of a [batch, time] batch."""

    def run(model: Any, tokens: jax.Array) -> jax.Array:
        hidden, _, _ = model.hidden(tokens.reshape(-1), places(tokens), DenseMixer.of(tokens))
        return model.unembed(hidden).reshape(*tokens.shape, -1)

    return run


def places(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape).reshape(-1)


@pytest.fixture(scope="session")
def objective() -> Callable[..., Any]:
    """objective(definition): the mean loss of a batch [batch, time] with auxiliary terms, of parameters and tokens."""

    def of(definition: Any) -> Any:
        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            model = dovetail_models.merge(definition, params)
            mixer = DenseMixer.of(tokens, ring=split_of("time"))
            hidden, aux, _ = model.hidden(tokens.reshape(-1), places(tokens), mixer)
            weight, bias, cap = model.unembedding()
            total = linear_cross_entropy(hidden, weight, tokens.reshape(-1), bias=bias, softcap=cap) / tokens.size
            return total + sum(value / of for name, (value, of) in aux.items() if name.startswith("loss/"))

        return loss

    return of


@pytest.fixture
def folder(build: Any, tmp_path: Path) -> Path:
    """The directory of an adapter of `build()`'s products."""
    from test_lora import DENSE, filled

    model = dovetail_models.add_lora(build(), DENSE, rank=2, rngs=nnx.Rngs(1))
    return dovetail_models.save_lora(filled(model), tmp_path / "adapter")
