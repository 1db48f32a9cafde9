"""Grouped matrix products by one schedule, in two parts.

The first `rows` rows of every group form one batched product, ``[groups, rows, k] x [groups, k, n]``: with a little
more than the mean number of rows per group most rows are in it, no weight is copied and little is padded. What groups
have beyond that is walked in blocks of rows, by a loop over the blocks that exist. The rows of a group may come in
several segments, which is how a batch is folded into rows: the loop never becomes a masked one under ``vmap``.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.operation import Call
from dovetail_protocols import QuantizedArray

__all__ = ["configs", "ragged_dot", "ranges"]

SLACK = 1.25
BLOCK = 64
ALIGN = 8
CHUNK = 8


class How(NamedTuple):
    """The static part of a call.

    Attributes:
        slack: rows of a group in the batched product, relative to the mean; 0 walks blocks only.
        block: rows per step of the loop.
        precision: of the products.
        dtype: of the result.
        transposed: contract with the last axis of the weights.
    """

    slack: float
    block: int
    precision: Any
    dtype: Any
    transposed: bool = False


class Segments(NamedTuple):
    """Which rows belong to which group; a group has as many ranges of rows as there are segments."""

    begins: jax.Array
    """``[segments, groups]``"""
    sizes: jax.Array
    """``[segments, groups]``"""


def configs(call: Call) -> Iterator[dict[str, Any]]:
    """Return configurations worth trying."""
    del call
    for slack in (0.0, 1.0, 1.25, 1.5, 2.0):
        yield from ({"slack": slack, "block": block} for block in (16, 32, 64, 128))


def ragged_dot(
    *,
    lhs: jax.Array,
    rhs: Any,
    group_sizes: jax.Array,
    precision: Any,
    preferred_element_type: Any,
    slack: float | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """See `dovetail_kernels.ragged_dot`; shapes are checked there.

    A configuration is the number of rows of a group that are computed as one batch, relative to the mean, and the
    number of rows per step of the loop over the rest.
    """
    rows, groups = lhs.shape[0], rhs.shape[0]
    if slack is None:
        slack = SLACK if rows >= groups else 0.0
    how = How(slack, block, precision, preferred_element_type)
    leaves, tree = jax.tree.flatten((lhs, _per_group(rhs), group_sizes))
    lhs, rhs, group_sizes = jax.tree.unflatten(tree, alike(*leaves))
    begins, ends = ranges(group_sizes, rows)
    return _dot(how, lhs, rhs, Segments(begins[None], (ends - begins)[None]))


def ranges(sizes: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Return where each group begins and ends; the running sum stops at the last row, so that it cannot wrap."""
    ends = jax.lax.associative_scan(lambda a, b: a + jnp.minimum(b, rows - a), jnp.clip(sizes, 0, rows))
    return jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]]), ends


