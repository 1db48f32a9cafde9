"""A seeded bijective permutation of 0..n-1 in constant memory.

A balanced Feistel network over the smallest even number of bits that holds n, walked along its cycles until the value
is below n (M. Luby and C. Rackoff, 1988; J. Black and P. Rogaway, 2002). The round function is the 64-bit finaliser of
MurmurHash3; the keys are XXH3-64 digests of (seed, stream, round), so the order depends on nothing but these.
"""

import functools
import operator
import struct

import numpy as np
import xxhash
from jaxtyping import Int, Int64, UInt64

__all__ = ["LookedUp", "Permutation"]

_ROUNDS = 6
_PAGE, _PAGES_KEPT = 4096, 4
_LEAST_HALF = 3  # bits; a smaller network does not reach the orders of 3 or 4 elements equally often
_FIRST, _SECOND = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


class Permutation:
    """A permutation of ``0..size-1``, called with indices.

    Args:
        size: how many elements, 1 to 2**62.
        seed: 0 to 2**64 - 1.
        stream: another permutation for each value, for instance an epoch's number.

    Raises:
        ValueError: an argument out of range.

    >>> Permutation(5, seed=1)(np.arange(5)).tolist()
    [3, 2, 0, 4, 1]
    """

    def __init__(self, size: int, *, seed: int, stream: int = 0) -> None:
        self.size = _checked("size", size, 1, 2**62)
        seed, stream = _checked("seed", seed, 0, 2**64 - 1), _checked("stream", stream, 0, 2**64 - 1)
        half = max(((self.size - 1).bit_length() + 1) // 2, _LEAST_HALF)
        self._half = np.uint64(half)
        self._mask = np.uint64(2**half - 1)
        packed = (struct.pack("<QQQ", seed, stream, number) for number in range(_ROUNDS))
        self._keys = np.array([xxhash.xxh3_64_intdigest(data) for data in packed], np.uint64)

    def __call__(self, indices: Int[np.ndarray, " indices"]) -> Int64[np.ndarray, " indices"]:
        """Return where indices in ``0..size-1`` go.

        Raises:
            IndexError: an index is out of range.
        """
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.size):
            raise IndexError(f"indices span {indices.min()} to {indices.max()}; expected 0 to {self.size - 1}")
        values = self._network(indices.astype(np.uint64))
        while (outside := np.flatnonzero(values >= self.size)).size:
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half) | right


class LookedUp:
    """A permutation that is asked for a few neighbours at a time: it makes 4096 at once and keeps the last ones."""

    def __init__(self, permutation: Permutation) -> None:
        self._permutation = permutation
        self._page = functools.lru_cache(_PAGES_KEPT)(self._made)

    def __call__(self, indices: Int[np.ndarray, " indices"]) -> Int64[np.ndarray, " indices"]:
        """Return where indices go (see `Permutation`); they must not be empty."""
        first, last = int(indices.min()) // _PAGE, int(indices.max()) // _PAGE
        if first == last:
            return self._page(first)[indices - first * _PAGE]
        out = np.empty(len(indices), np.int64)
        pages = indices // _PAGE
        for page in np.unique(pages).tolist():
            mine = pages == page
            out[mine] = self._page(page)[indices[mine] - page * _PAGE]
        return out

    def _made(self, page: int) -> Int64[np.ndarray, " indices"]:
        return self._permutation(np.arange(page * _PAGE, min((page + 1) * _PAGE, self._permutation.size)))


def _mix(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    x = (x ^ (x >> _SHIFT)) * _FIRST
    x = (x ^ (x >> _SHIFT)) * _SECOND
    return x ^ (x >> _SHIFT)


def _checked(name: str, value: int, least: int, most: int) -> int:
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{name}={number}; expected {least} to {most}")
    return number
