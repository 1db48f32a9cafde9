"""Documents as stretches of arrays of tokens, memory-mapped or not."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int64, Integer, Shaped, UInt, UInt8

from dovetail_data.tokens import TokenSource, check_pieces

__all__ = ["MappedTokens"]


class MappedTokens(TokenSource):
    """A source whose documents follow one another in some arrays; each lies in one of them.

    Args:
        arrays: of tokens, one per file.
        lengths: tokens of each document; those of the first array come first, and they fill every array.
        dtype: of what `gather` returns, unsigned.
        learned: arrays like those of the tokens, 1 for each one that is learned; None where all are.
    """

    def __init__(
        self,
        arrays: Sequence[Integer[np.ndarray, "_"]],
        lengths: Int64[np.ndarray, " documents"],
        dtype: Any,
        learned: Sequence[UInt8[np.ndarray, "_"]] | None = None,
    ) -> None:
        self._arrays = list(arrays)
        self._learned = None if learned is None else list(learned)
        self._dtype = np.dtype(dtype)
        self._lengths = lengths
        self._starts = np.cumsum(lengths) - lengths
        sizes = [len(array) for array in arrays]
        self._firsts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[:-1]  # the token each array begins with

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens per document, the end token included."""
        return self._lengths

    def gather(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        """Return the tokens ``[start, stop)`` of each document, one piece after the other (see `TokenSource`)."""
        return self._pieces(self._arrays, self._dtype, documents, starts, stops)

    def weights(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt8[np.ndarray, " tokens"] | None:
        """Return which tokens of `gather` are learned (see `TokenSource`)."""
        if self._learned is None:
            return None
        return self._pieces(self._learned, np.dtype(np.uint8), documents, starts, stops)

    def _pieces(
        self,
        arrays: Sequence[np.ndarray],
        dtype: np.dtype[Any],
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        check_pieces(documents, starts, stops, self._lengths)
        begin = self._starts[documents]
        owners = np.searchsorted(self._firsts, begin, side="right") - 1
        begin = begin - self._firsts[owners] + starts
        sizes = np.asarray(stops) - starts
        out: Shaped[np.ndarray, " tokens"] = np.empty(int(sizes.sum()), dtype)
        at = 0
        for owner, first, size in zip(owners.tolist(), begin.tolist(), sizes.tolist(), strict=True):
            out[at : at + size] = arrays[owner][first : first + size]
            at += size
        return out
