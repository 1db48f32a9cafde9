"""Indexed datasets of Megatron-LM: a ``.bin`` of tokens and an ``.idx`` with the lengths of its documents, both ways.

Layout of the index, little-endian: 9 bytes of magic, u64 version, u8 code of the dtype, u64 number of sequences, u64 of
document bounds; then int32 lengths and int64 byte offsets of the sequences, and the int64 numbers of the sequences that
documents begin with.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dovetail_data._errors import CorpusError
from dovetail_data.layout import write_whole
from dovetail_data.scanning import ScannedTokens
from dovetail_data.tokens import TokenSource, document_index

__all__ = ["MegatronTokens", "write_megatron"]

_MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_BLOCK = 1 << 22  # tokens written at a time


class MegatronTokens(ScannedTokens):
    """The documents of an indexed dataset, memory-mapped.

    Args:
        prefix: the path without ``.bin`` and ``.idx``, or either file's.
        vocab_size: one more than the largest possible id; None for the largest that occurs.

    Raises:
        CorpusError: a file is damaged, the two do not fit, or an id is negative or outside the vocabulary; the message
            names the file.
        FileNotFoundError: a file does not exist.
    """

    def __init__(self, prefix: str | os.PathLike[str], *, vocab_size: int | None = None) -> None:
        prefix = Path(prefix)
        prefix = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
        self.path = prefix.with_name(prefix.name + ".bin")
        index = prefix.with_name(prefix.name + ".idx")
        dtype, lengths = _read_index(index, self.path)
        tokens = np.memmap(self.path, dtype, "r") if lengths.any() else np.empty(0, dtype)
        super().__init__([np.asarray(tokens)], [self.path], lengths, vocab_size)

    def origin(self, document: int) -> str:
        """Return the file's name and the document's number."""
        return f"{self.path.name}:{document_index(document, len(self))}"


def write_megatron(source: TokenSource, prefix: str | os.PathLike[str]) -> None:
    """Write a source as an indexed dataset: uint16 for less than 65,500 ids, as there, else int32; a sequence each.

    Args:
        source: whose documents are written in their order.
        prefix: the path without ``.bin`` and ``.idx``; files that are there are replaced, the index last.

    Raises:
        ValueError: a document has 2**31 tokens or more.
    """
    prefix = Path(prefix)
    lengths = source.lengths
    if len(lengths) and lengths.max() >= 2**31:
        raise ValueError(f"document {lengths.argmax()} has {lengths.max()} tokens; the format holds less than 2**31")
    code, dtype = (8, np.dtype("<u2")) if source.vocab_size < 65_500 else (4, np.dtype("<i4"))
    ends = np.cumsum(lengths, dtype=np.int64)
    write_whole(prefix.with_name(prefix.name + ".bin"), _blocks(source, ends, dtype))
    head = _HEAD.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1)
    parts = [
        np.frombuffer(head, np.uint8),
        lengths.astype("<i4"),
        ((ends - lengths) * dtype.itemsize).astype("<i8"),
        np.arange(len(lengths) + 1, dtype="<i8"),
    ]
    write_whole(prefix.with_name(prefix.name + ".idx"), parts)


def _blocks(source: TokenSource, ends: Int64[np.ndarray, " documents"], dtype: np.dtype[Any]) -> Iterator[Any]:
    """Yield all tokens, a few documents at a time."""
    lengths, first = source.lengths, 0
    while first < len(lengths):
        limit = int(ends[first] - lengths[first]) + _BLOCK
        last = max(int(np.searchsorted(ends, limit, side="right")), first + 1)
        ids = np.arange(first, last)
        yield source.gather(ids, np.zeros_like(ids), lengths[ids]).astype(dtype)
        first = last


def _read_index(index: Path, tokens: Path) -> tuple[str, Int64[np.ndarray, " documents"]]:
    """Return the dtype and the lengths of the documents."""
    data = index.read_bytes()
    if len(data) < _HEAD.size or data[:9] != _MAGIC:
        raise CorpusError(f"{index} begins with {data[:9]!r}; expected a Megatron index, {_MAGIC!r}")
    _, version, code, sequences, bounds = _HEAD.unpack_from(data)
    if version != 1 or code not in _DTYPES:
        raise CorpusError(f"{index} has version {version} and dtype code {code}; expected 1 and one of {list(_DTYPES)}")
    size = _HEAD.size + 12 * sequences + 8 * bounds
    if len(data) not in (size, size + sequences):  # multimodal ones have a byte more per sequence
        raise CorpusError(f"{index} has {len(data)} bytes; expected {size} for {sequences} sequences")
    lengths = np.frombuffer(data, "<i4", sequences, _HEAD.size).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, _HEAD.size + 4 * sequences)
    begins = np.frombuffer(data, "<i8", bounds, _HEAD.size + 12 * sequences)
    width = np.dtype(_DTYPES[code]).itemsize
    ends = np.cumsum(lengths)
    if (lengths < 0).any() or not np.array_equal(offsets, (ends - lengths) * width):
        raise CorpusError(f"{index} is damaged: its offsets are not those of its lengths")
    if bounds < 1 or begins[0] != 0 or begins[-1] != sequences or (np.diff(begins) < 0).any():
        raise CorpusError(f"{index} is damaged: its documents do not cover its sequences")
    expected = int(ends[-1]) * width if sequences else 0
    if tokens.stat().st_size != expected:
        raise CorpusError(f"{tokens} has {tokens.stat().st_size} bytes; {index.name} says {expected}")
    ends = np.concatenate(([0], ends))
    return _DTYPES[code], np.diff(ends[begins])
