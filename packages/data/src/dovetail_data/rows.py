"""Puts pieces of documents into rows: tokens, segments and positions, without a loop over documents."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int, Shaped

from dovetail_data.stream import Pieces

if TYPE_CHECKING:
    import dovetail_protocols

__all__ = ["assemble"]


def assemble(
    tokens: Int[np.ndarray, " tokens"], rows: Sequence[Pieces], *, seq_len: int, restart: bool, across: bool
) -> "dovetail_protocols.LMBatch":
    """Make a batch of rows of at most `seq_len` + 1 tokens, padding what is missing at their ends.

    Args:
        tokens: those of all rows, one row after the other.
        rows: the pieces of documents that each row is made of.
        seq_len: T.
        restart: whether positions restart at each row (see `Plan`).
        across: whether the first token of a document is a target.
    """
    from dovetail_protocols import split_rows  # imports jax on use, which a tokenizing process has no use for

    sizes = [row.stops - row.starts for row in rows]
    lengths = np.array([row.sum() for row in sizes])
    numbers = [np.arange(1, len(row) + 1, dtype=np.int32) for row in sizes]  # segments
    zeros = [np.cumsum(row) - row for row in sizes]  # the column in which a piece, or its document, begins
    if not restart:
        zeros = [first - row.starts for first, row in zip(zeros, rows, strict=True)]
    repeats = np.concatenate(sizes)
    segments = _rows(np.repeat(np.concatenate(numbers), repeats), lengths, seq_len)
    columns = np.broadcast_to(np.arange(seq_len + 1), segments.shape)
    positions = columns - _rows(np.repeat(np.concatenate(zeros), repeats), lengths, seq_len)
    positions = np.where(segments == 0, 0, positions).astype(np.int32)
    batch = split_rows(_rows(tokens, lengths, seq_len), segments, positions)
    if across:
        return batch._replace(loss_weights=(segments[:, 1:] != 0).astype(np.float32))
    return batch


def _rows(
    flat: Shaped[np.ndarray, " tokens"], lengths: Int[np.ndarray, " rows"], seq_len: int
) -> Shaped[np.ndarray, "rows columns"]:
    """Return ``[rows, seq_len + 1]``, zero after the end of a row that is shorter."""
    if len(flat) == len(lengths) * (seq_len + 1):
        return flat.reshape(len(lengths), seq_len + 1)
    out = np.zeros((len(lengths), seq_len + 1), flat.dtype)
    out[np.arange(seq_len + 1) < lengths[:, None]] = flat
    return out
