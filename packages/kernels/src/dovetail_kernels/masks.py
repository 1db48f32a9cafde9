"""Which keys a query may see: small masks that combine with ``&`` and ``|``.

A mask is a pytree. What it knows without looking at an array (causal, window, chunks, prefix) tells at trace time which
keys a block of queries needs at all; what its arrays tell (segments, lengths, traced offsets) is found when it runs.

Masks that compare positions take the position of query row r as ``query_offset + r`` and of key column c as
``key_offset + c``; `segments`, `lengths` and `dense` count rows and columns.
"""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

__all__ = ["Mask", "Tile", "causal", "chunked", "dense", "lengths", "prefix", "segments", "window"]

Range: TypeAlias = tuple[Any, Any]
"""Half open; of ints, or of integer arrays ``[batch or 1]``."""
Matrix: TypeAlias = tuple[int, int, int, int]
"""Lengths of the axes of an attention matrix: batch, heads, time, source."""
FAR = 1 << 30


class Tile(NamedTuple):
    """Some query rows and key columns of an attention matrix.

    Attributes:
        row: the first row, may be traced.
        rows: how many.
        col: the first column, may be traced.
        cols: how many.
        query_offset: position of row 0: an int, or an integer array, ``[]`` or ``[batch]``.
        key_offset: position of column 0, likewise.
    """

    row: Any
    rows: int
    col: Any
    cols: int
    query_offset: Any = 0
    key_offset: Any = 0

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """Return the positions of the rows, ``[batch or 1, 1, rows, 1]``, and of the columns, ``[..., 1, cols]``."""
        i = self.row + jnp.arange(self.rows, dtype=jnp.int32)
        j = self.col + jnp.arange(self.cols, dtype=jnp.int32)
        return _column(self.query_offset) + i[:, None], _column(self.key_offset) + j

    def known(self) -> bool:
        """Tell whether all positions are known when traced."""
        return all(isinstance(x, int) for x in (self.row, self.col, self.query_offset, self.key_offset))

    def ends(self) -> tuple[Any, Any, Any, Any]:
        """Return the first and last position of the rows and of the columns."""
        first, low = self.query_offset + self.row, self.key_offset + self.col
        return first, first + self.rows - 1, low, low + self.cols - 1


def _column(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32).reshape(-1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base of all masks; the functions of this module make them."""

    def __and__(self, other: "Mask") -> "Mask":
        """Return the mask of what both allow."""
        return And(self, _checked(other))

    def __or__(self, other: "Mask") -> "Mask":
        """Return the mask of what either allows."""
        return Or(self, _checked(other))

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """Return who may see whom, ``[batch, heads, rows, cols]``; axes along which all is equal may have length 1."""
        raise NotImplementedError(type(self).__name__)

    def span(self, tile: Tile) -> Range:
        """Return the columns of the tile that its rows may see, as far as known when traced, as ints."""
        return tile.col, tile.col + tile.cols

    def bounds(self, tile: Tile) -> Range | None:
        """Return the columns that the rows of the tile may see, as arrays, or None where `span` tells as much."""
        del tile
        return None

    def full(self, tile: Tile) -> bool:
        """Tell whether every row of the tile surely sees every column of it."""
        del tile
        return False

    def check(self, matrix: Matrix) -> None:
        """Refuse arrays that do not fit the attention matrix.

        Raises:
            ValueError: with shape and expectation.
        """
        del matrix


def _checked(x: Any) -> Mask:
    if not isinstance(x, Mask):
        raise TypeError(f"{x!r} is not a mask; expected causal(), window(...), segments(...) or another one")
    return x


class _Positional(Mask):
    """A mask that compares positions; it says which positions a range of queries reaches."""

    def reach(self, first: Any, last: Any) -> Range:
        raise NotImplementedError(type(self).__name__)

    def span(self, tile: Tile) -> Range:
        """See `Mask.span`."""
        if not tile.known():
            return super().span(tile)
        first, last, _, _ = tile.ends()
        low, high = (int(x) - tile.key_offset for x in self.reach(first, last))
        end = tile.col + tile.cols
        return min(max(tile.col, low), end), min(max(tile.col, high), end)

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        if tile.known():
            return None
        first, last, _, _ = tile.ends()
        ends = (jnp.asarray(x - tile.key_offset, jnp.int32).reshape(-1) for x in self.reach(first, last))
        low, high = (jnp.clip(x, tile.col, tile.col + tile.cols) for x in ends)
        return low, high


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Causal(_Positional):
    """See `causal`."""

    def __str__(self) -> str:
        """Return how it is written."""
        return "causal()"

    def reach(self, first: Any, last: Any) -> Range:
        """Return the range of positions that positions from `first` to `last` may see."""
        del first
        return -FAR, last + 1

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        i, j = tile.positions()
        return j <= i

    def full(self, tile: Tile) -> bool:
        """See `Mask.full`."""
        first, _, _, high = tile.ends()
        return tile.known() and high <= first


def causal() -> Mask:
    """Let queries see keys at their own and earlier positions.

    >>> print((causal() & window(4096)) | prefix(3))
    (causal() & window(4096)) | prefix(3)
    """
    return Causal()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Window(_Positional):
    """See `window`."""

    left: int
    right: int | None

    def __str__(self) -> str:
        """Return how it is written."""
        return f"window({self.left})" if self.right is None else f"window({self.left}, {self.right})"

    def reach(self, first: Any, last: Any) -> Range:
        """Return the range of positions that positions from `first` to `last` may see."""
        return first - self.left + 1, FAR if self.right is None else last + self.right

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        i, j = tile.positions()
        near = j > i - self.left
        return near if self.right is None else near & (j < i + self.right)

    def full(self, tile: Tile) -> bool:
        """See `Mask.full`."""
        first, last, low, high = tile.ends()
        return tile.known() and last - low < self.left and (self.right is None or high - first < self.right)


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


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Chunked(_Positional):
    """See `chunked`."""

    size: int

    def __str__(self) -> str:
        """Return how it is written."""
        return f"chunked({self.size})"

    def reach(self, first: Any, last: Any) -> Range:
        """Return the range of positions that positions from `first` to `last` may see."""
        return first // self.size * self.size, (last // self.size + 1) * self.size

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        i, j = tile.positions()
        return i // self.size == j // self.size

    def full(self, tile: Tile) -> bool:
        """See `Mask.full`."""
        return tile.known() and len({x // self.size for x in tile.ends()}) == 1


def chunked(size: int) -> Mask:
    """Let queries see keys of their own chunk of `size` positions.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"chunked({size}); expected a size of at least 1")
    return Chunked(size)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Prefix(_Positional):
    """See `prefix`."""

    length: int

    def __str__(self) -> str:
        """Return how it is written."""
        return f"prefix({self.length})"

    def reach(self, first: Any, last: Any) -> Range:
        """Return the range of positions that positions from `first` to `last` may see."""
        del first, last
        return -FAR, self.length

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        return tile.positions()[1] < self.length

    def full(self, tile: Tile) -> bool:
        """See `Mask.full`."""
        return tile.known() and tile.ends()[3] < self.length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefixes(Mask):
    """See `prefix`."""

    length: Any

    def __str__(self) -> str:
        """Return how it is written."""
        return "prefix([batch])"

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        return tile.positions()[1] < _column(self.length)

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        high = jnp.clip(self.length - tile.key_offset, tile.col, tile.col + tile.cols).astype(jnp.int32).reshape(-1)
        return jnp.full_like(high, tile.col), high

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        _fits("prefix", self.length, matrix[:1])


