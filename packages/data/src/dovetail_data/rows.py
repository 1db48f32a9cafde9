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
    lasts = per_row.cumsum()
    firsts = lasts - per_row  # the first piece of each row
    lengths = np.bincount(pieces.rows, sizes, minlength=count).astype(np.int64)
    columns = begins - (lengths.cumsum() - lengths)[pieces.rows]  # where each piece begins in its row

    inputs, kept = sizes.copy(), lengths.copy()  # without the last token of whole rows, which is a target only
    whole = np.flatnonzero(lengths == seq_len + 1)
    inputs[lasts[whole] - 1] -= 1
    kept[whole] = seq_len
    numbers = np.arange(1, len(sizes) + 1) - firsts[pieces.rows]
    zeros = columns if restart else columns - pieces.starts
    segments = _rows(numbers.astype(np.int32).repeat(inputs), kept, seq_len)
    positions = np.arange(seq_len, dtype=np.int32) - _rows(zeros.astype(np.int32).repeat(inputs), kept, seq_len)

    weights = np.ones((count, seq_len), np.float32)
    if not across:
        inside = columns > 0
        weights[pieces.rows[inside], columns[inside] - 1] = 0
    for row in np.flatnonzero(lengths <= seq_len).tolist():
        weights[row, max(lengths[row] - 1, 0) :] = 0
        positions[row, lengths[row] :] = 0
    if learned is not None:
        weights *= _rows(learned, lengths, seq_len + 1)[:, 1:]
    tokens = _rows(tokens, lengths, seq_len + 1)
    return LMBatch(
        tokens=np.ascontiguousarray(tokens[:, :-1], np.int32),
        targets=np.ascontiguousarray(tokens[:, 1:], np.int32),
        loss_weights=weights,
        positions=positions,
        segment_ids=segments,
    )


def _rows(flat: Shaped[np.ndarray, "_"], lengths: Int[np.ndarray, " rows"], width: int) -> Any:
    """Return ``[rows, width]``, zero after the end of a row that is shorter."""
    if len(flat) == len(lengths) * width:
        return flat.reshape(len(lengths), width)
    out = np.empty((len(lengths), width), flat.dtype)
    begin = 0
    for row, length in zip(out, lengths.tolist(), strict=True):
        row[:length] = flat[begin : begin + length]
        row[length:] = 0
        begin += length
    return out
