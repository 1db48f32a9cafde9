"""Mixture of experts against a loop over tokens in float64, on meshes, and its balancing loss in closed form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_kernels import DenseMixer
from dovetail_models import (
    Experts,
    Mixtral,
    MixtralConfig,
    Router,
    Selection,
    SparseMLP,
    merge,
    placements,
    split,
)
from dovetail_runtime import FSDP_TENSOR, batch_sharding, mesh, use

WEIGHTS = {"init": nnx.initializers.normal(0.5), "dtype": jnp.float32}
CONFIG = MixtralConfig(
    vocab_size=48, features=16, hidden=32, layers=1, heads=8, kv_heads=8, experts=4, init_std=0.3, balanced=True
)


def sparse(select: Selection, *, bias: bool = False) -> SparseMLP:
    rngs = nnx.Rngs(0)
    router = Router(6, select, rngs=rngs, **WEIGHTS)
    experts = Experts(6, 5, select.experts, bias=bias, out_init=WEIGHTS["init"], rngs=rngs, **WEIGHTS)
    return SparseMLP(router, experts)


@jax.jit
def run(model: SparseMLP, x: jax.Array, mixer: DenseMixer) -> Any:
    y, aux, _ = model(0, x, mixer)
    return y, aux


def by_hand(model: SparseMLP, x: np.ndarray) -> np.ndarray:
    """One token and one expert at a time."""
    select, experts = model.router.select, model.experts
    values = {name: np.asarray(getattr(experts, name).get_value(), np.float64) for name in ("gate", "up", "down")}
    biases = {
        name: np.asarray(getattr(experts, f"{name}_bias").get_value(), np.float64) if experts.bias else 0 * w[:, 0]
        for name, w in values.items()
    }
    out = np.zeros_like(x, np.float64)
    for t, token in enumerate(np.asarray(x, np.float64)):
        logits = token @ np.asarray(model.router.weight.get_value(), np.float64)
        scores = np.exp(logits) / np.exp(logits).sum()
        chosen = np.argsort(-scores)[: select.top_k]
        weights = scores[chosen] / (scores[chosen].sum() if select.renormalize else 1) * select.scale
        for e, weight in zip(chosen, weights, strict=True):
            gate, up = (token @ values[name][e] + biases[name][e] for name in ("gate", "up"))
            out[t] += weight * ((gate / (1 + np.exp(-gate)) * up) @ values["down"][e] + biases["down"][e])
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("select", [Selection(experts=5, top_k=2), Selection(experts=3, top_k=3, scale=2.5)], ids=str)
def test_every_token_reaches_its_experts(select: Selection, bias: bool) -> None:
    """A row that is sorted to another expert's, or gets another's bias, is another token's answer."""
    model = sparse(select, bias=bias)
    if bias:
        for name in ("gate_bias", "up_bias", "down_bias"):
            variable = getattr(model.experts, name)
            variable.set_value(jax.random.normal(jax.random.key(len(name)), variable.get_value().shape))
    x = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float32)
    got, aux = run(model, jnp.asarray(x), DenseMixer.of(jnp.zeros((1, 11), jnp.int32)))
    assert not aux
    np.testing.assert_allclose(got, by_hand(model, x), atol=1e-5)


def test_the_shared_mlp_sees_every_token() -> None:
    """Shared experts are added to the chosen ones, not weighted."""
    model = sparse(Selection(experts=4, top_k=1))
    with_shared = SparseMLP(model.router, model.experts, lambda x: 3 * x)
    x = jnp.ones((4, 6)) * jnp.arange(4, dtype=jnp.float32)[:, None]
    mixer = DenseMixer.of(jnp.zeros((1, 4), jnp.int32))
    np.testing.assert_allclose(with_shared(0, x, mixer)[0], model(0, x, mixer)[0] + 3 * x, atol=1e-6)


def test_balancing_loss_is_that_of_each_sequence() -> None:
    """Counts of a whole batch, of padding, or of packed documents together would make it depend on the batch."""
    model = sparse(Selection(experts=4, top_k=2, balance=0.5))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 6)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0], [4, 4, 4, 4, 4, 4, 4, 4]], jnp.int32)
    _, aux = run(model, x, DenseMixer.of(segments, segments))
    routing = model.router.choose(model.router.logits(x))
    total = 0.0
    for places in (slice(0, 5), slice(5, 7), slice(8, 16)):
        length = places.stop - places.start
        counts = np.bincount(np.asarray(routing.experts[places]).reshape(-1), minlength=4)
        total += length * 4 * (counts / (2 * length) * np.asarray(routing.scores[places], np.float64).mean(0)).sum()
    got, weight = aux["loss/balance"]
    np.testing.assert_allclose(got, 0.5 * total, rtol=1e-5)
    assert float(weight) == 15


def test_alike_used_experts_have_a_loss_of_the_coefficient() -> None:
    """The scale of the loss is what its coefficient is tuned for; theirs counts every choice of a token."""
    model = sparse(dataclasses.replace(CONFIG.select, experts=2, top_k=2))
    model.router.weight.set_value(jnp.zeros((6, 2)))
    _, aux = run(model, jnp.ones((5, 6)), DenseMixer.of(jnp.zeros((1, 5), jnp.int32)))
    got, weight = aux["loss/balance"]
    np.testing.assert_allclose(got / weight, 2 * 0.001, rtol=1e-6)


def test_a_mesh_agrees_with_one_device() -> None:
    """Tokens of other devices go to the wrong experts, or their gradients are lost."""
    model = Mixtral(CONFIG, rngs=nnx.Rngs(0))
    definition, params = split(model)
    tokens = np.random.default_rng(0).integers(0, 48, (8, 4)).astype(np.int32)

    @jax.jit
    @jax.value_and_grad
    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        model, positions = merge(definition, params), jnp.tile(jnp.arange(4, dtype=jnp.int32), 8)
        hidden, aux, _ = model.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        balance, weight = aux["loss/balance"]
        return jnp.sum(jnp.sin(model.unembed(hidden))) / 100 + balance / weight

    expected = loss(params, tokens)
    grid = mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, placements(model, grid, FSDP_TENSOR))
    with use(grid, FSDP_TENSOR):
        got = loss(placed, jax.device_put(tokens, batch_sharding(grid, FSDP_TENSOR)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)