def prefix(length: int | Int[Array, " batch"]) -> Mask:
    """Let every query see the first keys: those at positions below `length`.

    With ``causal() |`` before it this is the mask of a prefix LM.

    Raises:
        ValueError: a negative length.
        TypeError: an array that is not of integers.
    """
    if isinstance(length, int):
        if length < 0:
            raise ValueError(f"prefix({length}); expected at least 0")
        return Prefix(length)
    return Prefixes(_integers("prefix", length))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """See `segments`."""

    query_ids: Any
    key_ids: Any

    def __str__(self) -> str:
        """Return how it is written."""
        return "segments([batch, time])"

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        mine = jax.lax.dynamic_slice_in_dim(self.query_ids, tile.row, tile.rows, 1)[:, None, :, None]
        other = jax.lax.dynamic_slice_in_dim(self.key_ids, tile.col, tile.cols, 1)[:, None, None]
        return (mine == other) & (mine != 0)

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        mine = jax.lax.dynamic_slice_in_dim(self.query_ids, tile.row, tile.rows, 1)
        other = jax.lax.dynamic_slice_in_dim(self.key_ids, tile.col, tile.cols, 1)
        least = jnp.min(jnp.where(mine == 0, FAR, mine), 1, keepdims=True)
        most = jnp.max(jnp.where(mine == 0, -FAR, mine), 1, keepdims=True)
        hit = (other >= least) & (other <= most) & (other != 0)
        count = jnp.any(hit, 1)
        low = jnp.where(count, jnp.argmax(hit, 1), 0)
        high = jnp.where(count, tile.cols - jnp.argmax(hit[:, ::-1], 1), 0)
        return (tile.col + low).astype(jnp.int32), (tile.col + high).astype(jnp.int32)

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        batch, _, time, source = matrix
        _fits("segments: query_ids", self.query_ids, (batch, time))
        _fits("segments: key_ids", self.key_ids, (batch, source))


