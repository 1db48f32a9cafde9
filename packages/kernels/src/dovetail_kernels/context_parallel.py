"""Attention over a sequence that is spread over the devices of a mesh axis, inside ``jax.shard_map``.

Every device holds an equal, contiguous part of the rows: device n those from ``n * time`` on. `ring_attention` sends
keys and values round the axis and merges what each part gives (Liu et al., arXiv:2310.01889); `ulysses_attention`
exchanges rows for heads, attends, and exchanges back (Jacobs et al., arXiv:2309.14509).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels._mask import And, Or
from dovetail_kernels._mask_arrays import Dense, Lengths, Segments
from dovetail_kernels.attention import Attended, attention, merge
from dovetail_kernels.masks import Mask
from dovetail_kernels.operation import Wanted

__all__ = ["ring_attention", "ulysses_attention"]


class How(NamedTuple):
    """The static part of a call."""

    axis: str
    softcap: float | None
    scale: float | None
    implementation: Any


def ring_attention(
    query: Float[Array, "batch time heads key_dim"],
    key: Float[Array, "batch source kv_heads key_dim"],
    value: Float[Array, "batch source kv_heads value_dim"],
    mask: Mask | None = None,
    *,
    axis: str,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: Wanted = None,
) -> Float[Array, "batch time heads value_dim"]:
    """Attend to the keys of all devices of an axis, one device's at a time.

    Memory stays that of one part: the backward pass sends keys and values round once more, with their gradients. Parts
    that a causal mask rules out cost no arithmetic (their device waits for the others: rows at the end do more).

    Args:
        query: this device's rows.
        key: this device's keys.
        value: this device's values.
        mask: positions are those of the whole sequence; `segments` hold this device's ids.
        axis: name of the mesh axis that the sequence is spread over.
        sinks: see `attention`.
        softcap: see `attention`.
        scale: see `attention`.
        implementation: of `attention`.

    Raises:
        ValueError: a mask with `dense` or `lengths`, which count rows and columns of one array.
    """
    _movable(mask)
    q, k, v = alike(query, key, value)
    wanted = tuple(implementation) if isinstance(implementation, list) else implementation
    attended = Attended(*_ring(How(axis, softcap, scale, wanted), q, k, v, mask))
    if sinks is not None:
        lse = jnp.broadcast_to(sinks.astype(attended.lse.dtype), attended.lse.shape)
        attended = merge([attended, Attended(jnp.zeros_like(attended.out), *alike(lse, attended.lse)[:1])])
    return attended.out.astype(value.dtype)


def ulysses_attention(
    query: Float[Array, "batch time heads key_dim"],
    key: Float[Array, "batch source kv_heads key_dim"],
    value: Float[Array, "batch source kv_heads value_dim"],
    mask: Mask | None = None,
    *,
    axis: str,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: Wanted = None,
) -> Float[Array, "batch time heads value_dim"]:
    """Attend to the keys of all devices of an axis, each device for its share of the heads.

    Arguments as in `ring_attention`.

    Raises:
        ValueError: heads or kv_heads that the devices cannot share evenly, or a mask as in `ring_attention`.
    """
    _movable(mask)
    devices = jax.lax.axis_size(axis)
    for name, x in (("heads", query), ("kv_heads", key)):
        if x.shape[2] % devices:
            raise ValueError(
                f"{x.shape[2]} {name} over {devices} devices of {axis!r}; expected a multiple, or the ring"
            )

    def to_heads(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axis, 2, 1, tiled=True)

    whole = (
        None if mask is None else _moved(mask, lambda ids: jax.lax.all_gather(ids, axis, axis=1, tiled=True), both=True)
    )
    if sinks is not None:
        share = query.shape[2] // devices
        every = alike(sinks, query)[0]
        sinks = jax.lax.dynamic_slice_in_dim(every, jax.lax.axis_index(axis) * share, share)
    query, key, value = (to_heads(x) for x in alike(query, key, value))
    out = attention(
        query,
        key,
        value,
        whole,
        sinks=sinks,
        softcap=softcap,
        scale=scale,
        implementation=implementation,
    )
    return jax.lax.all_to_all(out, axis, 1, 2, tiled=True)


def _movable(mask: Mask | None) -> None:
    if isinstance(mask, (Dense, Lengths)):
        raise ValueError(f"the mask {mask} counts rows and columns of one device; expected positions or segments")
    if isinstance(mask, (And, Or)):
        _movable(mask.a)
        _movable(mask.b)


def _moved(mask: Any, move: Callable[[jax.Array], jax.Array], both: bool = False) -> Any:
    """Return the mask with its keys' segments moved, and its queries' too if asked."""
    if isinstance(mask, Segments):
        return Segments(move(mask.query_ids) if both else mask.query_ids, move(mask.key_ids))
    if isinstance(mask, (And, Or)):
        return type(mask)(_moved(mask.a, move, both), _moved(mask.b, move, both))
    return mask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: How, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> tuple[jax.Array, jax.Array]:
    """Return output and log-sum-exp, both in the dtype of sums."""
    wide = exact(q.dtype)
    out = jnp.zeros_like(q, wide, shape=(*q.shape[:3], v.shape[3]))
    start = Attended(out, jnp.zeros_like(q, wide, shape=q.shape[:3]) - jnp.inf)

    def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
        attended, (k, v, mask) = carry
        part = _part(how, step, q, k, v, mask)
        return (merge([attended, part]), _passed(how, k, v, mask)), None

    (attended, _), _ = jax.lax.scan(body, (start, (k, v, mask)), _steps(how))
    return attended.out, attended.lse


def _forward_rule(how: How, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> tuple[Any, Any]:
    out, lse = _ring(how, q, k, v, mask)
    return (out, lse), (q, k, v, mask, out, lse)


def _backward_rule(how: How, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, mask, out, lse = saved
    d_out, d_lse = cotangents
    zeros = [jnp.zeros_like(x, exact(x.dtype)) for x in (q, k, v)]

    def body(carry: Any, step: jax.Array) -> tuple[Any, None]:
        dq, (k, v, mask, dk, dv) = carry
        part, pull = jax.vjp(lambda q, k, v: _part(how, step, q, k, v, mask), q, k, v)
        share = jnp.where(jnp.isneginf(lse), 0, jnp.exp(part.lse - jnp.where(jnp.isneginf(lse), 0, lse)))
        along = jnp.sum(d_out * (part.out - out), -1)
        found = pull(Attended(d_out * share[..., None], share * (along + d_lse)))
        dq, dk, dv = (total + x.astype(total.dtype) for total, x in zip((dq, dk, dv), found, strict=True))
        k, v, mask = _passed(how, k, v, mask)
        return (dq, (k, v, mask, *(_next(how, x) for x in (dk, dv)))), None

    (dq, (*_, dk, dv)), _ = jax.lax.scan(body, (zeros[0], (k, v, mask, *zeros[1:])), _steps(how))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_forward_rule, _backward_rule)


def _steps(how: How) -> jax.Array:
    return jnp.arange(jax.lax.axis_size(how.axis), dtype=jnp.int32)


def _part(how: How, step: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, mask: Any) -> Attended:
    """Attend to the keys that came `step` devices far."""
    here = jax.lax.axis_index(how.axis)
    origin = (here - step) % jax.lax.axis_size(how.axis)
    part = attention(
        q,
        k,
        v,
        mask,
        softcap=how.softcap,
        scale=how.scale,
        query_offset=here * q.shape[1],
        key_offset=origin * k.shape[1],
        return_lse=True,
        implementation=how.implementation,
    )
    return Attended(part.out.astype(part.lse.dtype), part.lse)


def _next(how: How, x: jax.Array) -> jax.Array:
    devices = jax.lax.axis_size(how.axis)
    return jax.lax.ppermute(x, how.axis, [(i, (i + 1) % devices) for i in range(devices)])


def _passed(how: How, k: jax.Array, v: jax.Array, mask: Any) -> tuple[Any, Any, Any]:
    """Pass keys, values and the segments of keys on to the next device."""
    move = functools.partial(_next, how)
    return move(k), move(v), _moved(mask, move)
