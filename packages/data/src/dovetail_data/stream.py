"""The endless stream of tokens: epoch after epoch, each with its documents in an order of its own.

Token ``p`` of the stream belongs to epoch ``p // E``, where ``E`` is the number of tokens of the source. Inside epoch
``e`` the documents stand in an order of their own, see `order`. Everything is found by division and a binary search, so
any place costs the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from dovetail_data.order import Order
from dovetail_data.tokens import TokenSource

__all__ = ["Pieces", "Stream"]


class Pieces(NamedTuple):
    """Pieces of documents that some rows are made of, row after row.

    Attributes:
        documents: their numbers in the source.
        starts: the first token of each piece in its document.
        stops: one more than the last.
        epochs: the epoch of each piece.
        rows: the row of each piece, counted from 0 among those that were asked for.
    """

    documents: Int64[np.ndarray, " pieces"]
    starts: Int64[np.ndarray, " pieces"]
    stops: Int64[np.ndarray, " pieces"]
    epochs: Int64[np.ndarray, " pieces"]
    rows: Int64[np.ndarray, " pieces"]

    @staticmethod
    def joined(parts: "Sequence[Pieces]") -> "Pieces":
        """Return the pieces of all parts, row after row; what is of one row stays in its order."""
        if len(parts) == 1:
            return parts[0]
        none = [np.empty(0, np.int64)] * len(Pieces._fields)
        whole = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)] if parts else none
        order = np.argsort(whole[-1], kind="stable")
        return Pieces(*(array[order] for array in whole))

    def of_rows(self, rows: Int[np.ndarray, " rows"]) -> "Pieces":
        """Return the same pieces with other numbers of rows."""
        return self._replace(rows=rows[self.rows])


class Stream:
    """The stream of a source under a seed."""

    def __init__(self, source: TokenSource, seed: int) -> None:
        self.source = source
        self.order = Order(source, seed)

    def pieces(self, starts: Int64[np.ndarray, " rows"], stops: Int64[np.ndarray, " rows"]) -> Pieces:
        """Return the pieces of documents that make up rows of the tokens ``[start, stop)`` of the stream."""
        parts: list[Pieces] = []
        rows = np.arange(len(starts))
        while len(rows):
            epoch = int(starts[0]) // self.source.tokens
            bounds = self.order.starts(epoch)
            zero = epoch * self.source.tokens
            number = int(np.searchsorted(bounds, starts[0] - zero, side="right")) - 1
            begin, end = zero + int(bounds[number]), zero + int(bounds[number + 1])
            here = (starts >= begin) & (starts < end)  # the rows that begin in this block, and what is over of them
            block = self._within(epoch, number, starts[here] - begin, np.minimum(stops[here], end) - begin)
            parts.append(block.of_rows(rows[here]))
            if here.all() and stops.max() <= end:
                break
            starts = np.where(here, np.minimum(stops, end), starts)
            rows, starts, stops = (array[starts < stops] for array in (rows, starts, stops))
        return Pieces.joined(parts)

    def _within(
        self, epoch: int, number: int, firsts: Int64[np.ndarray, " rows"], lasts: Int64[np.ndarray, " rows"]
    ) -> Pieces:
        """Return the pieces of rows that lie in one block."""
        order, ends = self.order.block(epoch, number)
        begins = ends.searchsorted(firsts, side="right")
        counts = ends.searchsorted(lasts, side="left") + 1 - begins
        rows = np.arange(len(firsts)).repeat(counts)
        places = np.arange(len(rows)) + (begins - (counts.cumsum() - counts))[rows]
        documents, stops = order[places], ends[places]
        heads = stops - self.source.lengths[documents]
        starts = np.maximum(firsts[rows] - heads, 0)
        stops = np.minimum(stops, lasts[rows]) - heads
        found = Pieces(documents, starts, stops, np.full(len(rows), epoch), rows)
        kept = stops > starts  # a source may hold documents without tokens
        return found if kept.all() else Pieces(*(array[kept] for array in found))