def segments(query_ids: Int[Array, "batch time"], key_ids: Int[Array, "batch source"] | None = None) -> Mask:
    """Let queries see keys of their own segment; segment 0 is padding, which sees and is seen by nothing.

    Args:
        query_ids: the segment of every query.
        key_ids: the segment of every key; default `query_ids`.

    Raises:
        TypeError: ids that are not integers.
    """
    query_ids = _integers("segments: query_ids", query_ids)
    return Segments(query_ids, query_ids if key_ids is None else _integers("segments: key_ids", key_ids))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lengths(Mask):
    """See `lengths`."""

    query: Any
    key: Any

    def __str__(self) -> str:
        """Return how it is written."""
        given = [name for name in ("query", "key") if getattr(self, name) is not None]
        return f"lengths({', '.join(f'{name}=[batch]' for name in given)})"

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        i, j = tile._replace(query_offset=0, key_offset=0).positions()
        inside = [x < _column(n) for x, n in ((i, self.query), (j, self.key)) if n is not None]
        return inside[0] if len(inside) == 1 else inside[0] & inside[1]

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        end = tile.col + tile.cols
        high = jnp.full(1, end, jnp.int32) if self.key is None else jnp.clip(self.key, tile.col, end)
        if self.query is not None:
            high = jnp.where(self.query > tile.row, high, tile.col)
        return jnp.full_like(high, tile.col), high.astype(jnp.int32)

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        for name in ("query", "key"):
            if (given := getattr(self, name)) is not None:
                _fits(f"lengths: {name}", given, matrix[:1])


def lengths(query: Int[Array, " batch"] | None = None, key: Int[Array, " batch"] | None = None) -> Mask:
    """Let only the first `query` rows see anything, and only the first `key` columns be seen.

    Raises:
        ValueError: neither is given.
        TypeError: lengths that are not integers.
    """
    if query is None and key is None:
        raise ValueError("lengths(): expected query=, key= or both")
    return Lengths(*(None if x is None else _integers(f"lengths: {n}", x) for n, x in (("query", query), ("key", key))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense(Mask):
    """See `dense`."""

    allowed: Any

    def __str__(self) -> str:
        """Return how it is written."""
        return "dense([batch, heads, time, source])"

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        rows = jax.lax.dynamic_slice_in_dim(self.allowed, tile.row, tile.rows, 2)
        return jax.lax.dynamic_slice_in_dim(rows, tile.col, tile.cols, 3)

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        have = self.allowed.shape
        fits = len(have) == 4 and have[2:] == matrix[2:] and have[0] in (1, matrix[0]) and have[1] in (1, matrix[1])
        if not fits:
            raise ValueError(f"dense: shape {have}; expected {matrix}, where batch and heads may be 1")


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """What both masks allow."""

    a: Any
    b: Any

    def __str__(self) -> str:
        """Return how it is written."""
        return " & ".join(f"({x})" if isinstance(x, Or) else str(x) for x in (self.a, self.b))

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        return self.a.keep(tile) & self.b.keep(tile)

    def span(self, tile: Tile) -> Range:
        """See `Mask.span`."""
        (a, b), (c, d) = self.a.span(tile), self.b.span(tile)
        low = max(a, c)
        return low, max(low, min(b, d))

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        a, b = self.a.bounds(tile), self.b.bounds(tile)
        if a is None or b is None:
            return a or b
        return jnp.maximum(a[0], b[0]), jnp.minimum(a[1], b[1])

    def full(self, tile: Tile) -> bool:
        """See `Mask.full`."""
        return self.a.full(tile) and self.b.full(tile)

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        self.a.check(matrix)
        self.b.check(matrix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """What either mask allows."""

    a: Any
    b: Any

    def __str__(self) -> str:
        """Return how it is written."""
        return " | ".join(f"({x})" if isinstance(x, And) else str(x) for x in (self.a, self.b))

    def keep(self, tile: Tile) -> Bool[Array, "..."]:
        """See `Mask.keep`."""
        return self.a.keep(tile) | self.b.keep(tile)

    def span(self, tile: Tile) -> Range:
        """See `Mask.span`."""
        filled = [(low, high) for low, high in (self.a.span(tile), self.b.span(tile)) if low < high]
        if not filled:
            return tile.col, tile.col
        return min(low for low, _ in filled), max(high for _, high in filled)

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        parts = [x.bounds(tile) for x in (self.a, self.b)]
        if parts == [None, None]:
            return None
        known = [tuple(jnp.full(1, end, jnp.int32) for end in x.span(tile)) for x in (self.a, self.b)]
        (a, b), (c, d) = (part or other for part, other in zip(parts, known, strict=True))
        low = jnp.minimum(jnp.where(a < b, a, FAR), jnp.where(c < d, c, FAR))
        high = jnp.maximum(jnp.where(a < b, b, 0), jnp.where(c < d, d, 0))
        return jnp.minimum(low, high), high

    def full(self, tile: Tile) -> bool:
        """See `Mask.full`."""
        return self.a.full(tile) or self.b.full(tile)

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        self.a.check(matrix)
        self.b.check(matrix)


def _fits(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}")


def _integers(name: str, array: Any) -> Any:
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: dtype {array.dtype}; expected integers")
    return array.astype(jnp.int32)
