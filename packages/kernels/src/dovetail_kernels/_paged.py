"""Paged attention by items of work: a block of query tokens of one row, and a chunk of that row's keys.

Only the items that some query needs exist; they stand in one line, block after block. A fixed number of lanes take
equal shares of the line, and every step gathers the pages of one chunk per lane and adds them to the lane's running
softmax. A block that several lanes work on is merged at the end (Dao et al., flash decoding). So the work follows the
lengths of the rows, not the width of their tables. Rows never meet in a product: what is NaN in one stays there.

Rows with few query tokens have blocks of their own size, so that decoding rows are not padded to those of a prefill.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.operation import Call
from dovetail_protocols import QuantizedArray

__all__ = ["attention", "configs"]

SIZES, LANES = (1, 64), (28, 8)
KEYS = 64


class How(NamedTuple):
    """The static part of a call."""

    scale: float
    softcap: float | None
    window: int | None
    value_dim: int
    chunk: int
    lanes: int


class Pages(NamedTuple):
    """The cache: ``[pages, kv_heads, page_size, dim]``, scales ``[pages, kv_heads, page_size]``, tables of chunks."""

    keys: Any
    key_scales: Any
    values: Any
    value_scales: Any
    tables: Any
    """int ``[rows, chunks, pages per chunk]``"""


class Blocks(NamedTuple):
    """Query tokens in blocks of one row each; a token that does not exist sees nothing."""

    rows: Any
    """int ``[blocks]``"""
    tokens: Any
    """int ``[blocks, size]``"""
    first: Any
    """int ``[blocks, size]``: the first position that a token sees."""
    last: Any
    """int ``[blocks, size]``: the last one; before `first` where it sees nothing."""


class Line(NamedTuple):
    """All items in a line: block b has those from ``ends[b] - counts[b]`` on, of the chunks from ``chunks[b]`` on."""

    counts: Any
    ends: Any
    chunks: Any
    ranks: Any
    """int ``[blocks]``: how many blocks with items stand before it."""
    share: Any
    """int ``[]``: items per lane."""


def configs(call: Call) -> Iterator[dict[str, Any]]:
    """Return configurations worth trying."""
    ragged = call.arguments["rows"] is not None
    few, many = ((8, 16, 24, 32), (4, 8)) if call.platform == "cpu" else ((16, 64, 256), (16, 64))
    for keys in (64, 128, 256):
        for one in few:
            for more, sizes in itertools.product(many, ((1, 32), (1, 128))) if ragged else [(LANES[1], SIZES)]:
                yield {"keys": keys, "lanes": (one, more), "sizes": sizes}


def attention(
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
    sizes: tuple[int, ...] = SIZES,
    keys: int = KEYS,
    lanes: tuple[int, ...] = LANES,
) -> tuple[jax.Array, jax.Array | None]:
    """See `dovetail_kernels.paged_attention`; shapes are checked there.

    A configuration is the sizes of blocks of query tokens, ascending, the number of lanes for blocks of each size, and
    the keys of a chunk.
    """
    arrays = (query, key_pages, value_pages, tables, lengths, rows, positions, sinks)
    leaves, tree = jax.tree.flatten(arrays)
    query, key_pages, value_pages, tables, lengths, rows, positions, sinks = jax.tree.unflatten(tree, alike(*leaves))
    page_size = key_pages.shape[2]
    per_chunk = max(1, min(keys // page_size, tables.shape[1]))
    how = How(scale, softcap, window, value_dim, per_chunk * page_size, lanes[-1])
    pages = _pages(key_pages, value_pages, tables, per_chunk)
    lengths = jnp.minimum(lengths, tables.shape[1] * page_size)
    if rows is None:
        size = len(query) // len(lengths)
        how = how._replace(lanes=next((n for most, n in zip(sizes, lanes, strict=True) if size <= most), lanes[-1]))
        every = jnp.arange(len(query), dtype=jnp.int32).reshape(-1, size)
        blocks = _blocks(jnp.arange(len(lengths), dtype=jnp.int32), every, positions, lengths, window)
        out, lse = _attend(how, query, pages, blocks, sinks)
        out, lse = (x.transpose(0, 3, 1, 2, 4).reshape(*query.shape[:2], -1) for x in (out, lse))
    else:
        out, lse = _ragged(how, query, pages, lengths, rows, positions, sinks, sizes, lanes)
    return out.astype(query.dtype), lse[..., 0] if return_lse else None


def _pages(key_pages: Any, value_pages: Any, tables: jax.Array, per_chunk: int) -> Pages:
    """Return the parts of the cache; a table is clipped to pages that exist, and filled up to whole chunks."""
    parts = list[Any]()
    for pool in (key_pages, value_pages):
        parts += (pool.qvalue, pool.scale[..., 0]) if isinstance(pool, QuantizedArray) else (pool, None)
    tables = jnp.clip(tables, 0, key_pages.shape[0] - 1)
    tables = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % per_chunk)))
    keys, key_scales, values, value_scales = parts
    return Pages(keys, key_scales, values, value_scales, tables.reshape(len(tables), -1, per_chunk))


def _blocks(rows: Any, tokens: Any, positions: Any, lengths: Any, window: int | None, exists: Any = None) -> Blocks:
    at = positions[tokens]
    last = jnp.minimum(at, lengths[rows][:, None] - 1)
    last = last if exists is None else jnp.where(exists, last, -1)
    first = jnp.zeros_like(at) if window is None else jnp.maximum(at - window + 1, 0)
    return Blocks(rows, tokens, first, last)


def _ragged(
    how: How,
    query: jax.Array,
    pages: Pages,
    lengths: jax.Array,
    rows: jax.Array,
    positions: jax.Array,
    sinks: jax.Array | None,
    sizes: tuple[int, ...],
    lanes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Attend with any number of tokens per row: sort them by row, and cut each row into blocks of a fitting size."""
    time, count = len(query), len(lengths)
    rows = jnp.where((rows < 0) | (rows >= count), count, rows)
    order = jnp.argsort(rows, stable=True)
    per_row = jnp.sum(rows[:, None] == jnp.arange(count + 1, dtype=jnp.int32), 0, dtype=jnp.int32)
    starts = jnp.cumsum(per_row) - per_row
    within = jnp.zeros_like(rows).at[order].set(jnp.arange(time, dtype=jnp.int32)) - starts[rows]
    out = jnp.zeros_like(query, exact(query.dtype), shape=(*query.shape[:2], how.value_dim))
    lse = _sunk(jnp.full_like(out, -jnp.inf, shape=(*query.shape[:2], 1)), sinks)
    before = 0
    for index, size in enumerate(sizes):
        final = index == len(sizes) - 1
        limit = min(count, time // (before + 1))  # rows with more tokens than the size before
        if not limit:
            break
        chosen = (per_row > before) & (final | (per_row <= size))
        chosen = chosen.at[count].set(False)
        blocks_of = jnp.where(chosen, -(-per_row // size), 0)
        ends = jnp.cumsum(blocks_of)
        total = limit + (time // size if final else 0)
        every = jnp.arange(total, dtype=jnp.int32)
        owner = jnp.minimum(_place(ends, every), count - 1)
        offset = ((every - ends[owner] + blocks_of[owner]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
        exists = (offset < per_row[owner][:, None]) & (every < ends[-1])[:, None]
        tokens = order[jnp.clip(starts[owner][:, None] + offset, 0, time - 1)]
        blocks = _blocks(owner, tokens, positions, lengths, how.window, exists)
        found = _attend(how._replace(lanes=lanes[index]), query, pages, blocks, sinks)
        block = jnp.clip((ends - blocks_of)[rows] + within // size, 0, total - 1)
        mine, (some, its) = chosen[rows][:, None, None], (_picked(x, block, within % size) for x in found)
        out, lse, before = jnp.where(mine, some, out), jnp.where(mine, its, lse), size
    return out, lse


def _picked(x: jax.Array, block: jax.Array, offset: jax.Array) -> jax.Array:
    """Take tokens ``[tokens, heads, dim]`` of ``[blocks, kv_heads, group, size, dim]``."""
    return x[block, :, :, offset].reshape(len(block), -1, x.shape[-1])


def _place(ends: jax.Array, items: jax.Array) -> jax.Array:
    """Return how many of the ascending `ends` are at or before each item."""
    return jnp.sum(ends <= items[:, None], 1, dtype=jnp.int32)


def _line(how: How, blocks: Blocks) -> Line:
    sees = blocks.first <= blocks.last
    low = jnp.min(jnp.where(sees, blocks.first, jnp.iinfo(jnp.int32).max), 1) // how.chunk
    high = jnp.max(jnp.where(sees, blocks.last, -1), 1) // how.chunk + 1
    counts = jnp.maximum(high - low, 0)
    ends, ranks = jnp.cumsum(counts), jnp.cumsum((counts > 0).astype(jnp.int32)) - 1
    return Line(counts, ends, low, ranks, -(-ends[-1] // how.lanes))


class State(NamedTuple):
    """A running softmax per lane, or one per slot: ``[lanes or slots, kv_heads, group * size, dim or 1]``."""

    peak: Any
    total: Any
    out: Any

    @classmethod
    def empty(cls, like: jax.Array, count: int, dim: int) -> "State":
        """Return the states before any key."""
        wide, shape = exact(like.dtype), (count, *like.shape[1:3])
        zero = jnp.zeros_like(like, wide, shape=(*shape, 1))
        return cls(zero - jnp.inf, zero, jnp.zeros_like(like, wide, shape=(*shape, dim)))


def _attend(how: How, query: jax.Array, pages: Pages, blocks: Blocks, sinks: Any) -> tuple[jax.Array, jax.Array]:
    """Return ``[blocks, kv_heads, group, size, value_dim]`` and the log-sum-exp, ``[..., 1]``."""
    (count, size), kv_heads, group = blocks.tokens.shape, pages.keys.shape[1], query.shape[1] // pages.keys.shape[1]
    how = how._replace(lanes=min(how.lanes, count * pages.tables.shape[1]))
    q = query[blocks.tokens].reshape(count, size, kv_heads, group, -1).transpose(0, 2, 3, 1, 4)
    q = q.reshape(count, kv_heads, group * size, -1)
    line, lanes = _line(how, blocks), jnp.arange(how.lanes, dtype=jnp.int32)

    def step(index: Any, carry: tuple[jax.Array, State, State]) -> tuple[jax.Array, State, State]:
        previous, state, slots = carry
        wanted = lanes * line.share + index
        items = jnp.minimum(wanted, line.ends[-1] - 1)  # a lane that is done stays at the last one
        block = _place(line.ends, items)
        begins = line.ends[block] - line.counts[block]
        chunk = line.chunks[block] + items - begins
        seen = _seen(how, blocks, block, chunk) & (wanted == items)[:, None, None]
        state = jax.tree.map(lambda x, y: jnp.where(_each(block != previous), x, y), empty, state)
        state = _add(how, state, q[block], pages, pages.tables[blocks.rows[block], chunk], seen)
        into = line.ranks[block] + lanes
        slots = jax.tree.map(
            lambda all, own: all.at[into].set(own, mode="promise_in_bounds", unique_indices=True), slots, state
        )
        return block, state, slots

    empty = State.empty(q, how.lanes, how.value_dim)
    start = jnp.full_like(line.ends, -1, shape=(how.lanes,)), empty, State.empty(q, count + how.lanes, how.value_dim)
    most = -(-count * pages.tables.shape[1] // how.lanes)
    with jax.named_scope(f"trips={most}"):  # for those who count work: as if every block saw a whole table
        *_, slots = jax.lax.fori_loop(jnp.zeros_like(line.share), line.share, step, start)
    out, lse = _merged(slots, _owners(line, how.lanes), count, sinks, (kv_heads, group, size))
    return out, lse


def _each(x: jax.Array) -> jax.Array:
    return x[:, None, None, None]


def _seen(how: How, blocks: Blocks, block: jax.Array, chunk: jax.Array) -> jax.Array:
    """Return which key of a lane's chunk each of its tokens sees, ``[lanes, size, chunk]``."""
    places = (chunk * how.chunk)[:, None, None] + jnp.arange(how.chunk, dtype=jnp.int32)
    seen = places <= blocks.last[block][..., None]
    return seen if how.window is None else seen & (places >= blocks.first[block][..., None])


def _add(how: How, state: State, q: jax.Array, pages: Pages, ids: jax.Array, seen: jax.Array) -> State:
    """Return the states after a chunk of keys; what no token of the block sees may be NaN."""
    lanes, kv_heads, _, _ = q.shape
    wide = exact(q.dtype)

    def gather(pool: jax.Array, ids: jax.Array = ids) -> jax.Array:
        held = pool.at[ids].get(mode="promise_in_bounds")
        return jnp.moveaxis(held, 2, 1).reshape(lanes, kv_heads, how.chunk, *pool.shape[3:])

    owned = jnp.any(seen, 1)[:, None, :, None]
    keys = gather(pages.keys).astype(q.dtype)
    logits = _dot("lkqd,lksd->lkqs", q, keys) * how.scale
    if pages.key_scales is not None:
        logits = logits * gather(pages.key_scales).astype(wide)[:, :, None]
    if how.softcap is not None:
        logits = how.softcap * jnp.tanh(logits / how.softcap)
    seen = jnp.broadcast_to(seen[:, None, None], (lanes, kv_heads, q.shape[2] // seen.shape[1], *seen.shape[1:]))
    seen = seen.reshape(logits.shape)
    logits = jnp.where(seen, logits, -jnp.inf)
    peak = jnp.maximum(state.peak, jnp.max(logits, -1, keepdims=True))
    safe = jnp.where(jnp.isneginf(peak), jnp.zeros((), wide), peak)
    before, p = jnp.exp(state.peak - safe), jnp.exp(logits - safe)
    total = state.total * before + jnp.sum(p, -1, keepdims=True)
    values = keys[..., : how.value_dim] if pages.values is None else gather(pages.values, _once(total, ids))
    values = jnp.where(owned, values.astype(q.dtype), jnp.zeros((), q.dtype))
    scales = pages.key_scales if pages.values is None else pages.value_scales
    if scales is not None:
        p = p * jnp.where(owned, gather(scales).astype(wide)[..., None], 0)[..., 0][:, :, None]
    return State(peak, total, state.out * before + _dot("lkqs,lksd->lkqd", p.astype(q.dtype), values))


def _once(total: jax.Array, ids: jax.Array) -> jax.Array:
    """Return the same ids, known only once a total is, which is never negative.

    XLA's CPU runtime would read the values on one thread while another reads the keys, and hand both over for the
    products; one after the other, each on all threads, they take two thirds of the time.
    """
    return ids + (total.reshape(-1)[0] < 0).astype(ids.dtype)


def _owners(line: Line, lanes: int) -> jax.Array:
    """Return the block that each slot's state belongs to; past the last for slots that were not used."""
    every = jnp.arange(lanes, dtype=jnp.int32)
    blocks = len(line.ends)
    block = jnp.minimum(_place(line.ends, every * line.share), blocks - 1)
    slots = jnp.arange(blocks + lanes, dtype=jnp.int32)
    lane = _place(line.ranks[block] + every, slots) - 1
    return jnp.sum(line.ranks < (slots - lane)[:, None], 1, dtype=jnp.int32)


def _merged(slots: State, owners: jax.Array, count: int, sinks: Any, shape: tuple[int, int, int]) -> Any:
    """Return outputs and log-sum-exps of the blocks from the states of their slots."""
    full = (count, *shape, -1)

    def join(x: jax.Array, start: Any, name: str) -> jax.Array:
        into = jnp.full_like(x, start, shape=(count, *x.shape[1:])).at[owners]
        return getattr(into, name)(x, mode="drop")

    peak = join(slots.peak, -jnp.inf, "max")
    if sinks is not None:
        peak = jnp.maximum(peak.reshape(full), _per_head(sinks, peak, shape)).reshape(peak.shape)
    safe = jnp.where(jnp.isneginf(peak), jnp.zeros((), peak.dtype), peak)
    weights = jnp.exp(slots.peak - safe[jnp.minimum(owners, count - 1)])
    total = join(slots.total * weights, 0, "add")
    out = join(slots.out * weights, 0, "add")
    if sinks is not None:
        total = total + jnp.exp(_per_head(sinks, peak, shape) - safe.reshape(full)).reshape(total.shape)
    some = jnp.where(total == 0, jnp.ones((), total.dtype), total)
    lse = jnp.where(total == 0, -jnp.inf, safe + jnp.log(some))
    return (out / some).reshape(full), lse.reshape(full)


def _per_head(sinks: jax.Array, like: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    return sinks.astype(like.dtype).reshape(1, *shape[:2], 1, 1)


def _sunk(lse: jax.Array, sinks: Any) -> jax.Array:
    """Return the log-sum-exps ``[tokens, heads, 1]`` of tokens that see nothing but the sinks."""
    return lse if sinks is None else jnp.maximum(lse, sinks.astype(lse.dtype)[:, None])


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=exact(a.dtype))
