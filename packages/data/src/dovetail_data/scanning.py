"""Files of tokens that say nothing about themselves: they are read once, for a digest and to check their ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Int64, Integer

from dovetail_data._errors import CorpusError
from dovetail_data.layout import digest_of
from dovetail_data.mapped import MappedTokens

__all__ = ["ScannedTokens"]

_BLOCK = 1 << 22  # tokens


class ScannedTokens(MappedTokens):
    """The documents of such files; they are read once, when this is made.

    Args:
        arrays: the tokens of each file.
        paths: the files, for messages.
        lengths: of the documents (see `MappedTokens`).
        vocab_size: one more than the largest possible id; None for the largest that occurs.

    Raises:
        CorpusError: an id is negative or outside the vocabulary.
    """

    def __init__(
        self,
        arrays: Sequence[Integer[np.ndarray, "_"]],
        paths: Sequence[Path],
        lengths: Int64[np.ndarray, " documents"],
        vocab_size: int | None,
    ) -> None:
        self._vocab_size, self._fingerprint = _scan(arrays, paths, lengths, vocab_size)
        super().__init__(arrays, lengths, "<u2" if self._vocab_size <= 2**16 else "<u4")

    @property
    def fingerprint(self) -> str:
        """Digest of all tokens and document lengths, whatever the files, dtypes and paths."""
        return self._fingerprint

    @property
    def vocab_size(self) -> int:
        """As given, or one more than the largest id that occurs."""
        return self._vocab_size

    @property
    def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
        """Zeros: the files do not tell."""
        return np.zeros_like(self.lengths)


def _scan(
    arrays: Sequence[Integer[np.ndarray, "_"]],
    paths: Sequence[Path],
    lengths: Int64[np.ndarray, " documents"],
    vocab_size: int | None,
) -> tuple[int, str]:
    """Return the size of the vocabulary and a fingerprint of tokens and lengths, whatever files, dtypes and paths."""
    digest, largest, most = xxhash.xxh3_128(), -1, (vocab_size or 2**32) - 1
    for array, path in zip(arrays, paths, strict=True):
        for first in range(0, len(array), _BLOCK):
            block = array[first : first + _BLOCK]
            low, high = int(block.min()), int(block.max())
            if low < 0 or high > most:
                wrong = int(np.flatnonzero((block < 0) | (block > most))[0])
                raise CorpusError(f"{path} holds the id {block[wrong]} at token {first + wrong}; expected 0 to {most}")
            largest = max(largest, high)
            digest.update(block.astype("<u4").data)
    sizes = xxhash.xxh3_128_hexdigest(lengths.astype("<i8").tobytes())
    return vocab_size or largest + 1, digest_of([vocab_size, digest.hexdigest(), sizes])
