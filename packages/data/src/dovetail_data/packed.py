"""Rows of whole documents: which ones share a row is decided once, from their lengths; epochs permute the rows.

Documents are packed block by block (see `order`), each block in a seeded order of its own. So an epoch has the same
number of rows as any other, and the row at any place is found by a division. In each epoch the blocks, and the rows of
each block, stand in another order. What shares a row stays together; segments keep it apart.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from dovetail_data.order import Order
from dovetail_data.packing import OverLong, Packing, cut_long, pack
from dovetail_data.permutation import LookedUp, Permutation
from dovetail_data.stream import Pieces
from dovetail_data.tokens import TokenSource

__all__ = ["PackedRows", "Yield"]

_BLOCKS_KEPT = 4
_BLOCKS_OF_EPOCH, _ROWS_OF_BLOCK = 2**63, 2**63 + 2**62  # streams of permutations; smaller ones are those of documents


class Yield(NamedTuple):
    """What becomes of an epoch's tokens.

    Attributes:
        rows: rows of T+1 tokens.
        tokens: tokens in them; one that ends a piece of a document and begins the next one counts twice.
        padding: tokens that are missing in the rows.
        left_out: tokens of documents, or of parts of them, that are in no row.
    """

    rows: int
    tokens: int
    padding: int
    left_out: int


class _Block(NamedTuple):
    """The rows of a block: pieces, row after row, and where each row begins and the last one ends."""

    documents: Int64[np.ndarray, " pieces"]
    starts: Int64[np.ndarray, " pieces"]
    stops: Int64[np.ndarray, " pieces"]
    bounds: Int64[np.ndarray, " rows_and_end"]


class PackedRows:
    """The packed rows of a source.

    Args:
        source: where documents come from.
        seq_len: T; a row has room for T+1 tokens.
        seed: of the order.
        epochs: None for rows without end.
        packing: ``first_fit`` or ``best_fit``.
        over_long: what becomes of documents of more than T+1 tokens.
        shuffled: whether rows are permuted.

    Raises:
        ValueError: an unknown option; no document is in a row; or documents are too long where that is an error.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        seq_len: int,
        seed: int,
        epochs: int | None,
        packing: Packing,
        over_long: OverLong,
        shuffled: bool,
    ) -> None:
        self.source = source
        self._capacity = seq_len + 1
        self._seed = seed
        self._epochs = epochs
        self._packing: Packing = packing
        self._over_long: OverLong = over_long
        self._shuffled = shuffled
        self._order = Order(source, seed)
        self._block = functools.lru_cache(_BLOCKS_KEPT)(self._packed)
        self._permutation = functools.lru_cache(_BLOCKS_KEPT)(self._permuted)
        self._starts = functools.lru_cache(_BLOCKS_KEPT)(self._block_starts)
        self._sizes = np.zeros(self._order.blocks, np.int64)
        tokens = again = 0
        for number in range(self._order.blocks):
            block = self._block(number)
            self._sizes[number] = len(block.bounds) - 1
            tokens += int((block.stops - block.starts).sum())
            again += int(np.count_nonzero(block.starts))
        rows = int(self._sizes.sum())
        if not rows:
            raise ValueError(f"no document of {len(source)} is in a row (over_long={over_long!r}, seq_len={seq_len})")
        self.summary = Yield(rows, tokens, rows * self._capacity - tokens, source.tokens - (tokens - again))

    @property
    def count(self) -> int | None:
        """The number of rows; None without end."""
        return None if self._epochs is None else self._epochs * self.summary.rows

    @property
    def per_epoch(self) -> float:
        """Rows of an epoch."""
        return self.summary.rows

    def pieces(self, rows: Int[np.ndarray, " rows"]) -> Pieces:
        """Return the pieces of some rows; those past the end have none."""
        epochs, places = np.divmod(rows, self.summary.rows)
        parts = [
            self._of_epoch(epoch, places[mine]).of_rows(mine)
            for epoch in range(int(epochs[0]), int(epochs.max()) + 1)
            if (self._epochs is None or epoch < self._epochs) and (mine := np.flatnonzero(epochs == epoch)).size
        ]
        return Pieces.joined(parts)

    def _of_epoch(self, epoch: int, places: Int64[np.ndarray, " rows"]) -> Pieces:
        blocks, starts = self._starts(epoch)
        at = starts.searchsorted(places, side="right") - 1
        parts: list[Pieces] = []
        for turn in np.unique(at).tolist() if len(blocks) > 1 else [0]:
            mine = np.flatnonzero(at == turn)
            parts.append(self._of_block(epoch, int(blocks[turn]), places[mine] - int(starts[turn])).of_rows(mine))
        return Pieces.joined(parts)

    def _of_block(self, epoch: int, number: int, inside: Int64[np.ndarray, " rows"]) -> Pieces:
        block = self._block(number)
        inside = self._permutation(epoch, number)(inside) if self._shuffled else inside
        begins = block.bounds[inside]
        counts = block.bounds[inside + 1] - begins
        rows = np.arange(len(inside)).repeat(counts)
        at = np.arange(len(rows)) + (begins - (counts.cumsum() - counts))[rows]
        return Pieces(block.documents[at], block.starts[at], block.stops[at], np.full(len(at), epoch), rows)

    def _permuted(self, epoch: int, number: int) -> LookedUp:
        stream = _ROWS_OF_BLOCK + epoch * len(self._sizes) + number
        return LookedUp(Permutation(int(self._sizes[number]), seed=self._seed, stream=stream))

    def _block_starts(self, epoch: int) -> tuple[Int64[np.ndarray, " blocks"], Int64[np.ndarray, " blocks"]]:
        """Return the blocks of an epoch in order, and the row with which each begins."""
        blocks = np.arange(len(self._sizes))
        if self._shuffled and len(blocks) > 1:
            blocks = Permutation(len(blocks), seed=self._seed, stream=_BLOCKS_OF_EPOCH + epoch)(blocks)
        sizes = self._sizes[blocks]
        return blocks, np.cumsum(sizes) - sizes

    def _packed(self, number: int) -> _Block:
        members = self._order.block(0, number).documents
        lengths = self.source.lengths[members]
        documents, starts, stops = cut_long(lengths, self._capacity, self._over_long)
        rows = pack(stops - starts, self._capacity, self._packing)
        by_row = np.argsort(rows, kind="stable")
        bounds = np.concatenate(([0], np.cumsum(np.bincount(rows))))
        return _Block(members[documents[by_row]], starts[by_row], stops[by_row], bounds)
