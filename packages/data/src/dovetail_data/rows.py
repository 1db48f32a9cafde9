"""Puts a range of the stream into rows: tokens, segments and positions, without a loop over documents."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Shaped

from dovetail_data.stream import Pieces

if TYPE_CHECKING:
    import dovetail_protocols

__all__ = ["assemble"]


def assemble(
    tokens: Int[np.ndarray, " tokens"], pieces: Pieces, *, rows: int, seq_len: int, restart: bool, across: bool
) -> "dovetail_protocols.LMBatch":
    """Cut consecutive tokens into rows of `seq_len` + 1 with stride `seq_len`, padding what is missing at the end.

    Args:
        tokens: at most ``rows * seq_len + 1``.
        pieces: the pieces of documents that they are made of.
        rows: how many rows.
        seq_len: T.
        restart: whether positions restart at each row (see `plan`).
        across: whether the first token of a document is a target.
    """
    from dovetail_protocols import split_rows  # imports jax, which a tokenizing process has no use for

    sizes = pieces.stops - pieces.starts
    heads = np.cumsum(sizes) - sizes  # where each piece begins, as an index into tokens
    numbers = _rows(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), rows, seq_len)
    zeros = _rows(np.repeat(heads if restart else heads - pieces.starts, sizes), rows, seq_len)
    row_starts = np.arange(rows)[:, None] * seq_len
    places = row_starts + np.arange(seq_len + 1)
    positions = places - (np.maximum(zeros, row_starts) if restart else zeros)
    segments = numbers - numbers[:, :1] + 1
    padding = places >= len(tokens)
    if padding[-1, -1]:
        segments, positions = np.where(padding, 0, segments), np.where(padding, 0, positions)
    batch = split_rows(_rows(tokens, rows, seq_len), segments, positions.astype(np.int32))
    if across:
        return batch._replace(loss_weights=(segments[:, 1:] != 0).astype(np.float32))
    return batch


def _rows(flat: Shaped[np.ndarray, " tokens"], rows: int, seq_len: int) -> Any:
    """Return a view ``[rows, seq_len + 1]`` in which each row begins with the last element of the row before."""
    missing = rows * seq_len + 1 - len(flat)
    if missing:
        flat = np.concatenate((flat, np.zeros(missing, flat.dtype)))
    step = flat.itemsize
    return np.lib.stride_tricks.as_strided(flat, (rows, seq_len + 1), (seq_len * step, step), writeable=False)
