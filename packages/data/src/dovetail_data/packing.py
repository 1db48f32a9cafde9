"""Which documents share a row: first fit and best fit, from their lengths alone.

First fit keeps the order of the documents as far as a row allows (D. S. Johnson, 1973). Best fit takes the longest
first and puts each where the least is left over; documents of one length are placed together, so it takes time for
each length and not for each document (as in M. Krell et al., "Efficient sequence packing", 2021).
"""

from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Int, Int64

__all__ = ["OverLong", "Packing", "cut_long", "pack"]

Packing: TypeAlias = Literal["first_fit", "best_fit"]
OverLong: TypeAlias = Literal["split", "crop", "drop", "error"]
_Left: TypeAlias = dict[int, list[Any]]  # rows by the space that is left in them
OPEN_ROWS = 1024  # that first fit looks at; the fullest of more are closed


def pack(lengths: Int[np.ndarray, " pieces"], capacity: int, packing: Packing) -> Int64[np.ndarray, " pieces"]:
    """Return the row of each piece; rows are numbered from 0 and none is empty.

    Args:
        lengths: tokens of each piece, 1 to `capacity`.
        capacity: tokens of a row.
        packing: how.

    Raises:
        ValueError: an unknown packing, or a length out of range.

    >>> pack(np.array([3, 2, 2, 1]), 4, "first_fit").tolist()
    [0, 1, 1, 0]
    >>> pack(np.array([1, 2, 3, 2]), 4, "best_fit").tolist()
    [0, 1, 0, 1]
    """
    lengths = np.asarray(lengths, np.int64)
    if packing not in get_args(Packing):
        raise ValueError(f"packing={packing!r}; expected one of {get_args(Packing)}")
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths span {lengths.min()} to {lengths.max()}; expected 1 to {capacity}")
    return _first_fit(lengths, capacity) if packing == "first_fit" else _best_fit(lengths, capacity)


def _first_fit(lengths: Int64[np.ndarray, " pieces"], capacity: int) -> Int64[np.ndarray, " pieces"]:
    rows = np.empty(len(lengths), np.int64)
    left = np.full(OPEN_ROWS, capacity, np.int64)  # of the open rows; the first that is empty ends them
    numbers = np.zeros(OPEN_ROWS, np.int64)
    shortest = int(lengths.min()) if lengths.size else 1
    opened = used = 0
    for piece, length in enumerate(lengths.tolist()):
        slot = int((left[: used + 1] >= length).argmax())
        if slot == used:
            numbers[slot] = opened
            opened += 1
            used += 1
        left[slot] -= length
        rows[piece] = numbers[slot]
        if used == OPEN_ROWS - 1:
            used = _close(left, numbers, shortest, capacity)
    return rows


def _close(
    left: Int64[np.ndarray, " slots"], numbers: Int64[np.ndarray, " slots"], shortest: int, capacity: int
) -> int:
    """Keep the half of the open rows with most space, in their order; return how many."""
    used = len(left) - 1
    keep = np.sort(np.argsort(-left[:used], kind="stable")[: used // 2])
    keep = keep[left[keep] >= shortest]
    left[: len(keep)], numbers[: len(keep)] = left[keep], numbers[keep]
    left[len(keep) :] = capacity
    return len(keep)


def _best_fit(lengths: Int64[np.ndarray, " pieces"], capacity: int) -> Int64[np.ndarray, " pieces"]:
    rows = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order], append=0))  # the last of each length
    left: _Left = {}
    opened = first = 0
    for last in ends.tolist():
        pieces, length = order[first : last + 1], int(lengths[order[last]])
        first = last + 1
        for space in sorted(space for space in left if space >= length):
            pieces = _fill(pieces, rows, left, space, length)
            if not len(pieces):
                break
        if len(pieces):
            opened = _open(pieces, rows, left, opened, capacity, length)
    return rows


def _fill(
    pieces: Int64[np.ndarray, " pieces"],
    rows: Int64[np.ndarray, " all"],
    left: _Left,
    space: int,
    length: int,
) -> Int64[np.ndarray, " rest"]:
    """Put pieces of one length into the rows with so much space, as many as fit into each; return what is over."""
    open_rows = np.concatenate(left.pop(space))
    each = space // length
    count = min(-(-len(pieces) // each), len(open_rows))
    taken = min(len(pieces), count * each)
    rows[pieces[:taken]] = np.repeat(open_rows[:count], each)[:taken]
    _note(left, space, open_rows[count:])
    whole = taken // each
    _note(left, space - each * length, open_rows[:whole])
    _note(left, space - (taken - whole * each) * length, open_rows[whole:count])
    return pieces[taken:]


def _open(
    pieces: Int64[np.ndarray, " pieces"],
    rows: Int64[np.ndarray, " all"],
    left: _Left,
    opened: int,
    capacity: int,
    length: int,
) -> int:
    """Put pieces of one length into new rows; return how many rows there are."""
    count = -(-len(pieces) // (capacity // length))
    left.setdefault(capacity, []).append(np.arange(opened, opened + count))
    _fill(pieces, rows, left, capacity, length)
    return opened + count


def _note(left: _Left, space: int, rows: Int64[np.ndarray, " rows"]) -> None:
    if space and len(rows):
        left.setdefault(space, []).append(rows)


def cut_long(
    lengths: Int[np.ndarray, " documents"], capacity: int, over_long: OverLong
) -> tuple[Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"], Int64[np.ndarray, " pieces"]]:
    """Return the pieces that fit into a row: which document each is of, its start and its stop.

    Args:
        lengths: tokens of each document; those without any have no piece.
        capacity: tokens of a row, at least 2.
        over_long: what becomes of documents that are longer: ``split`` makes pieces that overlap by one token, so that
            each token but the first is a target once; ``crop`` keeps the beginning; ``drop`` leaves them out.

    Raises:
        ValueError: an unknown policy; or ``error``, and a document is longer.

    >>> [part.tolist() for part in cut_long(np.array([3, 0, 7]), 4, "split")]
    [[0, 2, 2], [0, 0, 3], [3, 4, 7]]
    """
    lengths = np.asarray(lengths, np.int64)
    if over_long not in get_args(OverLong):
        raise ValueError(f"over_long={over_long!r}; expected one of {get_args(OverLong)}")
    long = np.flatnonzero(lengths > capacity)
    if over_long == "error" and long.size:
        raise ValueError(
            f"{long.size} documents are longer than a row of {capacity} tokens, the first is document {long[0]} with "
            f"{lengths[long[0]]}; split, crop or drop them (over_long=)"
        )
    counts = np.minimum(lengths, 1)
    if over_long == "drop":
        counts[long] = 0
    elif over_long == "split":
        counts[long] = -(-(lengths[long] - 1) // (capacity - 1))
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = number * (capacity - 1)
    return documents, starts, np.minimum(starts + capacity, lengths[documents])
