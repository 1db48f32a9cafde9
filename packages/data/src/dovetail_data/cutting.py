"""Rows that a stream of documents is cut into, one after the other, without padding; what does not fit is cut.

A row has T+1 tokens and begins with the last one of the row before, so every token of the stream but its very first is
a target exactly once. Row ``r`` holds the tokens ``[r*T, r*T + T]``; epochs follow one another without a gap, also
inside a row. Blocks of rows are permuted, each by a permutation of its own: all rows of an epoch, or so many as hold a
block of documents (see `order`).
"""

import functools
import math

import numpy as np
from jaxtyping import Int, Int64

from dovetail_data.permutation import LookedUp, Permutation
from dovetail_data.stream import Pieces, Stream
from dovetail_data.tokens import TokenSource

__all__ = ["CutRows"]

_BLOCKS_KEPT = 4
_ROW_STREAMS = 2**63  # smaller numbers are those of permutations of documents


class CutRows:
    """The rows of a source.

    Args:
        source: where documents come from; at least two tokens.
        seq_len: T.
        seed: of the order.
        epochs: None for rows without end.
        shuffled: whether rows are permuted.
    """

    def __init__(self, source: TokenSource, *, seq_len: int, seed: int, epochs: int | None, shuffled: bool) -> None:
        self.source = source
        self._seq_len = seq_len
        self._seed = seed
        self._shuffled = shuffled
        self._end = None if epochs is None else epochs * source.tokens
        self._stream = Stream(source, seed)
        per_epoch = max(1, (source.tokens - 1) // seq_len)  # whole blocks fit into any number of epochs
        self._block = max(1, per_epoch // self._stream.order.blocks)
        self._order = functools.lru_cache(_BLOCKS_KEPT)(self._permutation)

    @property
    def count(self) -> int | None:
        """The number of rows, the last of which may be short; None without end."""
        return None if self._end is None else math.ceil((self._end - 1) / self._seq_len)

    @property
    def per_epoch(self) -> float:
        """Rows that it takes to have each token as a target once."""
        return self.source.tokens / self._seq_len

    def pieces(self, rows: Int[np.ndarray, " rows"]) -> Pieces:
        """Return the pieces of some rows, each of T+1 tokens; those past the end have fewer, or none."""
        starts = self._places(rows) * self._seq_len
        stops = starts + (self._seq_len + 1)
        if self._end is not None:
            starts, stops = np.minimum(starts, self._end), np.minimum(stops, self._end)
            there = np.flatnonzero(starts < stops)
            return self._stream.pieces(starts[there], stops[there]).of_rows(there)
        return self._stream.pieces(starts, stops)

    def _places(self, rows: Int[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Return where in the stream some rows stand.

        What follows the last whole block of rows that end stays in order, so that padding comes last.
        """
        if not self._shuffled:
            return rows
        found = rows.copy()
        blocks = rows // self._block
        for block in range(int(blocks.min()), int(blocks.max()) + 1):
            if self._end is None or (block + 1) * self._block * self._seq_len < self._end:
                mine = blocks == block
                order = self._order(block)
                found[mine] = block * self._block + order(rows[mine] - block * self._block)
        return found

    def _permutation(self, block: int) -> LookedUp:
        return LookedUp(Permutation(self._block, seed=self._seed, stream=_ROW_STREAMS + block))
