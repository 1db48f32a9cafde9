"""In which order an epoch has its documents, block by block, so that the whole order is never in memory.

Up to 2**20 documents are one block: a permutation of all of them. More are cut into chunks of 1024 neighbours; the
chunks are permuted, a thousand of them in a row are a block, and the documents of a block are permuted again. What is
held is a sum per chunk, 8 MB for 10**9 documents, and the blocks that are in use, 16 MB each.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from dovetail_data.permutation import Permutation
from dovetail_data.tokens import TokenSource

__all__ = ["BLOCK", "CHUNK", "Block", "Order"]

BLOCK, CHUNK = 1 << 20, 1 << 10  # documents
_BLOCKS_KEPT = 4  # rows straddle two, and threads may be at work on the ones before
_BLOCK_STREAMS = 2**62  # epochs number the permutations of chunks, these and what follows those inside blocks


class Block(NamedTuple):
    """The documents of a block in their order.

    Attributes:
        documents: their numbers in the source.
        ends: where each one ends, in tokens from the block's beginning.
    """

    documents: Int64[np.ndarray, " documents"]
    ends: Int64[np.ndarray, " documents"]


class Order:
    """The orders of all epochs of a source under a seed.

    Attributes:
        blocks: how many an epoch has.
    """

    def __init__(self, source: TokenSource, seed: int, *, block: int | None = None, chunk: int | None = None) -> None:
        block, chunk = block or BLOCK, chunk or CHUNK
        self.source, self.seed = source, seed
        count = len(source)
        self._chunk = chunk if count > block else 1
        self._whole = count <= block
        self._chunks = 1 if self._whole else -(-count // chunk)
        self._per_block = max(block // chunk, 1)
        self.blocks = 1 if self._whole else -(-self._chunks // self._per_block)
        self._block = functools.lru_cache(_BLOCKS_KEPT)(self._compute_block)
        self._starts = functools.lru_cache(_BLOCKS_KEPT)(self._compute_starts)

    def block(self, epoch: int, number: int) -> Block:
        """Return one block of an epoch."""
        return self._block(epoch, number)

    def starts(self, epoch: int) -> Int64[np.ndarray, " blocks_and_end"]:
        """Return the token of the epoch with which each block begins, and how many tokens the epoch has."""
        return self._starts(epoch)

    def _compute_starts(self, epoch: int) -> Int64[np.ndarray, " blocks_and_end"]:
        if self._whole:
            return np.array([0, self.source.tokens], np.int64)
        sums = self._sums[self._order_of_chunks(epoch)]
        per_block = np.add.reduceat(sums, np.arange(0, self._chunks, self._per_block))
        return np.concatenate(([0], np.cumsum(per_block)))

    @functools.cached_property
    def _sums(self) -> Int64[np.ndarray, " chunks"]:
        """Tokens of each chunk; the lengths are read once, in order."""
        lengths, span = self.source.lengths, self._chunk * self._per_block
        parts = [
            np.add.reduceat(part := lengths[first : first + span], np.arange(0, len(part), self._chunk), dtype=np.int64)
            for first in range(0, len(lengths), span)
        ]
        return np.concatenate(parts)

    def _order_of_chunks(self, epoch: int) -> Int64[np.ndarray, " chunks"]:
        return Permutation(self._chunks, seed=self.seed, stream=epoch)(np.arange(self._chunks))

    def _compute_block(self, epoch: int, number: int) -> Block:
        count = len(self.source)
        if self._whole:
            documents = Permutation(count, seed=self.seed, stream=epoch)(np.arange(count))
        else:
            chunks = self._order_of_chunks(epoch)[number * self._per_block : (number + 1) * self._per_block]
            members = (chunks[:, None] * self._chunk + np.arange(self._chunk)).ravel()
            members = members[members < count]
            stream = _BLOCK_STREAMS + epoch * self.blocks + number
            documents = members[Permutation(len(members), seed=self.seed, stream=stream)(np.arange(len(members)))]
        return Block(documents, np.cumsum(self.source.lengths[documents], dtype=np.int64))
