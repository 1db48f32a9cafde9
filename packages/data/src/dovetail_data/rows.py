"""Puts pieces of documents into rows: tokens, segments and positions, without a loop over documents."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, Integer, Shaped

from dovetail_data.stream import Pieces

if TYPE_CHECKING:
    import dovetail_protocols

__all__ = ["assemble"]


def assemble(
    tokens: Integer[np.ndarray, " tokens"],
    learned: Integer[np.ndarray, " tokens"] | None,
    pieces: Pieces,
    count: int,
    *,
    seq_len: int,
    restart: bool,
    across: bool,
) -> "dovetail_protocols.LMBatch":
    """Make a batch of rows of at most `seq_len` + 1 tokens, padding what is missing at their ends.

    It is what `dovetail_protocols.split_rows` makes of whole rows.

    Args:
        tokens: those of all rows, one row after the other.
        learned: which of them are learned; None if all are.
        pieces: what the rows are made of.
        count: the number of rows.
        seq_len: T.
        restart: whether positions restart at each row (see `Plan`).
        across: whether the first token of a document is a target.
    """
    from dovetail_protocols import LMBatch  # imports jax on use, which a tokenizing process has no use for

    sizes = pieces.stops - pieces.starts
    ends = sizes.cumsum()
    begins = ends - sizes
    per_row = np.bincount(pieces.rows, minlength=count)
    firsts = per_row.cumsum() - per_row  # the first piece of each row
    lengths = np.bincount(pieces.rows, sizes, minlength=count).astype(np.int64)
    numbers = np.arange(1, len(sizes) + 1) - firsts[pieces.rows]  # segments
    zeros = begins if restart else begins - pieces.starts
    segments = numbers.astype(np.int32).repeat(sizes)
    positions = np.arange(len(segments), dtype=np.int32) - zeros.astype(np.int32).repeat(sizes)
    tokens, segments, positions = (_rows(flat, lengths, seq_len) for flat in (tokens, segments, positions))
    weights = np.ones((count, seq_len), np.float32)
    columns = begins - (lengths.cumsum() - lengths)[pieces.rows]  # where each piece begins in its row
    inside = columns > 0
    if not across:
        weights[pieces.rows[inside], columns[inside] - 1] = 0
    if len(segments) and lengths.min() <= seq_len:
        weights[np.arange(1, seq_len + 1) >= lengths[:, None]] = 0
    if learned is not None:
        weights *= _rows(learned, lengths, seq_len)[:, 1:]
    return LMBatch(
        tokens=np.ascontiguousarray(tokens[:, :-1], np.int32),
        targets=np.ascontiguousarray(tokens[:, 1:], np.int32),
        loss_weights=weights,
        positions=np.ascontiguousarray(positions[:, :-1]),
        segment_ids=np.ascontiguousarray(segments[:, :-1]),
    )


def _rows(flat: Shaped[np.ndarray, "_"], lengths: Int[np.ndarray, " rows"], seq_len: int) -> Any:
    """Return ``[rows, seq_len + 1]``, zero after the end of a row that is shorter."""
    if len(flat) == len(lengths) * (seq_len + 1):
        return flat.reshape(len(lengths), seq_len + 1)
    out = np.empty((len(lengths), seq_len + 1), flat.dtype)
    begin = 0
    for row, length in zip(out, lengths.tolist(), strict=True):
        row[:length] = flat[begin : begin + length]
        row[length:] = 0
        begin += length
    return out
