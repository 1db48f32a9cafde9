"""The pages of a cache: making them, writing new tokens, reading rows back; float, or int8 and float8 with scales.

A pool is ``[pages, kv_heads, page_size, dim]``, or ``[pages, page_size, dim]`` where all heads share one key (a
latent). A quantized pool is a `QuantizedArray` with one scale per token and head. On CPUs prefer
int8: there XLA converts a whole pool of float8 to read from it.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dovetail_kernels._dtypes import int32
from dovetail_protocols import QuantizedArray

__all__ = ["Pool", "empty_pages", "gather_pages", "page_slots", "update_pages"]

Pool: TypeAlias = Float[Array, "..."] | QuantizedArray
"""Pages of one layer's keys, values or latents."""
QUANTIZED = ("int8", "float8_e4m3fn")


def empty_pages(shape: tuple[int, ...], dtype: Any, scale_dtype: Any = jnp.float32) -> Pool:
    """Return a pool of zeros.

    Args:
        shape: ``(pages, kv_heads, page_size, dim)`` or ``(pages, page_size, dim)``.
        dtype: a float, or int8 or float8_e4m3fn for a quantized pool.
        scale_dtype: of a quantized pool's scales, and of what it dequantizes to.

    Raises:
        ValueError: another rank.
        TypeError: another dtype.

    >>> empty_pages((4, 2, 16, 64), jnp.int8).scale.shape
    (4, 2, 16, 1)
    """
    if len(shape) not in (3, 4):
        raise ValueError(f"shape={shape}; expected (pages, kv_heads, page_size, dim) or (pages, page_size, dim)")
    dtype = jnp.dtype(dtype)
    if dtype.name not in QUANTIZED:
        if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
            raise TypeError(f"dtype={dtype.name}; expected a float of 16 bits or more, or one of {QUANTIZED}")
        return jnp.zeros(shape, dtype)
    scale = jnp.zeros((*shape[:-1], 1), scale_dtype)
    return QuantizedArray(jnp.zeros(shape, dtype), scale, dtype=jnp.dtype(scale_dtype))


def update_pages(
    pages: Pool,
    new: Float[Array, "tokens *kv_heads dim"],
    page_ids: Int[Array, " tokens"],
    slots: Int[Array, " tokens"],
) -> Pool:
    """Write tokens to their places; a quantized pool rounds them with a scale of their own.

    Under ``jit`` with the pool donated it is changed in place. A token whose page or slot is negative or does not exist
    is dropped: that is how padding is written. Of tokens for the same place any one stays.

    Args:
        pages: the pool.
        new: what to write, rounded to the pool's dtype.
        page_ids: the page of each token.
        slots: its place in the page.

    Raises:
        ValueError: shapes that do not fit.

    >>> pool = empty_pages((4, 1, 2, 3), jnp.float32)
    >>> pool = update_pages(pool, jnp.ones((2, 1, 3)), jnp.array([3, -1]), jnp.array([1, 0]))
    >>> float(pool[3, 0, 1].sum()), float(pool.sum())
    (3.0, 3.0)
    """
    expected = (pages.shape[0], *new.shape[1:-1], pages.shape[-2], new.shape[-1])
    if new.ndim != pages.ndim - 1 or pages.shape != expected or not len(new) == len(page_ids) == len(slots):
        raise ValueError(
            f"pages {pages.shape}, new {new.shape}, page_ids {page_ids.shape}, slots {slots.shape}; "
            "expected [pages, kv_heads, page_size, dim], [tokens, kv_heads, dim], [tokens] and [tokens]"
        )
    page_ids, slots = int32(page_ids), int32(slots)
    if not isinstance(pages, QuantizedArray):
        return _written(pages, new, page_ids, slots)
    check_scales(pages)
    values, scale = _quantized(new, pages.qvalue.dtype, pages.scale.dtype)
    return QuantizedArray(
        _written(pages.qvalue, values, page_ids, slots),
        _written(pages.scale, scale, page_ids, slots),
        None,
        pages.dtype,
    )


def page_slots(
    tables: Int[Array, "rows pages"], rows: Int[Array, " tokens"], positions: Int[Array, " tokens"], page_size: int
) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"]]:
    """Return the page and the slot of each token, for `update_pages`; page -1 where it has none.

    Args:
        tables: the pages of each row in the order of positions.
        rows: which row each token is of; negative for padding.
        positions: of each token in its row.
        page_size: tokens per page.

    Raises:
        ValueError: `page_size` below 1.

    >>> page_slots(jnp.array([[5, 2]]), jnp.array([0, 0, -1]), jnp.array([1, 7, 0]), 4)[0].tolist()
    [5, 2, -1]
    """
    if page_size < 1:
        raise ValueError(f"page_size={page_size}; expected at least 1")
    (count, width), (tables, rows, positions) = tables.shape, (int32(x) for x in (tables, rows, positions))
    pages, slots = positions // page_size, positions % page_size
    exists = (rows >= 0) & (rows < count) & (pages >= 0) & (pages < width)
    if 0 in tables.shape:
        return jnp.full_like(rows, -1), slots
    return jnp.where(exists, tables[jnp.clip(rows, 0, count - 1), jnp.clip(pages, 0, width - 1)], -1), slots


