"""Plain files of tokens: ``.npy`` arrays, and ``.bin`` without a header as nanoGPT and llm.c write them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from dovetail_data._errors import CorpusError
from dovetail_data.scanning import ScannedTokens
from dovetail_data.tokens import document_index

__all__ = ["FileTokens"]

_BLOCK = 1 << 22  # tokens


class FileTokens(ScannedTokens):
    """The documents of some files, memory-mapped; file after file in the order given.

    Args:
        paths: files that end in ``.npy`` (one axis of integers), or others, which hold nothing but ids.
        eos_id: a document ends with each of these; what follows the last one in a file is a document, too. None makes
            each file one document.
        dtype: of files without a header.
        header: bytes to leave out at the beginning of these.
        vocab_size: one more than the largest possible id; None for the largest that occurs.

    Raises:
        CorpusError: a file is damaged or holds something else, or an id is negative or outside the vocabulary; the
            message names it.
        ValueError: no paths.
        FileNotFoundError: a file does not exist.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        eos_id: int | None = None,
        dtype: Any = "<u2",
        header: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        self.paths = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
        if not self.paths:
            raise ValueError("no paths; expected at least one file")
        arrays = [_opened(path, np.dtype(dtype), header) for path in self.paths]
        counts = [_lengths(array, eos_id) for array in arrays]
        self._documents = np.concatenate(([0], np.cumsum([len(part) for part in counts])))
        lengths = np.concatenate(counts)
        super().__init__(arrays, self.paths, lengths, vocab_size)

    def origin(self, document: int) -> str:
        """Return the file's name and the document's number in it."""
        index = document_index(document, len(self))
        file = int(np.searchsorted(self._documents, index, side="right")) - 1
        return f"{self.paths[file].name}:{index - int(self._documents[file])}"


def _opened(path: Path, dtype: np.dtype[Any], header: int) -> Integer[np.ndarray, " tokens"]:
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise CorpusError(f"{path} cannot be read as .npy ({error})") from error
    else:
        size = path.stat().st_size - header
        if size < 0 or size % dtype.itemsize:
            raise CorpusError(
                f"{path} has {size} bytes after a header of {header}; expected a multiple of {dtype.itemsize}"
            )
        array = np.memmap(path, dtype, "r", header) if size else np.empty(0, dtype)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise CorpusError(f"{path} holds {array.dtype} of shape {array.shape}; expected one axis of integers")
    return np.asarray(array)


def _lengths(array: Integer[np.ndarray, " tokens"], eos_id: int | None) -> Int64[np.ndarray, " documents"]:
    """Return the tokens of each document of a file."""
    ends = [np.zeros(1, np.int64)]
    if eos_id is not None:
        starts = range(0, len(array), _BLOCK)
        ends += [first + 1 + np.flatnonzero(array[first : first + _BLOCK] == eos_id) for first in starts]
    found = np.concatenate([*ends, [len(array)]])
    lengths = np.diff(found)
    return lengths[:-1] if not lengths[-1] else lengths
