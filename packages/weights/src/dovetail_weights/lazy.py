"""Arrays that are read when they are needed, in whole or in part."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["Index", "Lazy", "full", "lazy_of", "normalize"]

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array of known shape and dtype that `read` brings into memory.

    Attributes:
        shape: lengths of its axes.
        dtype: its NumPy dtype.
        reader: returns the part at one slice per axis (step 1, bounds inside the shape).
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    reader: Callable[[Index], np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Any = ()) -> np.ndarray[Any, Any]:
        """Return the array, or the part at a tuple of slices of step 1; the memory may be shared.

        Raises:
            ValueError: the index is no tuple of at most as many slices of step 1 as there are axes.
        """
        return self.reader(normalize(index, self.shape))


def lazy_of(array: Any) -> Lazy:
    """Return an array in memory as one that can be read."""
    value = np.asarray(array)
    return Lazy(value.shape, value.dtype, lambda index: value[index])


def full(shape: tuple[int, ...]) -> Index:
    """Return the index of the whole array."""
    return tuple(slice(0, n) for n in shape)


def normalize(index: Any, shape: tuple[int, ...]) -> Index:
    """Return one slice per axis with bounds inside the shape."""
    given = index if isinstance(index, tuple) else (index,)
    if len(given) > len(shape) or not all(isinstance(part, slice) and part.step in (None, 1) for part in given):
        raise ValueError(f"index {index!r} on shape {shape}: expected at most {len(shape)} slices of step 1")
    bounds = [part.indices(n) for part, n in zip(given, shape, strict=False)]
    rest = full(shape[len(given) :])
    return (*(slice(start, max(start, stop)) for start, stop, _ in bounds), *rest)
