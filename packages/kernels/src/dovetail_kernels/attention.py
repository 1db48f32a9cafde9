"""Attention: one function, several implementations.

``reference`` is the textbook form: every derivative, any float dtype. ``blocked`` works on blocks of query rows, skips
the keys that a mask rules out, keeps only the log-sum-exp for the backward pass (Dao et al., arXiv:2205.14135, with
whole rows of keys per block) and has first-order reverse-mode gradients. ``cudnn`` is NVIDIA's fused kernel.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from dovetail_kernels import _blocked, _cudnn
from dovetail_kernels._dropout import Dropout, kept
from dovetail_kernels._dtypes import exact
from dovetail_kernels._mask import Seen, position
from dovetail_kernels.masks import Mask, Tile
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted

__all__ = ["ATTENTION", "Attended", "attention", "merge"]


class Attended(NamedTuple):
    """A result of attention that can be merged with others over other keys.

    Attributes:
        out: the weighted values.
        lse: log of the sum of the exponentials of a row's logits (and sink), float32; -inf where it sees nothing.
    """

    out: Float[Array, "batch time heads value_dim"]
    lse: Float[Array, "batch time heads"]


def attention(
    query: Float[Array, "batch time heads key_dim"],
    key: Float[Array, "batch source kv_heads key_dim"],
    value: Float[Array, "batch source kv_heads value_dim"],
    mask: Mask | None = None,
    *,
    bias: Float[Array, "#batch #heads time source"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    dropout: Dropout | None = None,
    query_offset: int | np.integer[Any] | Integer[Array, "..."] = 0,
    key_offset: int | np.integer[Any] | Integer[Array, "..."] = 0,
    return_lse: bool = False,
    implementation: Wanted = None,
) -> Any:
    """Scaled dot-product attention with grouped heads (Vaswani et al., arXiv:1706.03762; GQA arXiv:2305.13245).

    With z = softcap(scale * query . key + bias) where the mask allows it and -inf elsewhere, the result is
    softmax(z) . value; a sink is one more logit per head whose value is 0. Logits and softmax are float32 (float64 for
    float64 inputs). A row that may attend to nothing gives 0, with a log-sum-exp of -inf and zero gradients.
    Padding, as `segments` and `lengths` know it, may hold anything in query, key and value, NaN included; what another
    mask hides must be finite.

    Args:
        query: ``heads`` is a multiple of ``kv_heads``; query head h reads key-value head ``h // group``.
        key: keys.
        value: values; their size may differ from the keys'.
        mask: who sees whom, such as ``causal() & window(4096)``; None lets everyone see everything.
        bias: added to the logits before `softcap`; batch and heads may be 1.
        sinks: a logit per head that takes part in the softmax only (Xiao et al., arXiv:2309.17453).
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        scale: factor of the logits, default ``key_dim ** -0.5``.
        dropout: of the weights.
        query_offset: position of the first query, for masks that compare positions: an int, or an integer array ``[]``
            or ``[batch]``.
        key_offset: position of the first key, likewise.
        return_lse: return `Attended`, for `merge`.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that cannot run this (`UnsupportedError`).
        TypeError: operands that are not floats, offsets that are not integers.

    >>> from dovetail_kernels import causal
    >>> q = jnp.ones((1, 4, 2, 8)); kv = jnp.ones((1, 4, 1, 8))
    >>> attention(q, kv, kv, causal()).shape
    (1, 4, 2, 8)
    """
    _check(query, key, value)
    batch, time, heads, source = *query.shape[:3], key.shape[1]
    _check_rest(mask, bias, sinks, softcap, (batch, heads, time, source))
    offsets = {"query_offset": query_offset, "key_offset": key_offset}
    rows, cols = Seen(None, None) if mask is None else mask.seen((batch, heads, time, source))
    if 0 in (batch, time, heads, source):
        out = jnp.zeros((batch, time, heads, value.shape[3]), value.dtype)
        lse = jnp.full((batch, time, heads), -jnp.inf, exact(query.dtype))
        lse = lse if sinks is None else jnp.maximum(lse, sinks.astype(lse.dtype))
    else:
        out, lse = ATTENTION(
            implementation,
            query=_cleared(query, rows),
            key=_cleared(key, cols),
            value=_cleared(value, cols),
            mask=mask,
            bias=bias,
            sinks=sinks,
            softcap=softcap,
            scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
            dropout=dropout if dropout is not None and dropout.rate else None,
            **{name: _offset(name, x, batch) for name, x in offsets.items()},
            return_lse=return_lse,
        )
        out = _cleared(out, rows)
    return Attended(out, lse) if return_lse else out


def merge(parts: Sequence[Attended]) -> Attended:
    """Return the attention over all keys from the results over some of them each, as with ``return_lse=True``.

    A sink belongs to one of the parts only.

    Raises:
        ValueError: no parts.

    >>> q = jnp.ones((1, 2, 1, 4)); kv = jnp.arange(24.0).reshape(1, 6, 1, 4)
    >>> halves = [attention(q, x, x, return_lse=True) for x in (kv[:, :3], kv[:, 3:])]
    >>> bool(jnp.allclose(merge(halves).out, attention(q, kv, kv)))
    True
    """
    if not parts:
        raise ValueError("merge of no parts; expected at least one Attended")
    every = jnp.stack([part.lse for part in parts])
    peak = jax.lax.stop_gradient(jnp.max(every, 0))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.where(jnp.isneginf(every), 0, jnp.exp(jnp.where(jnp.isneginf(every), 0, every - peak)))
    total = jnp.sum(weights, 0)
    safe = jnp.where(total > 0, total, 1)
    shares = (weights / safe)[..., None]
    outs = jnp.stack([part.out for part in parts])
    out = jnp.sum(outs.astype(shares.dtype) * shares, 0).astype(outs.dtype)
    return Attended(out, jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf))


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; expected a float")
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{shapes}; expected [batch, time, heads, dim] each")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(f"{shapes}; key and value share batch, source and kv_heads, query and key batch and key_dim")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"{shapes}; heads {query.shape[2]} must be a multiple of kv_heads {key.shape[2]}")


def _check_rest(
    mask: Mask | None,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    softcap: float | None,
    matrix: tuple[int, int, int, int],
) -> None:
    batch, heads, time, source = matrix
    if mask is not None:
        if not isinstance(mask, Mask):
            raise TypeError(f"mask is {type(mask).__name__}; expected a Mask such as causal(), or dense(array)")
        mask.check(matrix)
    if bias is not None:
        if not jnp.issubdtype(bias.dtype, jnp.floating):
            raise TypeError(f"bias has dtype {bias.dtype}; expected a float (who sees whom goes to mask=dense(array))")
        fits = bias.ndim == 4 and bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads)
        if not (fits and bias.shape[2:] == (time, source)):
            raise ValueError(f"bias has shape {bias.shape}; expected {matrix}, where batch and heads may be 1")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks have shape {sinks.shape}; expected ({heads},), one per head")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; expected a positive number or None")


def _offset(name: str, x: Any, batch: int) -> Any:
    """Return an offset as an int or as an int32 array."""
    if not isinstance(x, (int, np.integer)):
        if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise TypeError(f"{name}={x!r}; expected an int, or an array of integers")
        if jnp.shape(x) not in ((), (batch,)):
            raise ValueError(f"{name} has shape {jnp.shape(x)}; expected () or ({batch},)")
    return position(x)


def _cleared(x: jax.Array, seen: Any) -> jax.Array:
    """Return the array with zeros in place of padding: 0 times NaN would be NaN, in sums and in gradients."""
    return x if seen is None else jnp.where(seen[:, :, None, None], x, jnp.zeros((), x.dtype))


def _reference(
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
) -> tuple[jax.Array, jax.Array | None]:
    batch, time, heads, _ = query.shape
    source, kv_heads = key.shape[1:3]
    wide, group = exact(query.dtype), heads // kv_heads
    tile = Tile(0, time, 0, source, query_offset, key_offset)
    grouped = query.reshape(batch, time, kv_heads, group, -1)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide) * scale
    logits = logits.reshape(batch, heads, time, source)
    if bias is not None:
        logits = logits + bias.astype(wide)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    keep = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask.keep(tile)
    logits = jnp.where(keep, logits, -jnp.inf)
    peak = jnp.max(logits, -1, keepdims=True)
    if sinks is not None:
        peak = jnp.maximum(peak, sinks.astype(wide)[:, None, None])
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0))
    p = jnp.where(keep, jnp.exp(jnp.where(keep, logits - peak, 0)), 0)
    total = jnp.sum(p, -1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.astype(wide)[:, None, None] - peak)
    safe = jnp.where(total > 0, total, 1)
    weights = p / safe
    if dropout is not None:
        weights = weights * kept(dropout, (batch, heads), *tile.positions()).astype(wide)
    weights = weights.reshape(batch, kv_heads, group, time, source)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    lse = jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)[..., 0].transpose(0, 2, 1) if return_lse else None
    return out.reshape(batch, time, heads, -1), lse


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    query, key, value = (call.arguments[name] for name in ("query", "key", "value"))
    flags = ("bias", "sinks", "softcap", "dropout")
    exactly = {
        "dtype": str(query.dtype),
        "group": query.shape[2] // key.shape[2],
        "key_dim": query.shape[3],
        "value_dim": value.shape[3],
        "mask": str(call.arguments["mask"]),
        "with": ", ".join(name for name in flags if call.arguments[name] is not None),
    }
    return exactly, {"rows": query.shape[0] * key.shape[2], "time": query.shape[1], "source": key.shape[1]}


ATTENTION = Operation(
    "attention",
    (
        Implementation(
            "cudnn",
            _cudnn.attention,
            _cudnn.supports,
            platforms=("gpu",),
            gradient="first order, reverse mode",
            features="16-bit; causal, causal window, lengths; no bias, sinks, soft cap, dropout, offsets or lse",
        ),
        Implementation("blocked", _blocked.attention, configs=_blocked.configs, gradient="first order, reverse mode"),
        Implementation("reference", _reference),
    ),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 1e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: (PartitionSpec(*axes["query"][:3]),) * 2,
)