def _per_group(rhs: Any) -> Any:
    """Give every group scales of its own, so that a group of quantized weights is a slice."""
    if not isinstance(rhs, QuantizedArray):
        return rhs
    groups = rhs.shape[0]

    def spread(part: Any) -> Any:
        return None if part is None else jnp.repeat(part, groups // part.shape[0], axis=0, total_repeat_length=groups)

    rhs = QuantizedArray(rhs.qvalue, spread(rhs.scale), spread(rhs.zero_point), rhs.dtype)
    return jax.lax.stop_gradient(rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(how: How, lhs: jax.Array, rhs: Any, segments: Segments) -> jax.Array:
    return _folding(_product, how, lhs, rhs, segments)


def _forward_rule(how: How, lhs: jax.Array, rhs: Any, segments: Segments) -> tuple[Any, Any]:
    return _dot(how, lhs, rhs, segments), (lhs, rhs, segments)


def _backward_rule(how: How, saved: Any, d_out: jax.Array) -> tuple[Any, Any, None]:
    lhs, rhs, segments = saved
    d_lhs = _folding(_product, how._replace(dtype=lhs.dtype, transposed=True), d_out, rhs, segments)
    if isinstance(rhs, QuantizedArray):
        return d_lhs, None, None
    return d_lhs, _folding(_outer, how._replace(dtype=rhs.dtype), lhs, d_out, segments), None


_dot.defvjp(_forward_rule, _backward_rule)


def _folding(function: Callable[..., jax.Array], how: How, *operands: Any) -> jax.Array:
    """Call ``function(how, rows, other, segments)``, under ``vmap`` with the batch folded into rows.

    Rows ``[batch, rows, ...]`` follow each other. Weights with a batch axis become further groups; without one, the
    groups get further segments. The outer product has rows on both sides and a result per group.
    """

    @custom_vmap
    def call(rows: jax.Array, other: Any, segments: Segments) -> jax.Array:
        return function(how, rows, other, segments)

    @call.def_vmap
    def fold(size: int, batched: Any, rows: jax.Array, other: Any, segments: Segments) -> tuple[jax.Array, bool]:
        rows, segments = _batched(size, (rows, segments), (batched[0], batched[2]))
        apart = function is _outer or any(jax.tree.leaves(batched[1]))
        if apart:
            other = jax.tree.map(_merged, _batched(size, other, batched[1]))
        offsets = rows.shape[1] * jnp.arange(size, dtype=jnp.int32)
        begins = segments.begins + offsets[:, None, None]
        moved = Segments(*(_fold_segments(x, apart) for x in (begins, segments.sizes)))
        out = _folding(function, how, _merged(rows), other, moved)
        return out.reshape(size, -1, *out.shape[1:]), True

    return call(*operands)


def _batched(size: int, tree: Any, batched: Any) -> Any:
    """Give every leaf a batch axis."""

    def broadcast(x: jax.Array, has: bool) -> jax.Array:
        return x if has else jnp.broadcast_to(x, (size, *x.shape))

    return jax.tree.map(broadcast, tree, batched)


def _merged(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _fold_segments(x: jax.Array, apart: bool) -> jax.Array:
    """``[batch, segments, groups]`` to ``[segments, batch * groups]``, or ``[batch * segments, groups]``."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1) if apart else _merged(x)


class Schedule:
    """Which rows are computed when."""

    def __init__(self, how: How, total: int, segments: Segments) -> None:
        self.count, self.groups = segments.sizes.shape
        self.total, self.block = total, min(how.block, total)
        mean = how.slack * total / (self.count * self.groups)
        self.rows = min(total, -(-int(mean + 0.5) // ALIGN) * ALIGN)
        self.begins, self.sizes = (x.reshape(-1) for x in segments)
        self.blocks = jnp.cumsum((jnp.maximum(self.sizes - self.rows, 0) + self.block - 1) // self.block)

    def batch(self) -> jax.Array:
        """Return the rows of the batched product, ``[groups, segments * rows]``; the number of rows where none is."""
        row = jnp.arange(self.rows, dtype=jnp.int32)
        found = jnp.where(row < self.sizes[:, None], self.begins[:, None] + row, self.total)
        found = found.reshape(self.count, self.groups, self.rows).swapaxes(0, 1)
        return found.reshape(self.groups, -1)

    def loop(self, step: Callable[[jax.Array, "Block", Any], Any], state: Any) -> Any:
        """Run ``step(group, block, state) -> state`` over the blocks of what is not in the batched product.

        The scope tells who counts operations that balanced groups leave no block.
        """
        if self.rows == self.total:
            return state

        def body(index: jax.Array, state: Any) -> Any:
            which = jnp.sum((self.blocks <= index).astype(jnp.int32))
            begin, end = self.begins[which], self.begins[which] + self.sizes[which]
            before = jnp.where(which > 0, self.blocks[jnp.maximum(which - 1, 0)], 0)
            first = begin + self.rows + (index - before) * self.block
            start = jnp.minimum(first, self.total - self.block)
            row = start + jnp.arange(self.block, dtype=jnp.int32)
            return step(which % self.groups, Block(start, ((row >= first) & (row < end))[:, None]), state)

        with jax.named_scope("trips=0"):
            return jax.lax.fori_loop(jnp.zeros_like(self.blocks[-1]), self.blocks[-1], body, state)


class Block(NamedTuple):
    """Consecutive rows; `keep` tells which of them belong to the group."""

    start: jax.Array
    keep: jax.Array

    def of(self, x: jax.Array) -> jax.Array:
        """Return these rows of an array."""
        return jax.lax.dynamic_slice_in_dim(x, self.start, self.keep.shape[0])

    def zeroed(self, x: jax.Array) -> jax.Array:
        """Return these rows with zeros in those of other groups."""
        return jnp.where(self.keep, self.of(x), jnp.zeros((), x.dtype))

    def put(self, x: jax.Array, new: jax.Array) -> jax.Array:
        """Return an array with those of these rows that belong to the group replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(self.keep, new, self.of(x)), self.start, 0)


def _product(how: How, lhs: jax.Array, rhs: Any, segments: Segments) -> jax.Array:
    """Return every row's product with its group's matrix, ``[rows, n]``; 0 for rows of no group."""
    schedule = Schedule(how, lhs.shape[0], segments)
    spec = "...mn,...kn->...mk" if how.transposed else "...mk,...kn->...mn"

    def multiply(x: jax.Array, w: Any) -> jax.Array:
        return _einsum(how, spec, x, w.dequantize() if isinstance(w, QuantizedArray) else w)

    def step(group: jax.Array, block: Block, out: jax.Array) -> jax.Array:
        matrix = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, group, keepdims=False), rhs)
        return block.put(out, multiply(block.of(lhs), matrix))

    return schedule.loop(step, _first_rows(how, schedule, multiply, lhs, rhs))


