"""Attention by tiles of query rows and keys, heads in a leading batch dimension.

A loop over blocks of query rows holds a loop over chunks of keys, from the first to the last that any row of the block
may see: what a mask rules out is never computed, be it known when traced (causal, window) or found in arrays (segments,
lengths). The softmax runs along with the keys. The backward pass recomputes the probabilities from the log-sum-exp.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_kernels._dropout import Dropout, kept
from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.masks import Mask, Tile
from dovetail_kernels.operation import Call

__all__ = ["attention", "configs"]

SIDE = 128
TILE = 1 << 18  # logits of a window's tile that stay in a CPU's cache
LANES = 16


class Blocks(NamedTuple):
    """`number` blocks of `rows` query rows from row `start` on."""

    start: int
    rows: int
    number: int


class How(NamedTuple):
    """The static part of a call; an offset is None where it is an array."""

    scale: float
    softcap: float | None
    rows: int
    chunk: int
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
    time, source = call.arguments["query"].shape[1], call.arguments["key"].shape[1]
    for rows in (64, 128, 256, 512):
        for chunk in (64, 128, 256, 512, 1024):
            if rows < 2 * time and chunk < 2 * source:
                yield {"rows": rows, "chunk": chunk}


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
    rows: int | None = None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """See `dovetail_kernels.attention`; shapes are checked there.

    A configuration is the number of query rows and of keys of a tile; by default few rows go with many keys, and a
    window has tiles as wide as it.
    """
    batch, time, heads, _ = query.shape
    source, kv_heads = key.shape[1:3]
    q = query.reshape(batch, time, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)
    sinks = None if sinks is None else sinks.astype(exact(query.dtype)).reshape(kv_heads, -1, 1, 1)
    operands = Operands(q, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), bias, sinks)
    static = [x if isinstance(x, int) else None for x in (query_offset, key_offset)]
    traced = [None if isinstance(x, int) else x for x in (query_offset, key_offset)]
    if rows is None:
        fitted = _fitted(mask, batch * heads, time, source, (query_offset, key_offset))
        rows, chunk = fitted[0], chunk or fitted[1]
    rows = min(rows, time)
    how = How(scale, softcap, rows, min(chunk or max(SIDE, SIDE * SIDE // rows), source), *static)
    leaves, tree = jax.tree.flatten((operands, Where(mask, dropout, *traced)))
    out, lse = _attend(how, *jax.tree.unflatten(tree, alike(*leaves)))
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)
    return out, lse.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads) if return_lse else None


def _fitted(mask: Mask | None, heads: int, time: int, source: int, offsets: tuple[Any, Any]) -> tuple[int, int | None]:
    """Return the rows and keys of tiles: a window is one tile per block, or a few, where that is less than all keys."""
    if mask is None or time < SIDE:
        return SIDE, None

    def width(rows: int) -> int:
        starts = [rows * round(i) for i in np.linspace(0, time // rows - 1, 9).tolist()]
        spans = [mask.span(Tile(start, rows, 0, source, *offsets)) for start in starts]
        return max(high - low for low, high in spans)

    if width(SIDE) > source * 3 // 4:
        return SIDE, None
    rows = next((rows for rows in (SIDE, SIDE // 2) if heads * rows * width(rows) <= TILE), SIDE // 2)
    parts = max(1, min(heads * rows * width(rows) // TILE, width(rows) // SIDE))
    return rows, -(-width(rows) // (parts * LANES)) * LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Job:
    """One call, in the layout of this module."""

    how: How = dataclasses.field(metadata={"static": True})
    operands: Operands
    where: Where

    def blocks(self) -> list[Blocks]:
        """Cover all query rows: whole blocks, and what is left."""
        time, rows = self.operands.q.shape[3], self.how.rows
        whole, rest = divmod(time, rows)
        return [Blocks(0, rows, whole)] + ([Blocks(time - rest, rest, 1)] if rest else [])

    def span(self, start: int, rows: int) -> tuple[int, int]:
        """Return the keys that some rows may see, as far as known when traced."""
        source = self.operands.k.shape[2]
        return (0, source) if self.where.mask is None else self.where.mask.span(self.tile(start, rows, 0, source))

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
        new = None
        if first is not None and operands.k.shape[2] % tile.cols:  # the last chunk overlaps the one before
            new = tile.col + jnp.arange(tile.cols, dtype=jnp.int32) >= first
        keep = None if where.mask is None or where.mask.full(tile) else where.mask.keep(tile)
        if keep is None:
            return s, new
        keep = keep if new is None else keep & new
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
    for blocks in job.blocks():
        rows = blocks.rows

        def block(start: Any, keys: Any, carry: None, rows: int = rows) -> Any:
            q = _rows(operands.q, start, rows)

            def see(state: Softmax, tile: Tile, first: Any) -> Softmax:
                values = _cols(operands.v, tile)
                return state.add(
                    _masked(*job.scores(q, tile, first)),
                    lambda p: _dot("bkts,bksd->bktd", job.dropped(p, tile).astype(values.dtype), values),
                )

            out, lse = _over_keys(job, (start, rows), keys, see, Softmax.start(job, rows)).finish()
            return carry, (_unmerged(out.astype(operands.v.dtype), rows), _unmerged(lse, rows))

        parts.append(_over_blocks(job, blocks, block, None)[1])
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
    for blocks in job.blocks():
        rows = blocks.rows

        def block(start: Any, keys: Any, sums: Gradients, rows: int = rows) -> Any:
            q, d_rows, top, less = (_rows(x, start, rows) for x in (operands.q, d_out, known, delta))

            def see(state: tuple[jax.Array, Gradients], tile: Tile, first: Any) -> tuple[jax.Array, Gradients]:
                dq, sums = state
                k, v = _cols(operands.k, tile), _cols(operands.v, tile)
                s, keep = job.scores(q, tile, first)
                p = jnp.exp(_masked(s, keep) - top)
                dp = job.dropped(_dot("bktd,bksd->bkts", d_rows, v), tile)
                ds = p * (dp - less)
                if how.softcap is not None:
                    ds = ds * (1 - (s / how.softcap) ** 2)
                d_bias = None if sums.bias is None else job.add_bias(sums.bias, ds, tile)
                ds = (ds * how.scale).astype(q.dtype)
                dk = _dot("bkts,bktd->bksd", ds, q)
                dv = _dot("bkts,bktd->bksd", job.dropped(p, tile).astype(d_rows.dtype), d_rows)
                sums = Gradients(_add_cols(sums.k, dk, tile), _add_cols(sums.v, dv, tile), d_bias)
                return dq + _dot("bkts,bksd->bktd", ds, k), sums

            dq, sums = _over_keys(job, (start, rows), keys, see, (jnp.zeros_like(q, wide), sums))
            return sums, _unmerged(dq.astype(q.dtype), rows)

        sums, dq = _over_blocks(job, blocks, block, sums)
        d_queries.append(dq)
    d_sinks = None
    if operands.sinks is not None:
        d_sinks = -jnp.sum(jnp.exp(operands.sinks - known) * delta, axis=(0, 3), keepdims=True)[0]
    dk, dv, d_bias = (None if x is None else g.astype(x.dtype) for g, x in zip(sums, operands[1:4], strict=True))
    return Operands(jnp.concatenate(d_queries, axis=3), dk, dv, d_bias, d_sinks), None


_attend.defvjp(_forward_rule, _backward_rule)


def _over_blocks(job: Job, blocks: Blocks, block: Callable[..., Any], carry: Any) -> Any:
    """Run ``block(start, keys, carry) -> (carry, rows)`` for every block and join the rows.

    The scope tells who counts operations how often the loops over keys run on average, as the mask's form goes.
    """
    starts = [blocks.start + b * blocks.rows for b in range(blocks.number)]
    keys = [_whole(*job.span(start, blocks.rows), job.how.chunk, job.operands.k.shape[2]) for start in starts]
    trips = sum(-(-(high - low) // job.how.chunk) for low, high in keys) / len(keys)

    def body(carry: Any, at: Any) -> Any:
        return block(at[0], at[1], carry)

    with jax.named_scope(f"trips={trips:g}"):
        if blocks.number == 1:
            return block(starts[0], keys[0], carry)
        carry, rows = jax.lax.scan(body, carry, (np.array(starts, np.int32), tuple(np.array(keys, np.int32).T)))
    return carry, jax.tree.map(_join, rows)


def _whole(low: int, high: int, chunk: int, source: int) -> tuple[int, int]:
    """Return a range of keys that begins early enough for whole chunks, where there are as many keys."""
    count = -(-(high - low) // chunk)
    return max(0, min(low, source - count * chunk)), high


def _over_keys(job: Job, at: tuple[Any, int], keys: tuple[Any, Any], see: Callable[..., Any], state: Any) -> Any:
    """Run ``see(state, tile, first) -> state`` over the keys of a block, chunk after chunk as far as needed.

    Args:
        job: the call.
        at: the first row of the block, and how many.
        keys: the half-open range of keys as far as known when traced.
        see: takes a tile, and the column before which it has been seen already (None for a tile of all).
        state: what goes in.
    """
    chunk, source = job.how.chunk, job.operands.k.shape[2]
    if chunk == source:
        return see(state, job.tile(*at, 0, source), None)
    base, high = keys
    low = base
    found = None if job.where.mask is None else job.where.mask.bounds(job.tile(*at, 0, source))
    if found is not None:
        some = found[0] < found[1]
        low = jnp.maximum(low, jnp.min(jnp.where(some, found[0], source)))
        high = jnp.minimum(high, jnp.max(jnp.where(some, found[1], 0)))

    def step(index: Any, state: Any) -> Any:
        begin = base + index * chunk
        return see(state, job.tile(*at, jnp.minimum(begin, source - chunk), chunk), begin)

    return jax.lax.fori_loop((low - base) // chunk, (high - base + chunk - 1) // chunk, step, state)


def _join(blocks: jax.Array) -> jax.Array:
    """``[blocks, batch, kv, group, rows, dim] -> [batch, kv, group, blocks * rows, dim]``."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, moved.shape[-1])


def _rows(x: jax.Array, start: Any, count: int) -> jax.Array:
    """Take rows of ``[batch, kv, group, time, dim]`` as ``[batch, kv, group * rows, dim]``."""
    return _merged(jax.lax.dynamic_slice_in_dim(x, start, count, axis=3))


def _merged(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _unmerged(x: jax.Array, rows: int) -> jax.Array:
    return x.reshape(*x.shape[:2], -1, rows, x.shape[-1])


def _cols(x: jax.Array, tile: Tile) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, tile.col, tile.cols, axis=2)


def _add_cols(total: jax.Array, part: jax.Array, tile: Tile) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total, _cols(total, tile) + part, tile.col, axis=2)


def _masked(s: jax.Array, keep: jax.Array | None) -> jax.Array:
    return s if keep is None else jnp.where(keep, s, -jnp.inf)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=exact(a.dtype))
