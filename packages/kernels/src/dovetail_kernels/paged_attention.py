"""Attention over a paged cache: prefill, decode and mixtures of them, over pages that tables name (arXiv:2309.06180).

``reference`` copies every row's pages and is the textbook form. ``blocked`` works on those chunks of pages that some
query needs, so that its work follows the lengths of the rows and not the width of the tables.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dovetail_kernels import _paged
from dovetail_kernels._dtypes import exact, int32
from dovetail_kernels.attention import Attended
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted
from dovetail_kernels.paged_cache import Pool, check_scales, gather_pages
from dovetail_protocols import QuantizedArray

__all__ = ["PAGED_ATTENTION", "paged_attention", "paged_latent_attention"]


def paged_attention(
    query: Float[Array, "tokens heads key_dim"],
    key_pages: Pool,
    value_pages: Pool,
    tables: Int[Array, "rows pages_per_row"],
    lengths: Int[Array, " rows"],
    *,
    rows: Int[Array, " tokens"] | None = None,
    positions: Int[Array, " tokens"] | None = None,
    window: int | None = None,
    sinks: Float[Array, " heads"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Wanted = None,
) -> Any:
    """Attend to the cached tokens of each query's row, with grouped heads as in `attention`.

    A token at position p sees what its row has cached at positions 0 to p, less than the row's length, and in a window
    more than ``p - window``. Write new tokens with `update_pages` first where they are to see themselves. Without
    `rows` every row has the same number k of tokens, one after the other (k = 1: decode), at its last k positions;
    this is the faster form. A token of no row, and one that sees nothing, gives 0 with a log-sum-exp of -inf (or that
    of its sink). What no token of a row may see, in its pages or in others, may be NaN. No reverse-mode gradients
    except by ``reference``.

    Args:
        query: the tokens of all rows.
        key_pages: ``[pages, kv_heads, page_size, key_dim]``, floats or quantized as `update_pages` does.
        value_pages: likewise; their size may differ from the keys'.
        tables: the pages of each row in the order of positions; what its length does not need may be anything.
        lengths: how many tokens each row has cached, at most what its table holds.
        rows: which row each token is of, in any order; negative for padding.
        positions: of each token; needed with `rows`.
        window: how many positions a token sees, its own included.
        sinks: a logit per head that takes part in the softmax only (arXiv:2309.17453).
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        scale: factor of the logits, default ``key_dim ** -0.5``.
        return_lse: return `Attended`, without its batch axis, for `merge`.
        implementation: a name, an own implementation, or several in order; None chooses.

    Returns:
        ``[tokens, heads, value_dim]`` in the dtype of the query.

    Raises:
        ValueError: shapes that do not fit, `rows` without `positions`, a window, cap or implementation that is none.
        TypeError: a query that is no float, or tables, lengths, rows or positions that are no integers.

    >>> pool = jnp.ones((8, 1, 16, 4)); tables = jnp.array([[3, 5], [7, 0]])
    >>> paged_attention(jnp.ones((2, 2, 4)), pool, pool, tables, jnp.array([20, 3])).shape
    (2, 2, 4)
    """
    _check(query, key_pages, value_pages)
    return _attend(
        query, key_pages, value_pages, tables, lengths, rows, positions, window=window, sinks=sinks, softcap=softcap,
        scale=scale, value_dim=value_pages.shape[3], return_lse=return_lse, implementation=implementation,
    )  # fmt: skip


def paged_latent_attention(
    query: Float[Array, "tokens heads latent_and_rope"],
    pages: Pool,
    tables: Int[Array, "rows pages_per_row"],
    lengths: Int[Array, " rows"],
    *,
    latent_dim: int,
    scale: float,
    rows: Int[Array, " tokens"] | None = None,
    positions: Int[Array, " tokens"] | None = None,
    return_lse: bool = False,
    implementation: Wanted = None,
) -> Any:
    """Multi-head latent attention with absorbed projections over a paged cache (DeepSeek-V2, arXiv:2405.04434).

    All heads share one key, ``[latent, rope]``, whose latent part is the value too. The rest is as in
    `paged_attention`.

    Args:
        query: per head the query times the key's up-projection, then its rotary part.
        pages: ``[pages, page_size, latent_dim + rope_dim]``, floats or quantized as `update_pages` does.
        tables: as in `paged_attention`, and so are `lengths`, `rows`, `positions`, `return_lse`, `implementation`.
        lengths: tokens per row.
        latent_dim: size of the latent.
        scale: factor of the logits, that of the head's dim before absorption.
        rows: which row each token is of.
        positions: of each token.
        return_lse: return `Attended`.
        implementation: a choice.

    Returns:
        Weighted latents ``[tokens, heads, latent_dim]``, to be multiplied with the value's up-projection.

    Raises:
        ValueError: as `paged_attention`, or a `latent_dim` that is not within the pages' last axis.
        TypeError: as `paged_attention`.

    >>> pool = jnp.ones((8, 16, 6)); tables = jnp.array([[3, 5]])
    >>> paged_latent_attention(jnp.ones((1, 2, 6)), pool, tables, jnp.array([20]), latent_dim=4, scale=0.5).shape
    (1, 2, 4)
    """
    if len(pages.shape) != 3 or not 0 < latent_dim <= pages.shape[2]:
        raise ValueError(f"pages {pages.shape}, {latent_dim=}; expected [pages, page_size, latent_dim + rope_dim]")
    keys = jax.tree.map(lambda x: x[:, None], pages)
    _check(query, keys, None)
    return _attend(
        query, keys, None, tables, lengths, rows, positions, window=None, sinks=None, softcap=None, scale=scale,
        value_dim=latent_dim, return_lse=return_lse, implementation=implementation,
    )  # fmt: skip


def _attend(
    query: jax.Array,
    key_pages: Any,
    value_pages: Any,
    tables: jax.Array,
    lengths: jax.Array,
    rows: jax.Array | None,
    positions: jax.Array | None,
    *,
    implementation: Wanted,
    **options: Any,
) -> Any:
    window, sinks, softcap, scale = (options[name] for name in ("window", "sinks", "softcap", "scale"))
    _check_rows(query, tables, lengths, rows, positions)
    _check_options(query, window, sinks, softcap)
    tables, lengths = int32(tables), int32(lengths)
    rows, positions = (None if x is None else int32(x) for x in (rows, positions))
    if 0 in (*query.shape[:2], *tables.shape, *key_pages.shape[:3]):
        wide = exact(query.dtype)
        out = jnp.zeros((*query.shape[:2], options["value_dim"]), query.dtype)
        lse = jnp.full(query.shape[:2], -jnp.inf, wide)
        lse = lse if sinks is None else jnp.maximum(lse, sinks.astype(wide))
    else:
        if positions is None:
            size = len(query) // len(lengths)
            positions = (lengths[:, None] - size + jnp.arange(size, dtype=jnp.int32)).reshape(-1)
        options["scale"] = float(query.shape[-1] ** -0.5 if scale is None else scale)
        out, lse = PAGED_ATTENTION(
            implementation,
            query=query,
            key_pages=key_pages,
            value_pages=value_pages,
            tables=tables,
            lengths=lengths,
            rows=rows,
            positions=positions,
            **options,
        )
    return Attended(out, lse) if options["return_lse"] else out


def _check(query: jax.Array, keys: Any, values: Any) -> None:
    shapes = f"query {query.shape}, key_pages {keys.shape}" + (
        "" if values is None else f", value_pages {values.shape}"
    )
    if not jnp.issubdtype(query.dtype, jnp.floating):
        raise TypeError(f"query has dtype {query.dtype}; expected a float")
    for pages in (keys, values):
        if isinstance(pages, QuantizedArray):
            check_scales(pages)
        elif pages is not None and not jnp.issubdtype(pages.dtype, jnp.floating):
            raise TypeError(f"pages have dtype {pages.dtype}; expected a float, or a QuantizedArray")
    if query.ndim != 3 or len(keys.shape) != 4 or (values is not None and len(values.shape) != 4):
        raise ValueError(f"{shapes}; expected [tokens, heads, dim] and [pages, kv_heads, page_size, dim]")
    if query.shape[2] != keys.shape[3] or (values is not None and values.shape[:3] != keys.shape[:3]):
        raise ValueError(f"{shapes}; query and keys share key_dim, keys and values pages, kv_heads and page_size")
    if keys.shape[1] == 0 or query.shape[1] % keys.shape[1]:
        raise ValueError(f"{shapes}; heads {query.shape[1]} must be a multiple of kv_heads {keys.shape[1]}")


def _check_rows(query: Any, tables: Any, lengths: Any, rows: Any, positions: Any) -> None:
    for name, x in (("tables", tables), ("lengths", lengths), ("rows", rows), ("positions", positions)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name}: dtype {x.dtype}; expected integers")
    if tables.ndim != 2 or lengths.shape != tables.shape[:1]:
        raise ValueError(f"tables {tables.shape}, lengths {lengths.shape}; expected [rows, pages_per_row] and [rows]")
    for name, x in (("rows", rows), ("positions", positions)):
        if x is not None and x.shape != query.shape[:1]:
            raise ValueError(f"{name} have shape {x.shape}; expected {query.shape[:1]}, one per token")
    if rows is not None and positions is None:
        raise ValueError("rows without positions; expected the position of every token, or no rows")
    if rows is None and len(query) % max(1, len(lengths)):
        raise ValueError(f"{len(query)} tokens of {len(lengths)} rows; expected as many of each row, or rows=")


def _check_options(query: Any, window: Any, sinks: Any, softcap: Any) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window={window}; expected at least 1 or None")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks have shape {sinks.shape}; expected {query.shape[1:2]}, one per head")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; expected a positive number or None")


def _reference(
    *,
    query: jax.Array,
    key_pages: Any,
    value_pages: Any,
    tables: jax.Array,
    lengths: jax.Array,
    rows: jax.Array | None,
    positions: jax.Array,
    window: int | None,
    sinks: jax.Array | None,
    softcap: float | None,
    scale: float,
    value_dim: int,
    return_lse: bool,
) -> tuple[jax.Array, jax.Array | None]:
    wide, (time, heads, _), count = exact(query.dtype), query.shape, len(lengths)
    if rows is None:
        rows = jnp.repeat(jnp.arange(count, dtype=jnp.int32), time // count)
    safe = jnp.clip(rows, 0, count - 1)
    places, at = jnp.arange(tables.shape[1] * key_pages.shape[2], dtype=jnp.int32), positions[:, None]
    sees = (places <= at) & (places < lengths[safe][:, None]) & (rows == safe)[:, None]
    sees = sees if window is None else sees & (places > at - window)

    def copied(pages: Any) -> jax.Array:
        return jnp.where(sees[:, None, :, None], gather_pages(pages, tables, lengths).astype(wide)[safe], 0)

    keys = copied(key_pages)
    values = keys if value_pages is None else copied(value_pages)
    grouped = query.astype(wide).reshape(time, keys.shape[1], -1, keys.shape[3])
    z = jnp.einsum("tkgd,tksd->tkgs", grouped, keys).reshape(time, heads, -1) * scale
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    sees = sees[:, None]
    z = jnp.where(sees, z, -jnp.inf)
    extra = jnp.full((heads, 1), -jnp.inf, wide) if sinks is None else sinks.astype(wide)[:, None]
    peak = jnp.maximum(jnp.max(z, -1, keepdims=True), extra)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isneginf(peak), jnp.zeros((), wide), peak))
    p = jnp.where(sees, jnp.exp(jnp.where(sees, z - peak, 0)), 0)
    total = jnp.sum(p, -1, keepdims=True) + jnp.exp(extra - peak)
    some = jnp.where(total == 0, jnp.ones((), wide), total)
    weights = (p / some).reshape(*grouped.shape[:3], -1)
    out = jnp.einsum("tkgs,tksd->tkgd", weights, values[..., :value_dim]).reshape(time, heads, -1)
    lse = jnp.where(total == 0, -jnp.inf, peak + jnp.log(some))[..., 0] if return_lse else None
    return out.astype(query.dtype), lse


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    names = ("query", "key_pages", "tables", "window", "softcap", "rows")
    query, keys, tables, window, softcap, rows = (call.arguments[name] for name in names)
    stored = jax.tree.leaves(keys)[0]
    exactly = {
        "dtype": f"{query.dtype} of {stored.dtype}",
        "group": query.shape[1] // stored.shape[1],
        "key_dim": query.shape[2],
        "value_dim": call.arguments["value_dim"],
        "page_size": stored.shape[2],
        "latent": call.arguments["value_pages"] is None,
        "window": window,
        "softcap": softcap is not None,
        "ragged": rows is not None,
    }
    return exactly, {"tokens": query.shape[0], "rows": tables.shape[0], "places": tables.shape[1] * stored.shape[2]}


PAGED_ATTENTION = Operation(
    "paged_attention",
    (
        Implementation("blocked", _paged.attention, configs=_paged.configs, gradient="forward mode"),
        Implementation("reference", _reference),
    ),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 1e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: (PartitionSpec(*axes["query"][:2]),) * 2,
)
