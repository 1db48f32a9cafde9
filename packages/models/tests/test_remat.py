"""What the backward pass keeps changes memory, never numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
    Remat,
    merge,
    split,
)

CONFIG = LlamaConfig(vocab_size=24, features=8, hidden=12, layers=3, heads=4, kv_heads=2, init_std=0.5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 9)), jnp.int32)


def objective(model: Any, tokens: Any = TOKENS) -> Any:
    """A function of the parameters, and the parameters."""
    definition, params = split(model)

    def loss(params: Any) -> Any:
        positions = jnp.tile(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape[0])
        hidden, aux, _ = merge(definition, params).hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        return jnp.sum(jnp.sin(hidden)) + sum(total for total, _ in aux.values())

    return loss, params


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_numbers_stay(name: str, scan: bool) -> None:
    """A switch for memory trains another model."""
    (plain, params), (frugal, _) = (
        objective(Llama(CONFIG, rngs=nnx.Rngs(0), scan=scan, remat=remat)) for remat in (None, name)
    )
    expected, got = (jax.jit(jax.value_and_grad(loss))(params) for loss in (plain, frugal))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


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
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def kept(remat: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What jax says that it keeps."""
    config = Olmo2Config(vocab_size=24, features=8, hidden=12, layers=3, heads=4)
    loss, params = objective(Olmo2(config, rngs=nnx.Rngs(0), remat=remat))
    jax.ad_checkpoint.print_saved_residuals(loss, params)
    return capsys.readouterr().out


def test_names_are_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that no layer uses saves nothing; a policy would be without effect."""
    least = kept("full", capsys)
    assert "named" not in least
    assert kept(Remat(save=("residual",)), capsys).count("named 'residual'") == 3
    for name in ACTIVATIONS[1:]:
        assert kept(Remat(save=(name,)), capsys).count("\n") == least.count("\n") + 3, name
    assert kept("products", capsys).count("\n") > least.count("\n") + 3 * 6


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
