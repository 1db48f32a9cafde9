"""Attention: one function, several implementations.

``reference`` is the textbook form: every gradient, any float dtype. ``blocked`` works on blocks of query rows, skips
key blocks that the causal or window mask rules out, keeps only the log-sum-exp for the backward pass (Dao et al.,
arXiv:2205.14135, with whole rows of keys per block) and offers first-order reverse-mode gradients.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dovetail_kernels import _blocked
from dovetail_kernels._dtypes import exact
from dovetail_kernels._mask import Mask, allowed

__all__ = ["AttentionImplementation", "attention"]

AttentionImplementation: TypeAlias = Literal["reference", "blocked"]


def attention(
    query: Float[Array, "batch time heads key_dim"],
    key: Float[Array, "batch source kv_heads key_dim"],
    value: Float[Array, "batch source kv_heads value_dim"],
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    scale: float | None = None,
    implementation: AttentionImplementation | None = None,
) -> Float[Array, "batch time heads value_dim"]:
    """Scaled dot-product attention with grouped heads (Vaswani et al., arXiv:1706.03762; GQA arXiv:2305.13245).

    Logits and softmax are float32 (float64 for float64 inputs). A row that may attend to nothing gives 0.

    Args:
        query: ``heads`` is a multiple of ``kv_heads``; query head h reads key-value head ``h // group``.
        key: keys.
        value: values; their size may differ from the keys'.
        causal: token i sees tokens j <= i (needs ``time == source``).
        window: token i sees only tokens j > i - window; needs `causal`.
        segment_ids: tokens see only their own segment; 0 is padding, which sees and is seen by nothing (needs
            ``time == source``).
        scale: factor of the logits, default ``key_dim ** -0.5``.
        implementation: None chooses ``blocked``.

    Raises:
        ValueError: shapes that do not fit, a window below 1 or without `causal`, an unknown implementation.
        TypeError: operands that are not floats, segments that are not integers.

    >>> q = jnp.ones((1, 4, 2, 8)); kv = jnp.ones((1, 4, 1, 8))
    >>> attention(q, kv, kv).shape
    (1, 4, 2, 8)
    """
    _check(query, key, value, segment_ids)
    _check_mask(query.shape[1], key.shape[1], causal, window, segment_ids)
    mask = Mask(causal, window)
    if 0 in (*query.shape[:3], key.shape[1]):
        return jnp.zeros((*query.shape[:3], value.shape[3]), value.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    match implementation:
        case None | "blocked":
            return _blocked.attention(query, key, value, segment_ids, mask, factor)
        case "reference":
            return _reference(query, key, value, segment_ids, mask, factor)
        case _:
            raise ValueError(f"implementation={implementation!r}; expected None, 'blocked' or 'reference'")


def _check(query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array | None) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; expected a float")
    if segment_ids is not None and not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids have dtype {segment_ids.dtype}; expected integers")
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"{shapes}; expected [batch, time, heads, dim] each")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ValueError(f"{shapes}; key and value share batch, source and kv_heads, query and key batch and key_dim")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"{shapes}; heads {query.shape[2]} must be a multiple of kv_heads {key.shape[2]}")
    if segment_ids is not None and segment_ids.shape != query.shape[:2]:
        raise ValueError(f"segment_ids have shape {segment_ids.shape}; expected {query.shape[:2]}")


def _check_mask(time: int, source: int, causal: bool, window: int | None, segment_ids: jax.Array | None) -> None:
    if (causal or segment_ids is not None) and time != source:
        raise ValueError(f"time {time} != source {source}; causal and segment masks need equal lengths")
    if window is not None and (window < 1 or not causal):
        raise ValueError(f"window={window}, causal={causal}; expected a window of at least 1 with causal=True")


def _reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array | None,
    mask: Mask,
    scale: float,
) -> jax.Array:
    batch, time, heads, _ = query.shape
    source, kv_heads = key.shape[1:3]
    wide = exact(query.dtype)
    grouped = query.reshape(batch, time, kv_heads, heads // kv_heads, -1)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide) * scale
    keep = allowed(mask, (0, time), (0, source), segment_ids)
    if keep is not None:
        keep = jnp.broadcast_to(keep, (batch, time, source))[:, None, None]
        logits = jnp.where(keep, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if keep is not None:
        weights = jnp.where(keep, weights, jnp.zeros((), wide))
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return out.reshape(batch, time, heads, -1)
