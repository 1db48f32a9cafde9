"""Attention by blocks of query rows, heads in a leading batch dimension.

What a mask tells at trace time gives every block a range of keys; what lies outside is never computed. Consecutive
blocks form a group: one loop over its blocks, each with a range of the same width that starts where the block needs it.
A block's logits span its whole range, so the softmax needs no second pass. The backward pass recomputes the
probabilities from the saved log-sum-exp.

Where only arrays tell what a block needs (segments, lengths, traced offsets), its range is walked in chunks of keys,
from the first to the last that it needs, with a running softmax.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_kernels._dropout import Dropout, kept
from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.masks import Mask, Tile
from dovetail_kernels.operation import Call

__all__ = ["Group", "attention", "configs", "groups"]

ROWS = 128
GROUPS = 8
CHUNK = 512
LEAST_GAIN = 0.02


class Group(NamedTuple):
    """Blocks of `rows` query rows from row `start` on; block b uses the keys ``[lows[b], lows[b] + width)``."""

    start: int
    rows: int
    lows: tuple[int, ...]
    width: int


class How(NamedTuple):
    """The static part of a call; an offset is None where it is an array."""

    scale: float
    softcap: float | None
    rows: int
    groups: int
    chunk: int | None
    query_offset: int | None
    key_offset: int | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """The arrays that are not differentiated: who sees whom, what is dropped, offsets that are not static."""

    mask: Any
    dropout: Any
    query_offset: Any
    key_offset: Any


class Operands(NamedTuple):
    """What is differentiated."""

    q: Any
    """``[batch, kv_heads, group, time, key_dim]``"""
    k: Any
    """``[batch, kv_heads, source, key_dim]``"""
    v: Any
    """``[batch, kv_heads, source, value_dim]``"""
    bias: Any
    """``[batch or 1, heads or 1, time, source]``"""
    sinks: Any
    """``[kv_heads, group, 1, 1]``"""


def configs(call: Call) -> Iterator[dict[str, int]]:
    """Return configurations worth trying."""
    time = call.arguments["query"].shape[1]
    for rows in (64, 128, 256, 512):
        if rows <= max(64, time):
            yield from ({"rows": rows, "groups": n} for n in (1, 4, 8, 16) if n == 1 or n * rows <= time)


def attention(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask | None,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    softcap: float | None,
    scale: float,
    dropout: Dropout | None,
    query_offset: Any,
    key_offset: Any,
    return_lse: bool,
    rows: int = ROWS,
    groups: int = GROUPS,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array | None]:
    """See `dovetail_kernels.attention`; shapes are checked there.

    A configuration is the number of query rows per block, the largest number of groups (and so of loops in the
    program), and the number of keys per step where arrays tell what is needed.
    """
    batch, time, heads, _ = query.shape
    source, kv_heads = key.shape[1:3]
    q = query.reshape(batch, time, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)
    sinks = None if sinks is None else sinks.astype(exact(query.dtype)).reshape(kv_heads, -1, 1, 1)
    operands = Operands(q, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), bias, sinks)
    static = [x if isinstance(x, int) else None for x in (query_offset, key_offset)]
    traced = [None if isinstance(x, int) else x for x in (query_offset, key_offset)]
    walk = mask is not None and mask.bounds(Tile(0, 1, 0, source, query_offset, key_offset)) is not None
    how = How(scale, softcap, rows, groups, min(chunk, source) if walk and source > chunk else None, *static)
    leaves, tree = jax.tree.flatten((operands, Where(mask, dropout, *traced)))
    out, lse = _attend(how, *jax.tree.unflatten(tree, alike(*leaves)))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)
    return out, lse.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads) if return_lse else None


def groups(time: int, rows: int, limit: int, span: Callable[[int, int], tuple[int, int]]) -> list[Group]:
    """Cover the query rows with at most `limit` groups of whole blocks, and one for the rows that are left.

    Args:
        time: number of query rows.
        rows: per block.
        limit: of groups.
        span: the range of keys of the query rows ``[start, start + rows)``.
    """
    blocks, rest = divmod(time, rows)
    spans = [span(b * rows, rows) for b in range(blocks)]
    parts = [(0, blocks)] if blocks else []

    def area(part: tuple[int, int]) -> int:
        return (part[1] - part[0]) * max(high - low for low, high in spans[part[0] : part[1]])

    while len(parts) < limit:
        cuts = [(area(p) - area((p[0], c)) - area((c, p[1])), p, c) for p in parts for c in range(p[0] + 1, p[1])]
        gain, part, cut = max(cuts, default=(0, (0, 0), 0))
        if gain <= LEAST_GAIN * sum(map(area, parts)):
            break
        parts.remove(part)
        parts += [(part[0], cut), (cut, part[1])]
    out = list[Group]()
    for first, last in sorted(parts):
        width = max(high - low for low, high in spans[first:last])
        source = max(high for _, high in spans)
        lows = tuple(max(0, min(low, source - width)) for low, _ in spans[first:last])
        out.append(Group(first * rows, rows, lows, width))
    if rest:
        low, high = span(time - rest, rest)
        out.append(Group(time - rest, rest, (low,), high - low))
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Job:
    """One call, in the layout of this module."""

    how: How = dataclasses.field(metadata={"static": True})
    operands: Operands
    where: Where

    def groups(self) -> list[Group]:
        """Return the groups of blocks that cover all query rows."""
        mask, source = self.where.mask, self.operands.k.shape[2]

        def span(start: int, rows: int) -> tuple[int, int]:
            return (0, source) if mask is None else mask.span(self.tile(start, rows, 0, source))

        return groups(self.operands.q.shape[3], self.how.rows, self.how.groups, span)

    def tile(self, row: Any, rows: int, col: Any, cols: int) -> Tile:
        """Return a tile with the offsets of the call."""
        how, where = self.how, self.where
        offsets = (
            where.query_offset if how.query_offset is None else how.query_offset,
            where.key_offset if how.key_offset is None else how.key_offset,
        )
        return Tile(row, rows, col, cols, *offsets)

    def scores(self, q: jax.Array, tile: Tile, first: Any) -> tuple[jax.Array, jax.Array | None]:
        """Return the logits ``[batch, kv_heads, group * rows, cols]`` of a tile, and which of them count (None: all).

        Args:
            q: the rows of the tile.
            tile: some rows and columns.
            first: columns before it do not count, they were seen already; None where there are none.
        """
        how, where, operands = self.how, self.where, self.operands
        s = _dot("bktd,bksd->bkts", q, _cols(operands.k, tile)) * how.scale
        if operands.bias is not None:
            s = _merged(self._split(s, tile) + self._heads(self._part(operands.bias, tile)).astype(s.dtype))
        if how.softcap is not None:
            s = how.softcap * jnp.tanh(s / how.softcap)
        if where.mask is None or where.mask.full(tile):
            return s, None
        keep = where.mask.keep(tile)
        if first is not None:
            keep = keep & (tile.col + jnp.arange(tile.cols, dtype=jnp.int32) >= first)
        return s, _merged(jnp.broadcast_to(self._heads(keep), self._split(s, tile).shape))

    def dropped(self, p: jax.Array, tile: Tile) -> jax.Array:
        """Return weights, or their gradients, after dropout."""
        if self.where.dropout is None:
            return p
        batch, kv_heads, group = self.operands.q.shape[:3]
        factor = kept(self.where.dropout, (batch, kv_heads * group), *tile.positions())
        return p * _merged(self._heads(factor)).astype(p.dtype)

    def add_bias(self, total: jax.Array, ds: jax.Array, tile: Tile) -> jax.Array:
        """Add the gradients of a tile's logits to the bias' gradient."""
        part = self._split(ds, tile).reshape(ds.shape[0], -1, tile.rows, tile.cols)
        axes = tuple(axis for axis in (0, 1) if total.shape[axis] == 1)
        part = jnp.sum(part, axes, keepdims=True) + self._part(total, tile)
        at = [jnp.asarray(x, jnp.int32) for x in (0, 0, tile.row, tile.col)]
        return jax.lax.dynamic_update_slice(total, part.astype(total.dtype), at)

    def _part(self, matrix: jax.Array, tile: Tile) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(matrix, tile.row, tile.rows, 2)
        return jax.lax.dynamic_slice_in_dim(rows, tile.col, tile.cols, 3)

    def _heads(self, x: jax.Array) -> jax.Array:
        """Split the heads of ``[batch or 1, heads or 1, rows, cols]``."""
        kv_heads, group = self.operands.q.shape[1:3]
        return x[:, None] if x.shape[1] == 1 else x.reshape(x.shape[0], kv_heads, group, *x.shape[2:])

    def _split(self, s: jax.Array, tile: Tile) -> jax.Array:
        return s.reshape(*s.shape[:2], -1, tile.rows, tile.cols)


class Softmax(NamedTuple):
    """A running softmax over keys: the largest logit, the sum of exponentials less it, and the weighted values."""

    peak: jax.Array
    total: jax.Array
    out: jax.Array

    @classmethod
    def start(cls, job: Job, rows: int) -> "Softmax":
        """Return the state before any key: nothing, or the sink."""
        q, v, sinks = job.operands.q, job.operands.v, job.operands.sinks
        wide, shape = exact(q.dtype), (*q.shape[:2], q.shape[2] * rows)
        out = jnp.zeros_like(v, wide, shape=(*shape, v.shape[3]))
        zero = jnp.zeros_like(q, wide, shape=(*shape, 1))
        if sinks is None:
            return cls(zero - jnp.inf, zero, out)
        peak = jnp.broadcast_to(sinks, (*sinks.shape[:2], rows, 1)).reshape(1, q.shape[1], -1, 1)
        return cls(zero + peak, zero + 1, out)

    def add(self, s: jax.Array, weigh: Callable[[jax.Array], jax.Array]) -> "Softmax":
        """Return the state after more keys, of logits `s`; `weigh` multiplies weights with values."""
        peak = jnp.maximum(self.peak, jnp.max(s, -1, keepdims=True))
        safe = jnp.where(jnp.isneginf(peak), jnp.zeros((), peak.dtype), peak)
        before, p = jnp.exp(self.peak - safe), jnp.exp(s - safe)
        total = self.total * before + jnp.sum(p, -1, keepdims=True)
        return Softmax(peak, total, self.out * before + weigh(p))

    def finish(self) -> tuple[jax.Array, jax.Array]:
        """Return the weighted mean of the values, and the log-sum-exp."""
        seen = self.total > 0
        safe = jnp.where(seen, self.total, jnp.ones((), self.total.dtype))
        return self.out / safe, jnp.where(seen, self.peak + jnp.log(safe), -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: How, operands: Operands, where: Where) -> tuple[jax.Array, jax.Array]:
    """Return ``[batch, kv_heads, group, time, value_dim]`` and the log-sum-exp, ``[..., time, 1]``."""
    job = Job(how, operands, where)
    parts = list[Any]()
    for group in job.groups():

        def block(start: Any, low: Any, carry: None, group: Group = group) -> Any:
            q = _rows(operands.q, start, group.rows)

            def see(state: Softmax, tile: Tile, first: Any) -> Softmax:
                values = _cols(operands.v, tile)
                return state.add(
                    _masked(*job.scores(q, tile, first)),
                    lambda p: _dot("bkts,bksd->bktd", job.dropped(p, tile).astype(values.dtype), values),
                )

            out, lse = _over_keys(job, group, start, low, see, Softmax.start(job, group.rows)).finish()
            return carry, (_unmerged(out.astype(operands.v.dtype), group), _unmerged(lse, group))

        parts.append(_over_blocks(block, group, None)[1])
    out, lse = (jnp.concatenate(x, axis=3) for x in zip(*parts, strict=True))
    return out, lse


def _forward_rule(how: How, operands: Operands, where: Where) -> tuple[Any, Any]:
    out, lse = _attend(how, operands, where)
    return (out, lse), (operands, where, out, lse)


class Gradients(NamedTuple):
    """Sums over all blocks."""

    k: jax.Array
    v: jax.Array
    bias: Any


def _backward_rule(how: How, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    operands, where, out, lse = saved
    job, (d_out, d_lse) = Job(how, operands, where), cotangents
    wide = lse.dtype
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), -1, keepdims=True) - d_lse
    known = jnp.where(jnp.isneginf(lse), jnp.zeros((), wide), lse)
    bias = None if operands.bias is None else jnp.zeros_like(operands.bias, wide)
    sums = Gradients(jnp.zeros_like(operands.k, wide), jnp.zeros_like(operands.v, wide), bias)
    d_queries = list[Any]()
    for group in job.groups():

        def block(start: Any, low: Any, sums: Gradients, group: Group = group) -> Any:
            q, d_rows, top, less = (_rows(x, start, group.rows) for x in (operands.q, d_out, known, delta))

            def see(state: tuple[jax.Array, Gradients], tile: Tile, first: Any) -> tuple[jax.Array, Gradients]:
                dq, sums = state
                keys, values = _cols(operands.k, tile), _cols(operands.v, tile)
                s, keep = job.scores(q, tile, first)
                p = jnp.exp(_masked(s, keep) - top)
                dp = job.dropped(_dot("bktd,bksd->bkts", d_rows, values), tile)
                ds = p * (dp - less)
                if how.softcap is not None:
                    ds = ds * (1 - (s / how.softcap) ** 2)
                d_bias = None if sums.bias is None else job.add_bias(sums.bias, ds, tile)
                ds = (ds * how.scale).astype(q.dtype)
                dk = _dot("bkts,bktd->bksd", ds, q)
                dv = _dot("bkts,bktd->bksd", job.dropped(p, tile).astype(d_rows.dtype), d_rows)
                sums = Gradients(_add_cols(sums.k, dk, tile), _add_cols(sums.v, dv, tile), d_bias)
                return dq + _dot("bkts,bksd->bktd", ds, keys), sums

            dq, sums = _over_keys(job, group, start, low, see, (jnp.zeros_like(q, wide), sums))
            return sums, _unmerged(dq.astype(q.dtype), group)

        sums, dq = _over_blocks(block, group, sums)
        d_queries.append(dq)
    d_sinks = None
    if operands.sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(operands.sinks - known) * delta, axis=(0, 3), keepdims=True)[0]
    dk, dv, d_bias = (None if x is None else g.astype(x.dtype) for g, x in zip(sums, operands[1:4], strict=True))
    return Operands(jnp.concatenate(d_queries, axis=3), dk, dv, d_bias, d_sinks), None


_attend.defvjp(_forward_rule, _backward_rule)


def _over_blocks(block: Callable[..., Any], group: Group, carry: Any) -> Any:
    """Run ``block(start, low, carry) -> (carry, rows)`` for every block of a group and join the rows."""
    if len(group.lows) == 1:
        return block(group.start, group.lows[0], carry)
    starts = group.start + group.rows * jnp.arange(len(group.lows), dtype=jnp.int32)
    lows = jnp.array(group.lows, jnp.int32)
    fixed = group.lows[0] if len(set(group.lows)) == 1 else None

    def body(carry: Any, at: Any) -> Any:
        return block(at[0], at[1] if fixed is None else fixed, carry)

    carry, rows = jax.lax.scan(body, carry, (starts, lows))
    return carry, jax.tree.map(_join, rows)


def _over_keys(job: Job, group: Group, start: Any, low: Any, see: Callable[..., Any], state: Any) -> Any:
    """Run ``see(state, tile, first) -> state`` over the keys of a block: all at once, or in chunks as far as needed."""
    chunk = job.how.chunk
    if chunk is None or chunk >= group.width:
        return see(state, job.tile(start, group.rows, low, group.width), None) if group.width else state
    begins, ends = job.where.mask.bounds(job.tile(start, group.rows, low, group.width))
    first = jnp.min(jnp.where(begins < ends, begins, low + group.width)) - low
    last = jnp.max(jnp.where(begins < ends, ends, low)) - low

    def step(index: Any, state: Any) -> Any:
        begin = low + index * chunk
        col = jnp.minimum(begin, low + group.width - chunk)
        return see(state, job.tile(start, group.rows, col, chunk), begin)

    return jax.lax.fori_loop(first // chunk, (last + chunk - 1) // chunk, step, state)


def _join(blocks: jax.Array) -> jax.Array:
    """``[blocks, batch, kv, group, rows, dim] -> [batch, kv, group, blocks * rows, dim]``."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, moved.shape[-1])


def _rows(x: jax.Array, start: Any, count: int) -> jax.Array:
    """Take rows of ``[batch, kv, group, time, dim]`` as ``[batch, kv, group * rows, dim]``."""
    return _merged(jax.lax.dynamic_slice_in_dim(x, start, count, axis=3))


def _merged(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _unmerged(x: jax.Array, group: Group) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, group.rows, x.shape[-1])


def _cols(x: jax.Array, tile: Tile) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, tile.col, tile.cols, axis=2)


def _add_cols(total: jax.Array, part: jax.Array, tile: Tile) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total, _cols(total, tile) + part, tile.col, axis=2)


def _masked(s: jax.Array, keep: jax.Array | None) -> jax.Array:
    return s if keep is None else jnp.where(keep, s, -jnp.inf)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=exact(a.dtype))
