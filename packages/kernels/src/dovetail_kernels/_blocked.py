"""Attention by blocks of query rows, heads in a leading batch dimension.

Each block sees one contiguous range of keys, known from the mask at trace time: what lies outside is never computed.
A block's logits span its whole range, so the softmax needs no second pass. The backward pass recomputes the
probabilities from the saved log-sum-exp.

A short sequence is unrolled into its blocks. A long one is unrolled into at most `UNROLL` groups, each a loop over
its blocks that shares the key range of the group: the program stays small, and little is computed in vain.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels._mask import Mask, allowed

BLOCK = 128
UNROLL = 16


class Group(NamedTuple):
    """Query rows ``[start, start + blocks * rows)``, all of whose blocks use the keys ``[low, high)``."""

    start: int
    rows: int
    blocks: int
    low: int
    high: int


def groups(time: int, source: int, mask: Mask) -> list[Group]:
    """Cover the query rows with at most ``UNROLL + 1`` groups."""
    blocks, rest = divmod(time, BLOCK)
    per_group = max(1, -(-blocks // UNROLL))
    out = list[Group]()
    for first in range(0, blocks, per_group):
        count = min(per_group, blocks - first)
        rows = (first * BLOCK, (first + count) * BLOCK)
        out.append(Group(rows[0], BLOCK, count, *mask.keys(rows, source)))
    if rest:
        out.append(Group(time - rest, rest, 1, *mask.keys((time - rest, time), source)))
    return out


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None, mask: Mask, scale: float
) -> jax.Array:
    """See `dovetail_kernels.attention`; shapes are checked there."""
    batch, time, heads, _ = query.shape
    kv_heads = key.shape[2]
    query, key, value, segment_ids = alike(query, key, value, segment_ids)
    q = query.reshape(batch, time, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)
    out: jax.Array = _attend(mask, float(scale), q, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), segment_ids)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    mask: Mask, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> jax.Array:
    """``q[batch, kv, group, time, dim], k/v[batch, kv, source, dim] -> [batch, kv, group, time, value_dim]``."""
    return _forward(mask, scale, q, k, v, segments)[0]


def _forward(
    mask: Mask, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    outs, lses = list[jax.Array](), list[jax.Array]()
    for group in groups(q.shape[3], k.shape[2], mask):
        keys, values = k[:, :, group.low : group.high], v[:, :, group.low : group.high]

        def block(start: Any, group: Group = group, keys: Any = keys, values: Any = values) -> Any:
            logits = _logits(mask, scale, _rows(q, start, group.rows), keys, segments, (start, group))
            peak = jnp.max(logits, axis=-1, keepdims=True)
            peak = jnp.where(jnp.isfinite(peak), peak, jnp.zeros((), peak.dtype))
            p = jnp.exp(logits - peak)
            total = jnp.sum(p, axis=-1, keepdims=True)
            seen = total > 0
            safe = jnp.where(seen, total, jnp.ones((), total.dtype))
            out = _dot("bkts,bksd->bktd", p.astype(values.dtype), values) / safe
            lse = jnp.where(seen, peak + jnp.log(safe), jnp.zeros((), total.dtype))
            return _split_rows(out.astype(v.dtype), q.shape[2]), _split_rows(lse, q.shape[2])

        out, lse = _over_blocks(block, group)
        outs.append(out)
        lses.append(lse)
    return jnp.concatenate(outs, axis=3), jnp.concatenate(lses, axis=3)


def _forward_rule(mask: Mask, scale: float, *operands: Any) -> tuple[jax.Array, Any]:
    out, lse = _forward(mask, scale, *operands)
    return out, (*operands, out, lse)


def _backward_rule(mask: Mask, scale: float, saved: Any, d_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, out, lse = saved
    delta = jnp.sum(d_out.astype(lse.dtype) * out.astype(lse.dtype), axis=-1, keepdims=True)
    dqs, dk, dv = list[jax.Array](), jnp.zeros_like(k), jnp.zeros_like(v)
    for group in groups(q.shape[3], k.shape[2], mask):
        keys, values = k[:, :, group.low : group.high], v[:, :, group.low : group.high]

        def block(start: Any, group: Group = group, keys: Any = keys, values: Any = values) -> Any:
            rows = _rows(q, start, group.rows)
            d_rows = _rows(d_out, start, group.rows)
            logits = _logits(mask, scale, rows, keys, segments, (start, group))
            p = jnp.exp(logits - _rows(lse, start, group.rows))
            dp = _dot("bktd,bksd->bkts", d_rows, values)
            ds = (p * (dp - _rows(delta, start, group.rows)) * scale).astype(rows.dtype)
            dv_part = _dot("bkts,bktd->bksd", p.astype(d_rows.dtype), d_rows)
            dk_part = _dot("bkts,bktd->bksd", ds, rows)
            return _split_rows(_dot("bkts,bksd->bktd", ds, keys).astype(q.dtype), q.shape[2]), dk_part, dv_part

        dq, dk_part, dv_part = _over_blocks(block, group, summed=2)
        dqs.append(dq)
        dk = dk.at[:, :, group.low : group.high].add(dk_part.astype(dk.dtype))
        dv = dv.at[:, :, group.low : group.high].add(dv_part.astype(dv.dtype))
    return jnp.concatenate(dqs, axis=3), dk, dv, None


_attend.defvjp(_forward_rule, _backward_rule)


def _over_blocks(block: Callable[[Any], Any], group: Group, summed: int = 0) -> Any:
    """Run `block` for every block of a group: results are joined along the rows, the last `summed` ones added."""
    if group.blocks == 1:
        return block(group.start)
    starts = group.start + group.rows * jnp.arange(group.blocks, dtype=jnp.int32)
    shapes = jax.eval_shape(block, starts[0])
    joined = len(shapes) - summed

    def body(carry: Any, start: jax.Array) -> Any:
        out = block(start)
        return jax.tree.map(jnp.add, carry, tuple(out[joined:])), tuple(out[:joined])

    zeros = tuple(jnp.zeros_like(s) for s in shapes[joined:])
    sums, rows = jax.lax.scan(body, zeros, starts)
    return (*(_join(r) for r in rows), *sums)


def _join(blocks: jax.Array) -> jax.Array:
    """``[blocks, batch, kv, group, rows, dim] -> [batch, kv, group, blocks * rows, dim]``."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, moved.shape[-1])


def _rows(x: jax.Array, start: Any, count: int) -> jax.Array:
    """Take rows of ``[batch, kv, group, time, dim]`` as ``[batch, kv, group * rows, dim]``."""
    part = jax.lax.dynamic_slice_in_dim(x, start, count, axis=3)
    return part.reshape(*part.shape[:2], -1, part.shape[-1])


def _split_rows(x: jax.Array, group: int) -> jax.Array:
    return x.reshape(*x.shape[:2], group, -1, x.shape[-1])


def _logits(
    mask: Mask, scale: float, rows: jax.Array, keys: jax.Array, segments: jax.Array | None, at: tuple[Any, Group]
) -> jax.Array:
    start, group = at
    logits = _dot("bktd,bksd->bkts", rows, keys) * scale
    keep = allowed(mask, (start, group.rows), (group.low, group.high), segments)
    if keep is None:
        return logits
    batch, kv, _, source = logits.shape
    split = logits.reshape(batch, kv, -1, group.rows, source)
    return jnp.where(keep[:, None, None], split, -jnp.inf).reshape(logits.shape)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=exact(a.dtype))
