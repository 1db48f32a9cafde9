"""PagePool: which pages of the cache are free."""

from collections.abc import Iterable

__all__ = ["TRASH", "PagePool", "pages_for"]

TRASH = 0
"""The page that padding writes to; it belongs to nobody."""


class PagePool:
    """Hands out the pages 1 to ``count - 1``, lowest numbers first after a start, last freed first after that.

    >>> pool = PagePool(4)
    >>> pool.take(2), pool.free, pool.take(2)
    ([1, 2], 1, None)
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, TRASH, -1))

    @property
    def free(self) -> int:
        """How many pages nobody has."""
        return len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Return `count` pages, or None (and take nothing) where there are too few."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: Iterable[int]) -> None:
        """Take pages back."""
        self._free += pages


def pages_for(tokens: int, page_size: int) -> int:
    """Return how many pages hold some tokens."""
    return -(-tokens // page_size)