def gather_pages(
    pages: Pool, tables: Int[Array, "rows pages"], lengths: Int[Array, " rows"]
) -> Float[Array, "rows *kv_heads places dim"]:
    """Return copies of rows' pages, dequantized; 0 beyond their lengths, whatever is there.

    Args:
        pages: the pool.
        tables: the pages of each row; what is not needed for its length may be anything.
        lengths: tokens per row; in a pool without pages, what they need is 0.

    >>> pool = jnp.arange(12.0).reshape(3, 1, 2, 2)
    >>> gather_pages(pool, jnp.array([[2, 0]]), jnp.array([3])).tolist()
    [[[[8.0, 9.0], [10.0, 11.0], [0.0, 1.0], [0.0, 0.0]]]]
    """
    tables, lengths = int32(tables), int32(lengths)
    if not isinstance(pages, QuantizedArray):
        return _gathered(pages, tables, lengths)
    held, scale = (_gathered(x, tables, lengths) for x in (pages.qvalue, pages.scale))
    return (held.astype(scale.dtype) * scale).astype(pages.dtype)


def _gathered(pool: jax.Array, tables: jax.Array, lengths: jax.Array) -> jax.Array:
    if not pool.shape[0]:
        pool = jnp.zeros_like(pool, shape=(1, *pool.shape[1:]))
    held = jnp.moveaxis(pool.at[tables].get(mode="clip"), 1, -3)  # [rows, kv_heads, pages, page_size, dim]
    held = held.reshape(*held.shape[:-3], held.shape[-3] * held.shape[-2], held.shape[-1])
    own = jnp.arange(held.shape[-2], dtype=jnp.int32) < lengths[:, None]
    own = own.reshape(len(lengths), *(1,) * (held.ndim - 3), -1, 1)
    return jnp.where(own, held, jnp.zeros((), held.dtype))


def check_scales(pages: QuantizedArray) -> None:
    if pages.scale.shape != (*pages.shape[:-1], 1) or pages.zero_point is not None:
        raise ValueError(
            f"scales {pages.scale.shape} of pages {pages.shape}; expected {(*pages.shape[:-1], 1)}, no zero points"
        )


def _quantized(new: jax.Array, dtype: Any, scale_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return values and scales so that the largest value of a token and head is the dtype's largest.

    Values are rounded with the scale as it is kept, which in 16 bits may be too small for the largest by its rounding.
    """
    new = new.astype(jnp.float32)
    integer = jnp.issubdtype(dtype, jnp.integer)
    most = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    scale = (jnp.max(jnp.abs(new), -1, keepdims=True) / most).astype(scale_dtype)
    kept = scale.astype(jnp.float32)
    scaled = jnp.clip(new / jnp.where(kept > 0, kept, jnp.ones((), kept.dtype)), -most, most)
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale


def _written(pool: jax.Array, new: jax.Array, page_ids: jax.Array, slots: jax.Array) -> jax.Array:
    new = new.astype(pool.dtype)
    if pool.dtype.itemsize < 4 and jnp.issubdtype(pool.dtype, jnp.floating):
        return jax.lax.platform_dependent(pool, new, page_ids, slots, cpu=_one_by_one, default=_scattered)
    return _scattered(pool, new, page_ids, slots)


def _scattered(pool: jax.Array, new: jax.Array, page_ids: jax.Array, slots: jax.Array) -> jax.Array:
    """Scatter tokens into a pool; a negative index would count from the end."""
    inside = (page_ids >= 0) & (slots >= 0)
    ids = jnp.where(inside, page_ids, pool.shape[0])
    at = (ids, slots) if pool.ndim == 3 else (ids, slice(None), slots)
    return pool.at[at].set(new, mode="drop")


def _one_by_one(pool: jax.Array, new: jax.Array, page_ids: jax.Array, slots: jax.Array) -> jax.Array:
    """Write one token after the other: XLA for CPUs converts a whole pool of narrow floats to scatter to it."""
    inside = (page_ids >= 0) & (page_ids < pool.shape[0]) & (slots >= 0) & (slots < pool.shape[-2])

    def write(index: Any, pool: jax.Array) -> jax.Array:
        at = [jnp.zeros((), jnp.int32)] * pool.ndim
        at[0], at[-2] = page_ids[index], slots[index]
        return jax.lax.cond(
            inside[index], lambda: jax.lax.dynamic_update_slice(pool, new[index].reshape(block), at), lambda: pool
        )

    block = (1, *pool.shape[1:-2], 1, pool.shape[-1])
    return jax.lax.fori_loop(0, len(page_ids), write, pool)
