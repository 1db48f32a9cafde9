"""Attention over a sequence on several devices against one device with all of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dovetail_kernels import (
    Mask,
    attention,
    causal,
    dense,
    lengths,
    prefix,
    ring_attention,
    segments,
    ulysses_attention,
    window,
)

DEVICES, TIME, HEADS, KV_HEADS = 4, 48, 8, 4
MESH = jax.make_mesh((DEVICES,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
ROWS, ALL = PartitionSpec(None, "sequence"), PartitionSpec()


def operands() -> list[jax.Array]:
    """Query, key, value, a cotangent, and packed segments."""
    rng = np.random.default_rng(0)
    shapes = ((2, TIME, HEADS, 4), (2, TIME, KV_HEADS, 4), (2, TIME, KV_HEADS, 6), (2, TIME, HEADS, 6))
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    return [*arrays, jnp.asarray(np.sort(rng.integers(0, 5, (2, TIME)), axis=1), jnp.int32)]


def mask_of(name: str, ids: jax.Array) -> Mask | None:
    return {
        "everything": None,
        "causal": causal(),
        "window": causal() & window(9),
        "packed": causal() & segments(ids),
        "prefix": (causal() | prefix(jnp.array([3, 30], jnp.int32))) & window(25, 50),
    }[name]


@pytest.mark.thin(2)
@pytest.mark.parametrize("mask", ["everything", "causal", "window", "packed", "prefix"])
@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_is_attention_of_the_whole(function: Any, mask: str) -> None:
    """A long sequence trains on several devices with the values and gradients of one."""
    *arrays, cotangent, ids = operands()
    sinks = jnp.linspace(-1.0, 1.0, HEADS) if mask in ("causal", "packed") else None

    def whole(q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
        return attention(q, k, v, mask_of(mask, ids), sinks=sinks, softcap=4.0, implementation="reference")

    def parts(q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
        def local(q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, ids: jax.Array) -> jax.Array:
            return function(q, k, v, mask_of(mask, ids), axis="sequence", sinks=sinks, softcap=4.0)

        specs = (ROWS, ROWS, ROWS, ALL, ROWS)
        return jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=ROWS)(q, k, v, sinks, ids)

    def pulled(function: Any, *given: Any) -> list[jax.Array]:
        out, pull = jax.vjp(function, *given)
        return [out, *pull(cotangent)]

    results = [jax.jit(lambda *x, f=f: pulled(f, *x))(*arrays, sinks) for f in (parts, whole)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_ring_keeps_the_memory_of_a_part() -> None:
    """The backward pass must not keep the keys of all devices: that is what a ring is for."""

    def temp(devices: int) -> int:
        mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
        shape = jax.ShapeDtypeStruct((1, 256 * devices, 2, 32), jnp.float32)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            local = jax.shard_map(
                lambda *x: ring_attention(*x, causal(), axis="sequence"),
                mesh=mesh,
                in_specs=(ROWS,) * 3,
                out_specs=ROWS,
            )
            return jnp.sum(local(q, k, v) ** 2)

        analysis = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert temp(8) < 1.3 * temp(2)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_masks_that_count_columns_are_refused(function: Any) -> None:
    """The columns of one device are not those of the sequence."""
    q = jnp.ones((1, 8, 4, 4))
    for mask in (dense(jnp.ones((8, 8), bool)), causal() & lengths(key=jnp.array([3]))):
        with pytest.raises(ValueError, match="counts rows and columns of one device"):
            function(q, q, q, mask, axis="sequence")


@pytest.mark.usefixtures("untyped")
def test_heads_that_cannot_be_shared() -> None:
    """Ulysses gives every device whole heads."""
    x = jnp.ones((1, 8, 4, 4))
    for q, kv, message in ((x[:, :, :3], x, "3 heads over 4 devices"), (x, x[:, :, :2], "2 kv_heads over 4 devices")):
        call = jax.shard_map(
            lambda q, kv: ulysses_attention(q, kv, kv, axis="sequence"),
            mesh=MESH,
            in_specs=(ROWS, ROWS),
            out_specs=ROWS,
        )
        with pytest.raises(ValueError, match=message):
            call(q, kv)