def _first_rows(how: How, schedule: Schedule, multiply: Callable[..., jax.Array], lhs: Any, rhs: Any) -> jax.Array:
    """Return the rows of the batched product where they belong, and zeros."""
    width = rhs.shape[1 if how.transposed else 2]
    if not schedule.rows:
        return jnp.zeros_like(lhs, how.dtype, shape=(schedule.total, width))
    index = schedule.batch()
    x = jnp.take(lhs, index, axis=0, mode="fill", fill_value=0)
    if isinstance(rhs, QuantizedArray):
        y = jax.lax.map(lambda xw: multiply(*xw), (x, rhs), batch_size=min(CHUNK, schedule.groups))
    else:
        y = multiply(x, rhs)
    places = jnp.full_like(index, index.size, shape=(schedule.total,))
    places = places.at[index.reshape(-1)].set(jnp.arange(index.size, dtype=jnp.int32), mode="drop")
    return jnp.take(_merged(y), places, axis=0, mode="fill", fill_value=0)


def _outer(how: How, lhs: jax.Array, d_out: jax.Array, segments: Segments) -> jax.Array:
    """Return the sum over each group's rows of their outer products, ``[groups, k, n]``."""
    schedule = Schedule(how, lhs.shape[0], segments)
    wide = how._replace(dtype=exact(how.dtype))
    shape = (schedule.groups, lhs.shape[1], d_out.shape[1])

    def step(group: jax.Array, block: Block, sums: jax.Array) -> jax.Array:
        part = _einsum(wide, "mk,mn->kn", block.zeroed(lhs), block.zeroed(d_out))
        total = jax.lax.dynamic_index_in_dim(sums, group, keepdims=False) + part
        return jax.lax.dynamic_update_index_in_dim(sums, total, group, 0)

    if schedule.rows:
        index = schedule.batch()
        x, d = (jnp.take(a, index, axis=0, mode="fill", fill_value=0) for a in (lhs, d_out))
        sums = _einsum(wide, "gmk,gmn->gkn", x, d)
    else:
        sums = jnp.zeros_like(lhs, wide.dtype, shape=shape)
    return schedule.loop(step, sums).astype(how.dtype)


def _einsum(how: How, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in the operands' dtype, accumulated exactly; operands that differ meet in the exact one."""
    wide = max((exact(x) for x in (a.dtype, how.dtype)), key=lambda dtype: dtype.itemsize)
    if a.dtype != b.dtype:
        a, b = a.astype(wide), b.astype(wide)
    return jnp.einsum(spec, a, b, precision=how.precision, preferred_element_type=wide).astype(how.dtype)
