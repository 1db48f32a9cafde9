"""Copies of arrays at the rate of memory, whatever the order of their axes, where jax can take them over.

A transpose that NumPy does in one go touches a cache line once per number; in tiles it touches each once. New memory
costs a page fault every 4 KB, which several threads share.
"""

import concurrent.futures
import itertools
import math
import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from dovetail_weights.header import ALIGNMENT

__all__ = ["assign", "blank", "copied"]

Array = np.ndarray[Any, Any]

LARGE = 1 << 22  # bytes from which on an array gets pages of its own, and of what a thread copies at a time
THREADS = 8  # at most
ROWS, COLUMNS = 256, 256  # of a tile: 256 KB of float32, which stay in a core's cache
SKEW = 64  # bytes between the rows of a tile, so that its columns fall into different sets of the cache


def blank(shape: Sequence[int], dtype: Any) -> Array:
    """Return a writable array of zeros at an aligned address.

    A large one is mapped: NumPy asks for pages of 2 MB, which some virtual machines need 2 s per GB to hand out.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or not hasattr(mmap, "MAP_PRIVATE"):
        memory = np.zeros(size + ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % ALIGNMENT
        return memory[start : start + size].view(dtype).reshape(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8).view(dtype).reshape(shape)


def copied(value: Array, dtype: Any = None) -> Array:
    """Return a copy in row-major order that jax can take over, cast to a dtype.

    >>> copied(np.arange(6, dtype=np.float32).reshape(2, 3).T, ml_dtypes.bfloat16).tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    out = blank(value.shape, value.dtype if dtype is None else dtype)
    if value.dtype == ml_dtypes.bfloat16 and out.dtype == np.float32:
        upper = int(sys.byteorder == "little")  # a bfloat16 is the upper half of a float32 whose lower half is 0
        assign(out.view(np.uint16).reshape(*value.shape, 2)[..., upper], value.view(np.uint16))
    else:
        assign(out, value)
    return out


def assign(to: Array, value: Array) -> None:
    """Do ``to[...] = value`` for arrays of one shape, by several threads, in tiles where the orders of axes differ."""
    to, value = _merged(to, value)
    if value.nbytes < 2 * LARGE:
        _assign(to, value)
        return
    outer = int(np.argmax(value.strides))
    pieces = min(math.ceil(value.nbytes / LARGE), value.shape[outer])
    bounds = [value.shape[outer] * piece // pieces for piece in range(pieces + 1)]
    parts = [(slice(None),) * outer + (slice(*pair),) for pair in itertools.pairwise(bounds)]
    with concurrent.futures.ThreadPoolExecutor(min(pieces, THREADS, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda part: _assign(to[part], value[part]), parts))


def _merged(to: Array, value: Array) -> tuple[Array, Array]:
    """Return both with axes made one that are neighbours in both, and without axes of length 1."""
    axes: list[tuple[int, int, int]] = []
    for length, stride, other in zip(to.shape, to.strides, value.strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1][1:] == (stride * length, other * length):
            axes[-1] = (axes[-1][0] * length, stride, other)
        else:
            axes.append((length, stride, other))
    lengths, strides, others = zip(*axes, strict=True) if axes else ((), (), ())
    reshaped = np.lib.stride_tricks.as_strided
    return reshaped(to, lengths, strides), reshaped(value, lengths, others, writeable=False)


def _assign(to: Array, value: Array) -> None:
    """Assign on this thread."""
    if value.ndim < 2 or value.strides[-1] == min(value.strides) or value.size <= ROWS * COLUMNS:
        to[...] = value
    elif value.ndim > 2:
        for part, given in zip(to, value, strict=True):
            _assign(part, given)
    else:
        _transpose(to, value)


def _transpose(to: Array, value: Array) -> None:
    """Assign a matrix by tiles, each by way of a buffer in the order of the source."""
    buffer = np.empty((ROWS, COLUMNS + SKEW // value.itemsize), value.dtype)
    rows, columns = value.shape
    for column in range(0, columns, ROWS):
        for row in range(0, rows, COLUMNS):
            source = value[row : row + COLUMNS, column : column + ROWS].T
            tile = buffer[: source.shape[0], : source.shape[1]]
            tile[...] = source
            to[row : row + COLUMNS, column : column + ROWS] = tile.T
