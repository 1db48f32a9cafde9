"""What a mask is, and the two ways to combine masks."""

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

__all__ = ["FAR", "And", "Mask", "Matrix", "Or", "Range", "Seen", "Tile", "column", "position"]

Range: TypeAlias = tuple[Any, Any]
"""Half open; of ints, or of integer arrays ``[batch or 1]``."""
Matrix: TypeAlias = tuple[int, int, int, int]
"""Lengths of the axes of an attention matrix: batch, heads, time, source."""
FAR = 1 << 30


class Seen(NamedTuple):
    """Rows and columns that are not padding, ``[batch, time]`` and ``[batch, source]``; None where none is."""

    rows: Any
    cols: Any


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
        return column(self.query_offset) + i[:, None], column(self.key_offset) + j

    def known(self) -> bool:
        """Tell whether all positions are known when traced."""
        return all(isinstance(x, int) for x in (self.row, self.col, *map(position, self[4:])))

    def ends(self) -> tuple[Any, Any, Any, Any]:
        """Return the first and last position of the rows and of the columns."""
        first, low = position(self.query_offset) + self.row, position(self.key_offset) + self.col
        return first, first + self.rows - 1, low, low + self.cols - 1


def column(x: Any) -> jax.Array:
    """Return one number per batch row as a column of the attention matrix."""
    return jnp.asarray(x, jnp.int32).reshape(-1, 1, 1, 1)


def position(x: Any) -> Any:
    """Return an offset as an int, or as an array that sums of positions do not overflow."""
    return int(x) if isinstance(x, (int, np.integer)) else jnp.asarray(x, jnp.int32)


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

    def seen(self, matrix: Matrix) -> Seen:
        """Return which rows and columns are not padding."""
        del matrix
        return Seen(None, None)

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


@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    a: Any
    b: Any

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        self.a.check(matrix)
        self.b.check(matrix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """What both masks allow."""

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

    def seen(self, matrix: Matrix) -> Seen:
        """See `Mask.seen`."""
        parts = zip(self.a.seen(matrix), self.b.seen(matrix), strict=True)
        return Seen(*(b if a is None else a if b is None else a & b for a, b in parts))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """What either mask allows."""

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

    def seen(self, matrix: Matrix) -> Seen:
        """See `Mask.seen`."""
        parts = zip(self.a.seen(matrix), self.b.seen(matrix), strict=True)
        return Seen(*(None if a is None or b is None else a | b for a, b in parts))
