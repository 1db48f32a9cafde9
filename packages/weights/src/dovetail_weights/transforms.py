"""Reversible changes of arrays on their way from a checkpoint's names to a model's addresses.

A transform takes a list of lazy arrays and returns another list; its `inverse` is again a transform. Parts are pulled
through: to read a slice of the result only what it needs is read, so that a sharded load reads each byte once.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dovetail_weights.copying import assign, blank
from dovetail_weights.errors import WeightsError
from dovetail_weights.lazy import Index, Lazy, full

__all__ = ["Cast", "Concat", "Reshape", "Split", "Stack", "Transform", "Transpose", "Unstack"]

Array = np.ndarray[Any, Any]


class Transform(Protocol):
    """What a rule is made of."""

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """Return the arrays after the change; `WeightsError` if their shapes do not fit."""
        ...

    def inverse(self) -> "Transform":
        """Return the transform that undoes this one."""
        ...


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Permutes the axes of every array, as `numpy.transpose`; by default swaps two."""

    axes: tuple[int, ...] = (1, 0)

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        return [self._one(array) for array in arrays]

    def _one(self, array: Lazy) -> Lazy:
        if sorted(self.axes) != list(range(len(array.shape))):
            raise WeightsError(f"{self} does not fit an array of shape {array.shape}")

        def read(index: Index) -> Array:
            return array.read(tuple(index[self.axes.index(a)] for a in range(len(index)))).transpose(self.axes)

        return Lazy(tuple(array.shape[a] for a in self.axes), array.dtype, read)

    def inverse(self) -> "Transpose":
        """See `Transform`."""
        return Transpose(tuple(self.axes.index(a) for a in range(len(self.axes))))


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Gives every array of shape `theirs` the shape `ours`, in row-major order."""

    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    def __post_init__(self) -> None:
        if math.prod(self.theirs) != math.prod(self.ours) or min((*self.theirs, *self.ours), default=0) < 0:
            raise WeightsError(f"{self}: the two shapes must have equally many elements")

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        return [self._one(array) for array in arrays]

    def _one(self, array: Lazy) -> Lazy:
        if array.shape != tuple(self.theirs):
            raise WeightsError(f"{self} does not fit an array of shape {array.shape}")
        return Lazy(tuple(self.ours), array.dtype, lambda index: _read_reshaped(array, tuple(self.ours), index))

    def inverse(self) -> "Reshape":
        """See `Transform`."""
        return Reshape(self.ours, self.theirs)


def _read_reshaped(array: Lazy, shape: tuple[int, ...], index: Index) -> Array:
    """Read a part: along each group of axes that one axis was split into, from the first of them as a range."""
    need: list[slice] = []
    shape_read: list[int] = []
    rest: list[slice] = []
    for before, after in _groups(array.shape, shape):
        parts = [index[a] for a in after]
        sizes = [shape[a] for a in after]
        if len(before) == 1 and after:
            inner = math.prod(sizes[1:])
            need.append(slice(parts[0].start * inner, parts[0].stop * inner))
            shape_read += [parts[0].stop - parts[0].start, *sizes[1:]]
            rest += [slice(None), *parts[1:]]
        else:
            need += full(tuple(array.shape[b] for b in before))
            shape_read += sizes
            rest += parts
    return array.read(tuple(need)).reshape(shape_read)[tuple(rest)]


def _groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes of two shapes that hold equally many elements; one run for empty arrays."""
    if 0 in a:
        return [(list(range(len(a))), list(range(len(b))))]
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = ([i], a[i]) if i < len(a) else ([], 1), ([j], b[j]) if j < len(b) else ([], 1)
        (axes_a, size_a), (axes_b, size_b) = left, right
        i, j = i + len(axes_a), j + len(axes_b)
        while size_a != size_b:
            if size_a < size_b:
                axes_a, size_a, i = [*axes_a, i], size_a * a[i], i + 1
            else:
                axes_b, size_b, j = [*axes_b, j], size_b * b[j], j + 1
        groups.append((axes_a, axes_b))
    return groups


@dataclasses.dataclass(frozen=True)
class Cast:
    """Casts arrays of dtype `theirs` to `ours`; exact in both directions where `ours` holds every value."""

    theirs: Any
    ours: Any

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        target = np.dtype(self.ours)
        return [Lazy(a.shape, target, _caster(a, target)) for a in arrays]

    def inverse(self) -> "Cast":
        """See `Transform`."""
        return Cast(self.ours, self.theirs)


def _caster(array: Lazy, dtype: np.dtype[Any]) -> Callable[[Index], Array]:
    return lambda index: array.read(index).astype(dtype, copy=False)


def _inserted(index: Index, axis: int, part: slice) -> Index:
    return (*index[:axis], part, *index[axis:])


