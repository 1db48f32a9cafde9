"""Masks that hold arrays; `dovetail_kernels.masks` makes them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dovetail_kernels._mask import FAR, Mask, Matrix, Range, Seen, Tile, column, position

__all__ = ["Dense", "Lengths", "Prefixes", "Segments"]


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
        return tile.positions()[1] < column(self.length)

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        end = self.length - position(tile.key_offset)
        high = jnp.clip(end, tile.col, tile.col + tile.cols).astype(jnp.int32).reshape(-1)
        return jnp.full_like(high, tile.col), high

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        if self.length.shape:
            _fits("prefix", self.length, matrix[:1])


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

    def seen(self, matrix: Matrix) -> Seen:
        """See `Mask.seen`."""
        del matrix
        return Seen(self.query_ids != 0, self.key_ids != 0)

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        batch, _, time, source = matrix
        _fits("segments: query_ids", self.query_ids, (batch, time))
        _fits("segments: key_ids", self.key_ids, (batch, source))


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
        inside = [x < column(n) for x, n in ((i, self.query), (j, self.key)) if n is not None]
        return inside[0] if len(inside) == 1 else inside[0] & inside[1]

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        end = tile.col + tile.cols
        high = jnp.full(1, end, jnp.int32) if self.key is None else jnp.clip(self.key, tile.col, end)
        if self.query is not None:
            high = jnp.where(self.query > tile.row, high, tile.col)
        return jnp.full_like(high, tile.col), high.astype(jnp.int32)

    def seen(self, matrix: Matrix) -> Seen:
        """See `Mask.seen`."""
        given = zip((self.query, self.key), matrix[2:], strict=True)
        return Seen(*(None if n is None else jnp.arange(m, dtype=jnp.int32) < n[:, None] for n, m in given))

    def check(self, matrix: Matrix) -> None:
        """See `Mask.check`."""
        for name in ("query", "key"):
            if (given := getattr(self, name)) is not None:
                _fits(f"lengths: {name}", given, matrix[:1])


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


def _fits(name: str, array: Any, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}")
