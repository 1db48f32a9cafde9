"""The endless stream of tokens: epoch after epoch, each with its documents in an order of its own.

Token ``p`` of the stream belongs to epoch ``p // E``, where ``E`` is the number of tokens of the source. Inside epoch
``e`` the documents stand in the order ``Permutation(n, seed, stream=e)``. Everything is found by division and a binary
search, so any place costs the same.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from dovetail_data.permutation import Permutation
from dovetail_data.tokens import TokenSource

__all__ = ["Pieces", "Stream"]

_EPOCHS_KEPT = 3  # a batch may straddle two, and threads may be at work on the one before


class Pieces(NamedTuple):
    """Consecutive pieces of documents.

    Attributes:
        documents: their numbers in the source.
        starts: the first token of each piece in its document.
        stops: one more than the last.
        epochs: the epoch of each piece.
    """

    documents: Int64[np.ndarray, " pieces"]
    starts: Int64[np.ndarray, " pieces"]
    stops: Int64[np.ndarray, " pieces"]
    epochs: Int64[np.ndarray, " pieces"]


class Stream:
    """The stream of a source under a seed."""

    def __init__(self, source: TokenSource, seed: int) -> None:
        self.source = source
        self.seed = seed
        self._order = functools.lru_cache(_EPOCHS_KEPT)(self._compute_order)

    def pieces(self, start: int, stop: int) -> Pieces:
        """Return the pieces of documents that make up the tokens ``[start, stop)`` of the stream."""
        parts: list[Pieces] = []
        while start < stop:
            epoch, first = divmod(start, self.source.tokens)
            last = min(first + stop - start, self.source.tokens)
            parts.append(self._within(epoch, first, last))
            start += last - first
        if not parts:
            return Pieces(*(np.empty(0, np.int64) for _ in Pieces._fields))
        if len(parts) == 1:
            return parts[0]
        return Pieces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _within(self, epoch: int, first: int, last: int) -> Pieces:
        order, ends = self._order(epoch)
        begin = int(np.searchsorted(ends, first, side="right"))
        end = int(np.searchsorted(ends, last, side="left")) + 1
        documents, stops = order[begin:end], ends[begin:end]
        heads = stops - self.source.lengths[documents]
        starts = np.maximum(first - heads, 0)
        stops = np.minimum(stops, last) - heads
        kept = stops > starts  # a source may hold documents without tokens
        if not kept.all():
            documents, starts, stops = documents[kept], starts[kept], stops[kept]
        return Pieces(documents, starts, stops, np.full(len(documents), epoch, np.int64))

    def _compute_order(self, epoch: int) -> tuple[Any, Any]:
        """Return an epoch's documents in order and where each ends."""
        count = len(self.source)
        order = Permutation(count, seed=self.seed, stream=epoch)(np.arange(count))
        return order, np.cumsum(self.source.lengths[order])
