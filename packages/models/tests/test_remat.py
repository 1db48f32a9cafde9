"""What the backward pass keeps changes memory, never numbers."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import MODELS, by_default

from dovetail_kernels import DenseMixer
from dovetail_models import (
    ACTIVATIONS,
    POLICIES,
    Llama,
    LlamaConfig,
    Olmo2,
    Olmo2Config,
    Qwen3Moe,
    Qwen3MoeConfig,
    Qwen3Next,
    Remat,
    merge,
    split,
)

CONFIG = LlamaConfig(vocab_size=24, features=8, hidden=12, layers=3, heads=4, kv_heads=2, init_std=0.5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)), jnp.int32)


def close(got: Any, expected: Any) -> None:
    """The same numbers but for rounding: 1e-5 of the largest of an array, some 80 units of float32."""

    def check(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))

    jax.tree.map(check, got, expected)


def objective(model: Any, tokens: Any = TOKENS) -> Any:
    """A function of the parameters, and the parameters."""
    definition, params = split(model)

    def loss(params: Any) -> Any:
        positions = jnp.tile(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape[0])
        hidden, aux, _ = merge(definition, params).hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        return jnp.sum(jnp.sin(hidden)) + sum(total for total, _ in aux.values())

    return loss, params


@pytest.mark.thin(2)
@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.soak), True])
@pytest.mark.parametrize("name", POLICIES)
def test_numbers_stay(name: str, scan: bool) -> None:
    """A switch for memory trains another model."""
    (plain, params), (frugal, _) = (
        objective(Llama(CONFIG, rngs=nnx.Rngs(0), scan=scan, remat=remat)) for remat in (None, name)
    )
    expected, got = (jax.jit(jax.value_and_grad(loss))(params) for loss in (plain, frugal))
    close(got, expected)


def test_layers_with_auxiliary_values() -> None:
    """The balancing loss of a layer is lost, or its gradient, when the layer is computed again."""
    config = Qwen3MoeConfig(
        vocab_size=24, features=8, hidden=12, layers=2, heads=4, init_std=0.5,
        experts=4, top_k=2, expert_hidden=6, balanced=True, balance_coef=1.0,
    )  # fmt: skip
    (plain, params), (frugal, _) = (
        objective(Qwen3Moe(config, rngs=nnx.Rngs(0), remat=remat)) for remat in (None, "full")
    )
    expected, got = (jax.jit(jax.value_and_grad(loss))(params) for loss in (plain, frugal))
    close(got, expected)


@pytest.fixture
def kept(capsys: pytest.CaptureFixture[str]) -> Callable[[Any, Any, Any], str]:
    """kept(build, config, remat): what jax says that it keeps."""

    def listed(build: Any, config: Any, remat: Any) -> str:
        jax.ad_checkpoint.print_saved_residuals(*objective(build(config, rngs=nnx.Rngs(0), remat=remat)))
        return capsys.readouterr().out

    return listed


def test_names_are_what_stays(kept: Any) -> None:
    """A name that no layer uses saves nothing; a policy would be without effect."""
    config = Olmo2Config(vocab_size=24, features=8, hidden=12, layers=3, heads=4)
    least = kept(Olmo2, config, "full")
    assert "named" not in least
    assert kept(Olmo2, config, Remat(save=("residual",))).count("named 'residual'") == 3
    for name in ACTIVATIONS[1:]:
        assert kept(Olmo2, config, Remat(save=(name,))).count("\n") == least.count("\n") + 3, name
    assert kept(Olmo2, config, "products").count("\n") > least.count("\n") + 3 * 6


# With the usual weights of these toys a delta net makes 1e-5 of the rounding of float32, with smaller ones less.
# Which activations the backward pass of each layer needs: without a norm behind it the last one is only added. Of a
# state-space layer jax says that the residual stream is an output of its norm, which hands it on.
KINDS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "latent attention": (*MODELS["deepseek_v2"], ACTIVATIONS[:-1]),
    "state space": (*MODELS["mamba2"], ("query", "key", "value", "attention")),
    "delta net": (
        Qwen3Next,
        dataclasses.replace(MODELS["qwen3_next"][1], linear=(True, True), init_std=0.1),
        ACTIVATIONS[:-1],
    ),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", KINDS)
def test_names_of_other_layers(kind: str, kept: Any) -> None:
    """The same of layers that do not attend, or to latents."""
    build, config, named = KINDS[kind]

    def names(remat: Any) -> dict[str, int]:
        found = re.findall("named '(.*)' from", kept(build, config, remat))
        return {name: found.count(name) for name in found}

    assert names("full") == {}
    for name in ACTIVATIONS:
        assert names(Remat(save=(name,))) == ({name: 2} if name in named else {})
    for policy in ("attention", "projections"):
        assert names(policy) == dict.fromkeys(set(POLICIES[policy].save) & set(named), 2)
    products = [line for line in kept(build, config, "products").splitlines() if "dot_general" in line]
    assert len(products) > 2 * 4


@pytest.mark.parametrize("kind", by_default(KINDS, ("latent attention",)))
def test_numbers_of_other_layers_stay(kind: str) -> None:
    """What is saved of a layer is another value than what it is computed again from."""
    build, config, _ = KINDS[kind]
    (plain, params), (frugal, _) = (
        objective(build(config, rngs=nnx.Rngs(0), remat=remat)) for remat in (None, "projections")
    )
    expected, got = (jax.jit(jax.value_and_grad(loss))(params) for loss in (plain, frugal))
    close(got, expected)


def test_memory() -> None:
    """Policies that keep less need less memory, the loop over layers included."""

    def temporary(remat: Any) -> int:
        config = dataclasses.replace(CONFIG, features=32, hidden=128, layers=6)
        tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        definition, params = split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), scan=True, remat=remat)))

        def run(params: Any, tokens: Any) -> Any:
            return jax.grad(objective(merge(definition, params), tokens)[0])(params)

        return jax.jit(run).lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    everything, products, attention, least = (temporary(x) for x in (None, "products", "attention", "full"))
    assert least < attention < products < everything


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Llama(CONFIG, rngs=nnx.Rngs(0), remat="ful"), "remat='ful'; expected None, a Remat, or .*'full'"),
        (lambda: Remat(save=("keys",)), r"save=\('keys',\); expected a tuple of names"),
        (lambda: Remat(save="key"), "save='key'; expected a tuple"),
        (lambda: Remat(save=("key",), offload=("key",)), r"save and offload share \['key'\]"),
        (lambda: Remat(products=True, offload=("residual",)), "products=True with offload"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    """A misspelled policy is not taken for none."""
    with pytest.raises(ValueError, match=message):
        make()
