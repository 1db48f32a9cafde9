"""What all recurrent operations promise: sequences may be split and packed, padded and transformed."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import causal_conv1d, configured, gated_delta_rule, ssd

BATCH, TIME = 8, 23


class Kind(NamedTuple):
    """An operation as a function of its tokens' operands ``[batch, time, ...]``."""

    call: Callable[..., tuple[jax.Array, jax.Array]]
    shapes: tuple[tuple[int, ...], ...]


def _ssd(x: Any, dt: Any, b: Any, c: Any, **options: Any) -> Any:
    rates = jnp.array([-1.0, -0.1], x.dtype)
    return ssd(x, jax.nn.softplus(dt), rates, b, c, implementation=configured("blocked", chunk=8), **options)


def _delta(q: Any, k: Any, v: Any, g: Any, beta: Any, **options: Any) -> Any:
    k = k / jnp.linalg.norm(k + 1e-6, axis=-1, keepdims=True)
    how = configured("blocked", chunk=8)
    return gated_delta_rule(q, k, v, -jax.nn.softplus(g), jax.nn.sigmoid(beta), implementation=how, **options)


def _conv(x: Any, **options: Any) -> Any:
    return causal_conv1d(x, jnp.arange(12.0, dtype=x.dtype).reshape(3, 4), activation="silu", **options)


KINDS = {
    "ssd": Kind(_ssd, ((2, 3), (2,), (1, 4), (1, 4))),
    "delta rule": Kind(_delta, ((1, 4), (1, 4), (2, 3), (2,), (2,))),
    "conv": Kind(_conv, ((3,),)),
}
each = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def operands(kind: Kind, batch: int = BATCH, time: int = TIME) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, time, *shape)), jnp.float32) for shape in kind.shapes]


def close(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.thin(2)
@each
def test_a_sequence_may_be_split_anywhere(kind: Kind) -> None:
    """Chunked prefill gives the numbers of one pass, wherever the cut lies, even before or after everything."""
    given = operands(kind, batch=2)
    whole, after = jax.jit(kind.call)(*given)
    first, second = jax.jit(kind.call), jax.jit(lambda state, *parts: kind.call(*parts, state=state))
    for cut in (0, 8, 13, 23):
        head, state = first(*(x[:, :cut] for x in given))
        tail, state = second(state, *(x[:, cut:] for x in given))
        close((jnp.concatenate([head, tail], axis=1), state), (whole, after))


@pytest.mark.thin(2)
@each
def test_packed_segments_are_sequences_of_their_own(kind: Kind) -> None:
    """Documents in one row neither see nor change each other; padding is 0 and leaves the state alone, NaN or not."""
    given = operands(kind, batch=1)
    ids = np.array([[0, 0, *[7] * 5, 0, *[7] * 3, *[2] * 9, 0, 5, 5]])
    dirty = [jnp.where((ids == 0).reshape(1, TIME, *(1,) * (x.ndim - 2)), jnp.nan, x) for x in given]
    out, after = jax.jit(lambda *x: kind.call(*x, segment_ids=jnp.asarray(ids)))(*dirty)
    assert not np.asarray(out)[ids == 0].any()
    for segment in (7, 2, 5):
        alone, state = jax.jit(kind.call)(*(x[:, ids[0] == segment] for x in given))
        close(out[:, ids[0] == segment], alone)
    close(after, state)
    gradient = jax.grad(lambda *x: jnp.sum(kind.call(*x, segment_ids=jnp.asarray(ids))[0]), tuple(range(len(given))))
    for part in jax.jit(gradient)(*given):
        assert np.isfinite(part).all()
        assert not np.asarray(part)[ids == 0].any()


@each
def test_only_padding_changes_nothing(kind: Kind) -> None:
    """An idle row of a batch keeps its state bit for bit."""
    given = operands(kind, batch=2, time=5)
    idle = jax.jit(lambda state, *x: kind.call(*x, state=state, segment_ids=jnp.zeros((2, 5), jnp.int32)))
    _, state = jax.jit(kind.call)(*given)
    out, after = idle(state, *given)
    assert not np.asarray(out).any()
    np.testing.assert_array_equal(after, state)


@each
def test_empty_axes(kind: Kind) -> None:
    """No rows or no tokens is a clean result, not a crash in a loop over nothing."""
    for batch, time in ((0, 4), (2, 0), (0, 0)):
        given = operands(kind, batch, time)
        out, state = kind.call(*given, segment_ids=jnp.ones((batch, time), jnp.int32))
        assert out.shape[:2] == (batch, time)
        assert not np.asarray(state).any()
        _, again = kind.call(*given, state=state + 1)
        np.testing.assert_array_equal(again, state + 1)


def objective(kind: Kind, ids: jax.Array, *given: jax.Array) -> jax.Array:
    out, state = kind.call(*given, segment_ids=ids)
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state.astype(out.dtype)))


@pytest.mark.thin(2)
@each
def test_composes_with_transforms_and_shardings(kind: Kind) -> None:
    """vmap, checkpoint, the partitioner and shard_map give the gradients of a plain call."""
    given = operands(kind)
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (BATCH, TIME)), axis=1), jnp.int32)
    own = functools.partial(objective, kind)
    places = tuple(range(1, len(given) + 1))
    gradient = jax.grad(own, places)
    plain = jax.jit(gradient)(ids, *given)
    close(jax.jit(jax.grad(jax.checkpoint(own), places))(ids, *given), plain)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in (ids, *given)]
    close([x.reshape(BATCH, *x.shape[2:]) for x in jax.jit(jax.vmap(gradient))(*split)], plain)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in (ids, *given)]
    close(jax.jit(gradient)(*placed), plain)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows)
    close(jax.jit(mapped)(*placed), plain)


@each
def test_strict_promotion(kind: Kind) -> None:
    """16-bit activations with float32 states run where implicit promotion is an error."""
    given = [x.astype(jnp.bfloat16) for x in operands(kind, batch=1, time=9)]
    with jax.numpy_dtype_promotion("strict"):
        out, state = kind.call(*given)
        again, _ = kind.call(*given, state=state, segment_ids=jnp.ones((1, 9), jnp.int32))
    assert out.dtype == again.dtype == jnp.bfloat16