@dataclasses.dataclass(frozen=True)
class Stack:
    """Stacks each `count` consecutive arrays of equal shape along a new axis."""

    count: int
    axis: int = 0

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        if self.count < 1 or len(arrays) % self.count:
            raise WeightsError(f"{self} does not fit {len(arrays)} arrays")
        starts = range(0, len(arrays), self.count)
        return [self._one(arrays[i : i + self.count]) for i in starts]

    def _one(self, arrays: Sequence[Lazy]) -> Lazy:
        shape, dtype = arrays[0].shape, arrays[0].dtype
        if any(a.shape != shape or a.dtype != dtype for a in arrays) or not 0 <= self.axis <= len(shape):
            kinds = sorted({f"{a.dtype}{list(a.shape)}" for a in arrays})
            raise WeightsError(f"{self} does not fit arrays of {', '.join(kinds)}")

        def read(index: Index) -> Array:
            chosen, inner = arrays[index[self.axis]], index[: self.axis] + index[self.axis + 1 :]
            out = blank([part.stop - part.start for part in index], dtype)
            for i, array in enumerate(chosen):
                at = _inserted((slice(None),) * len(inner), self.axis, slice(i, i + 1))
                assign(out[at], np.expand_dims(array.read(inner), self.axis))
            return out

        return Lazy((*shape[: self.axis], self.count, *shape[self.axis :]), dtype, read)

    def inverse(self) -> "Unstack":
        """See `Transform`."""
        return Unstack(self.count, self.axis)


@dataclasses.dataclass(frozen=True)
class Unstack:
    """Takes each array apart along an axis of length `count`."""

    count: int
    axis: int = 0

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        return [self._part(array, i) for array in arrays for i in range(self.count)]

    def _part(self, array: Lazy, i: int) -> Lazy:
        if not 0 <= self.axis < len(array.shape) or array.shape[self.axis] != self.count:
            raise WeightsError(f"{self} does not fit an array of shape {array.shape}")

        def read(index: Index) -> Array:
            return array.read(_inserted(index, self.axis, slice(i, i + 1))).squeeze(self.axis)

        return Lazy(array.shape[: self.axis] + array.shape[self.axis + 1 :], array.dtype, read)

    def inverse(self) -> Stack:
        """See `Transform`."""
        return Stack(self.count, self.axis)


@dataclasses.dataclass(frozen=True)
class Concat:
    """Joins arrays, whose lengths along `axis` are `sizes`, into one."""

    sizes: tuple[int, ...]
    axis: int = 0

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        lengths = tuple(a.shape[self.axis] if 0 <= self.axis < len(a.shape) else -1 for a in arrays)
        others = {(*a.shape[: self.axis], *a.shape[self.axis + 1 :], a.dtype) for a in arrays}
        if lengths != tuple(self.sizes) or len(others) != 1:
            kinds = [f"{a.dtype}{list(a.shape)}" for a in arrays]
            raise WeightsError(f"{self} does not fit arrays of {', '.join(kinds)}")
        shape, dtype = list(arrays[0].shape), arrays[0].dtype
        shape[self.axis] = sum(self.sizes)
        starts = [0, *itertools.accumulate(self.sizes)]

        def read(index: Index) -> Array:
            wanted = index[self.axis]
            out = blank([part.stop - part.start for part in index], dtype)
            for array, start, stop in zip(arrays, starts, starts[1:], strict=False):
                low, high = max(start, wanted.start), min(stop, wanted.stop)
                if low < high:
                    there = slice(low - wanted.start, high - wanted.start)
                    at = _replaced((slice(None),) * len(index), self.axis, there)
                    assign(out[at], array.read(_replaced(index, self.axis, slice(low - start, high - start))))
            return out

        return [Lazy(tuple(shape), dtype, read)]

    def inverse(self) -> "Split":
        """See `Transform`."""
        return Split(self.sizes, self.axis)


@dataclasses.dataclass(frozen=True)
class Split:
    """Takes one array apart along `axis` into pieces of the lengths `sizes`."""

    sizes: tuple[int, ...]
    axis: int = 0

    def apply(self, arrays: Sequence[Lazy]) -> list[Lazy]:
        """See `Transform`."""
        fits = len(arrays) == 1 and 0 <= self.axis < len(arrays[0].shape)
        if not fits or arrays[0].shape[self.axis] != sum(self.sizes):
            raise WeightsError(f"{self} does not fit arrays of shapes {[a.shape for a in arrays]}")
        starts = [0, *itertools.accumulate(self.sizes)][:-1]
        return [self._part(arrays[0], start, size) for start, size in zip(starts, self.sizes, strict=True)]

    def _part(self, array: Lazy, start: int, size: int) -> Lazy:
        def read(index: Index) -> Array:
            wanted = index[self.axis]
            return array.read(_replaced(index, self.axis, slice(wanted.start + start, wanted.stop + start)))

        shape = (*array.shape[: self.axis], size, *array.shape[self.axis + 1 :])
        return Lazy(shape, array.dtype, read)

    def inverse(self) -> Concat:
        """See `Transform`."""
        return Concat(self.sizes, self.axis)


def _replaced(index: Index, axis: int, part: slice) -> Index:
    return (*index[:axis], part, *index[axis + 1 :])
