"""Experts on four devices against a loop over all of them on one: results, gradients, rounds, memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dovetail_kernels import Routing, expert_parallel, ragged_dot, route

DEVICES, TOKENS, EXPERTS, TOP, FEATURES, HIDDEN = 4, 32, 8, 3, 6, 5
MESH = jax.make_mesh((DEVICES,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
SPLIT = PartitionSpec("expert")


def transform(params: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
    up, down = params
    return ragged_dot(jnp.tanh(ragged_dot(rows, up, sizes)), down, sizes)


def operands(dtype: Any = jnp.float32) -> tuple[Any, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = (EXPERTS, FEATURES, HIDDEN), (EXPERTS, HIDDEN, FEATURES), (TOKENS, FEATURES), (TOKENS, EXPERTS)
    up, down, x, logits = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return (up, down), x, logits


def loop(params: Any, x: jax.Array, routing: Routing) -> jax.Array:
    """Every token through every expert, those that it did not choose weighted with 0."""
    chosen = jax.nn.one_hot(routing.experts, params[0].shape[0], dtype=x.dtype)
    weights = jnp.sum(chosen * routing.weights[:, :, None].astype(x.dtype), axis=1)
    every = jnp.einsum("teh,ehf->tef", jnp.tanh(jnp.einsum("td,edh->teh", x, params[0])), params[1])
    return jnp.einsum("te,tef->tf", weights, every)


def spread(params: Any, x: jax.Array, routing: Routing, **options: Any) -> jax.Array:
    def local(params: Any, x: jax.Array, routing: Routing) -> jax.Array:
        return expert_parallel(transform, params, x, routing, axis="expert", **options)

    return jax.shard_map(local, mesh=MESH, in_specs=(SPLIT,) * 3, out_specs=SPLIT)(params, x, routing)


CHOICES = {
    "free": lambda chosen: chosen,
    "overloaded": lambda chosen: jnp.broadcast_to(jnp.arange(TOP, dtype=jnp.int32), chosen.shape),
    "one empty device": lambda chosen: chosen % 6,
    "none": lambda chosen: jnp.where(jnp.arange(TOKENS)[:, None] % 3 == 0, EXPERTS, chosen),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
@pytest.mark.parametrize("slack", [0.3, 1.25])
@pytest.mark.parametrize("choice", CHOICES)
def test_devices_agree_with_a_loop_over_experts(choice: str, slack: float, exchange: Any) -> None:
    """Rows that come back to other tokens, or in a round that is lost, are other tokens' answers."""
    params, x, logits = operands()
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)

    def run(function: Any) -> Any:
        def call(params: Any, x: jax.Array, logits: jax.Array) -> jax.Array:
            routing = route(logits, TOP)
            return function(params, x, routing._replace(experts=CHOICES[choice](routing.experts)))

        out, pull = jax.vjp(call, params, x, logits)
        return out, pull(cotangent)

    got = jax.jit(run, static_argnums=0)(functools.partial(spread, slack=slack, exchange=exchange))
    expected = jax.jit(run, static_argnums=0)(loop)
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_short_floats_add_up_in_long_ones(exchange: Any) -> None:
    """The sums over rounds and devices keep what 16 bits would lose."""
    params, x, logits = operands(jnp.bfloat16)
    routing = route(logits, TOP)
    got = jax.jit(functools.partial(spread, exchange=exchange, slack=0.3))(params, x, routing)
    assert got.dtype == jnp.bfloat16
    wide = loop(*jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x)), routing)
    np.testing.assert_allclose(got.astype(jnp.float32), wide, atol=0.03 * float(jnp.abs(wide).max()))


def test_parameters_that_are_no_floats_have_no_gradient() -> None:
    """Quantized experts are fixed; what is learned beside them still is."""
    params, x, logits = operands()
    whole = jnp.round(8 * params[0]).astype(jnp.int8)

    def call(scale: jax.Array, exchange: Any) -> jax.Array:
        def function(params: Any, rows: jax.Array, sizes: jax.Array) -> jax.Array:
            return transform((params["up"].astype(jnp.float32) * params["scale"], params["down"]), rows, sizes)

        def local(params: Any, x: jax.Array, routing: Routing) -> jax.Array:
            return expert_parallel(function, params, x, routing, axis="expert", exchange=exchange)

        given = {"up": whole, "scale": scale, "down": params[1]}
        run = jax.shard_map(local, mesh=MESH, in_specs=(SPLIT,) * 3, out_specs=SPLIT)
        return jnp.sum(jnp.sin(run(given, x, route(logits, TOP))))

    def expected(scale: jax.Array) -> jax.Array:
        up = whole.astype(jnp.float32) * scale
        return jnp.sum(jnp.sin(loop((up, params[1]), x, route(logits, TOP))))

    scale = jnp.linspace(0.05, 0.2, EXPERTS)[:, None, None]
    for exchange in ("all_to_all", "ring"):
        got = jax.jit(jax.grad(functools.partial(call, exchange=exchange)))(scale)
        np.testing.assert_allclose(got, jax.grad(expected)(scale), atol=1e-4)


@pytest.mark.parametrize("exchange", ["all_to_all", "ring"])
def test_memory_is_that_of_a_part(exchange: Any) -> None:
    """Buffers for what all devices may send would grow with their number."""

    def temp(devices: int) -> int:
        mesh = jax.make_mesh((devices,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))

        def local(params: Any, x: jax.Array, logits: jax.Array) -> jax.Array:
            return expert_parallel(transform, params, x, route(logits, 2), axis="expert", exchange=exchange)

        def loss(params: Any, x: jax.Array, logits: jax.Array) -> jax.Array:
            run = jax.shard_map(local, mesh=mesh, in_specs=(SPLIT,) * 3, out_specs=SPLIT)
            return jnp.sum(run(params, x, logits) ** 2)

        shapes = ((8, 32, 64), (8, 64, 32)), (512 * devices, 32), (512 * devices, 8)
        given = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=_is_shape)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(8) < 1.3 * temp(2)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


@pytest.mark.usefixtures("untyped")
def test_what_does_not_fit_is_refused() -> None:
    """Each message says what was given and what was expected."""
    params, x, logits = operands()
    with pytest.raises(ValueError, match="6 experts over 4 devices"):
        spread(params, x, route(logits[:, :6], TOP))
    with pytest.raises(ValueError, match="exchange='tree'"):
        spread(params, x, route(logits, TOP), exchange="tree")
    with pytest.raises(ValueError, match="slack=0"):
        spread(params, x, route(logits, TOP), slack=0.0)
