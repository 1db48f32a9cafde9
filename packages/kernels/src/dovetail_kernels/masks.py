"""Which keys a query may see: small masks that combine with ``&`` and ``|``.

A mask is a pytree. What it knows without looking at an array (causal, window, chunks, prefix) tells at trace time which
keys a block of queries needs at all; what its arrays tell (segments, lengths, traced offsets) is found when it runs.

Masks that compare positions take the position of query row r as ``query_offset + r`` and of key column c as
``key_offset + c``; `segments`, `lengths` and `dense` count rows and columns.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Integer

from dovetail_kernels._dtypes import int32
from dovetail_kernels._mask import Mask, Tile
from dovetail_kernels._mask_arrays import Dense, Lengths, Prefixes, Segments
from dovetail_kernels._mask_positions import Causal, Chunked, Prefix, Window

__all__ = ["Mask", "Tile", "causal", "chunked", "dense", "lengths", "prefix", "segments", "window"]


def causal() -> Mask:
    """Let queries see keys at their own and earlier positions.

    >>> print((causal() & window(4096)) | prefix(3))
    (causal() & window(4096)) | prefix(3)
    """
    return Causal()


def window(left: int, right: int | None = None) -> Mask:
    """Let queries see keys fewer than `left` positions before them, and fewer than `right` after them if that is given.

    ``causal() & window(w)`` is the usual sliding window: a query sees itself and the w - 1 keys before it.

    Raises:
        ValueError: a size below 1.
    """
    for name, size in (("left", left), ("right", right)):
        if size is not None and size < 1:
            raise ValueError(f"window: {name}={size}; expected at least 1, which is the query's own position")
    return Window(left, right)


def chunked(size: int) -> Mask:
    """Let queries see keys of their own chunk of `size` positions.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"chunked({size}); expected a size of at least 1")
    return Chunked(size)


def prefix(length: int | np.integer[Any] | Integer[Array, ""] | Integer[Array, " batch"]) -> Mask:
    """Let every query see the first keys: those at positions below `length`.

    With ``causal() |`` before it this is the mask of a prefix LM.

    Raises:
        ValueError: a negative length.
        TypeError: an array that is not of integers.
    """
    if isinstance(length, (int, np.integer)):
        if length < 0:
            raise ValueError(f"prefix({length}); expected at least 0")
        return Prefix(int(length))
    return Prefixes(int32(_integers("prefix", length)))


def segments(query_ids: Integer[Array, "batch time"], key_ids: Integer[Array, "batch source"] | None = None) -> Mask:
    """Let queries see keys of their own segment; segment 0 is padding, which sees and is seen by nothing.

    Args:
        query_ids: the segment of every query.
        key_ids: the segment of every key; default `query_ids`.

    Raises:
        TypeError: ids that are not arrays of integers.
    """
    ids = [query_ids] if key_ids is None else [query_ids, key_ids]
    ids = [_integers(f"segments: {name}", x) for name, x in zip(("query_ids", "key_ids"), ids, strict=False)]
    wide = jnp.int64 if any(x.dtype.itemsize == 8 for x in ids) else jnp.int32
    ids = [x.astype(wide) for x in ids]
    return Segments(ids[0], ids[-1])


def lengths(query: Integer[Array, " batch"] | None = None, key: Integer[Array, " batch"] | None = None) -> Mask:
    """Let only the first `query` rows see anything, and only the first `key` columns be seen.

    Raises:
        ValueError: neither is given.
        TypeError: lengths that are not arrays of integers.
    """
    if query is None and key is None:
        raise ValueError("lengths(): expected query=, key= or both")
    given = (None if x is None else _integers(f"lengths: {n}", x) for n, x in (("query", query), ("key", key)))
    return Lengths(*(None if x is None else int32(x) for x in given))


def dense(allowed: Bool[Array, "..."]) -> Mask:
    """Take any mask as an array, true where a query may see a key.

    Its shape is ``[time, source]``, or ``[batch, heads, time, source]`` where batch and heads may be 1. It
    costs its memory, and no block of keys can be skipped.

    Raises:
        TypeError: the array is not boolean.
    """
    if allowed.dtype != jnp.bool_:
        raise TypeError(f"dense: dtype {allowed.dtype}; expected bool, true where a query may see a key")
    return Dense(allowed[None, None] if allowed.ndim == 2 else allowed)


def _integers(name: str, array: Any) -> Any:
    if not isinstance(array, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is {array!r}; expected an array of integers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: dtype {array.dtype}; expected integers")
    return jnp.asarray(array)
