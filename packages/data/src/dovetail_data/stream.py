"""The endless stream of tokens: epoch after epoch, each with its documents in an order of its own.

Token ``p`` of the stream belongs to epoch ``p // E``, where ``E`` is the number of tokens of the source. Inside epoch
``e`` the documents stand in an order of their own, see `order`. Everything is found by division and a binary search, so
any place costs the same.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dovetail_data.order import Order
from dovetail_data.tokens import TokenSource

__all__ = ["Pieces", "Stream"]


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
        self.order = Order(source, seed)

    def pieces(self, start: int, stop: int) -> Pieces:
        """Return the pieces of documents that make up the tokens ``[start, stop)`` of the stream."""
        parts: list[Pieces] = []
        while start < stop:
            epoch, first = divmod(start, self.source.tokens)
            starts = self.order.starts(epoch)
            number = int(np.searchsorted(starts, first, side="right")) - 1
            last = min(first + stop - start, int(starts[number + 1]))
            parts.append(self._within(epoch, number, first - int(starts[number]), last - int(starts[number])))
            start += last - first
        if not parts:
            return Pieces(*(np.empty(0, np.int64) for _ in Pieces._fields))
        if len(parts) == 1:
            return parts[0]
        return Pieces(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _within(self, epoch: int, number: int, first: int, last: int) -> Pieces:
        order, ends = self.order.block(epoch, number)
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
