"""Masks that compare positions and hold no arrays; `dovetail_kernels.masks` makes them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from dovetail_kernels._mask import FAR, Mask, Range, Tile, position

__all__ = ["Causal", "Chunked", "Prefix", "Window"]


class _Positional(Mask):
    """A mask that compares positions; it says which positions a range of queries reaches."""

    def reach(self, first: Any, last: Any) -> Range:
        raise NotImplementedError(type(self).__name__)

    def span(self, tile: Tile) -> Range:
        """See `Mask.span`."""
        if not tile.known():
            return super().span(tile)
        first, last, _, _ = tile.ends()
        low, high = (int(x) - position(tile.key_offset) for x in self.reach(first, last))
        end = tile.col + tile.cols
        return min(max(tile.col, low), end), min(max(tile.col, high), end)

    def bounds(self, tile: Tile) -> Range | None:
        """See `Mask.bounds`."""
        if tile.known():
            return None
        first, last, _, _ = tile.ends()
        ends = (jnp.asarray(x - position(tile.key_offset), jnp.int32).reshape(-1) for x in self.reach(first, last))
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
