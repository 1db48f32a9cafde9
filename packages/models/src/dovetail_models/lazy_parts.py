"""What surgery makes new parameters of: parts of others, constants, sums, and numbers that a seed determines."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from dovetail_weights import Lazy, WeightsError

__all__ = [
    "Array",
    "calculated",
    "cast",
    "checked",
    "computing_dtype",
    "constant",
    "elementwise",
    "finite",
    "generator",
    "taken",
    "uniform",
]

Array = np.ndarray[Any, np.dtype[Any]]


def taken(tensor: Lazy, axis: int, indices: Sequence[int]) -> Lazy:
    """Return the parts of a tensor at indices along an axis, in that order; an index may come more than once.

    What lies between the least and the largest index of a part is read with it.
    """
    chosen = np.asarray(indices, np.int64)

    def read(index: Any) -> Array:
        wanted = chosen[index[axis]]
        start, stop = (int(wanted.min()), int(wanted.max()) + 1) if wanted.size else (0, 0)
        part = tensor.read((*index[:axis], slice(start, stop), *index[axis + 1 :]))
        straight = wanted.size == stop - start and bool((np.diff(wanted) == 1).all())
        return part if straight else np.take(part, wanted - start, axis)

    return Lazy((*tensor.shape[:axis], len(chosen), *tensor.shape[axis + 1 :]), tensor.dtype, read)


def constant(tensor: Lazy, value: float) -> Lazy:
    """Return a tensor of the same shape and dtype with one value everywhere."""
    return Lazy(
        tensor.shape, tensor.dtype, lambda index: np.full([s.stop - s.start for s in index], value, tensor.dtype)
    )


def calculated(tensor: Lazy, function: Callable[[Array, Any], Array]) -> Lazy:
    """Return what ``function(part, index)`` makes of a tensor's parts, computed in `computing_dtype`."""

    def read(index: Any) -> Array:
        return function(tensor.read(index).astype(computing_dtype(tensor)), index).astype(tensor.dtype)

    return Lazy(tensor.shape, tensor.dtype, read)


def elementwise(function: Callable[..., Any], *tensors: Lazy) -> Lazy:
    """Return what a function makes of the elements at the same place of tensors of one shape, in the first one's dtype.

    It is given float32, or float64 where one of them is float64.

    Raises:
        ValueError: the shapes differ.
    """
    first = tensors[0]
    if any(tensor.shape != first.shape for tensor in tensors):
        raise ValueError(f"tensors have the shapes {[tensor.shape for tensor in tensors]}; expected one shape for all")
    dtype = np.result_type(*map(computing_dtype, tensors))

    def read(index: Any) -> Array:
        return np.asarray(function(*(tensor.read(index).astype(dtype) for tensor in tensors))).astype(first.dtype)

    return Lazy(first.shape, first.dtype, read)


def checked(address: str, tensor: Lazy) -> Lazy:
    """Return a tensor whose values are seen to be finite when they are read, if they are floats; see `finite`."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor

    def read(index: Any) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is seen below
            return finite(f"{address}, of {tensor.dtype},", np.asarray(tensor.read(index)))

    return Lazy(tensor.shape, tensor.dtype, read)


def cast(name: str, tensor: Lazy, dtype: Any) -> Lazy:
    """Return a tensor in another dtype where it holds floats and one is given.

    Raises:
        WeightsError: when it is read: the dtype cannot hold its values.
    """
    if dtype is None or not jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor
    target = jnp.dtype(dtype)

    def read(index: Any) -> Array:
        value = tensor.read(index)
        with np.errstate(over="ignore"):
            made = value.astype(target)
        if not np.array_equal(np.isfinite(made), np.isfinite(value)):
            raise WeightsError(f"tensor {name!r} has values that {target} cannot hold; keep {tensor.dtype} or bfloat16")
        return made

    return Lazy(tensor.shape, target, read)


def computing_dtype(tensor: Any) -> np.dtype[Any]:
    """Return the dtype in which new values are computed: float32, or float64 for float64."""
    return np.dtype(np.float64 if tensor.dtype == np.float64 else np.float32)


def finite(what: str, value: Array) -> Array:
    """Return a value.

    Raises:
        WeightsError: it has numbers that are none.
    """
    if value.size and not np.isfinite(value).all():
        raise WeightsError(
            f"{what} has values that are not finite; expected numbers. Is the checkpoint damaged, or its dtype narrow?"
        )
    return value


def uniform(seed: int, name: str, shape: tuple[int, ...], index: Any) -> Array:
    """Return a part of an array of numbers in [0, 1), which the seed and the name of the array determine.

    Only the rows of the part are made, so that a tensor's parts may be read apart from each other. It has at least one
    axis.

    >>> whole = uniform(0, "a", (5, 3), (slice(0, 5), slice(0, 3)))
    >>> bool((uniform(0, "a", (5, 3), (slice(2, 4), slice(1, 3))) == whole[2:4, 1:3]).all())
    True
    """
    rows, *rest = index
    inner = math.prod(shape[1:])
    start, count = rows.start * inner, (rows.stop - rows.start) * inner
    bits = _bits(seed, name).advance(start // 4)  # that is how many numbers a step makes
    raw = bits.random_raw(start % 4 + count)[start % 4 :]
    raw >>= np.uint64(11)  # a float64 has 53 bits
    return (raw * 2.0**-53).reshape(-1, *shape[1:])[(slice(None), *rest)]


def generator(seed: int, name: str) -> np.random.Generator:
    """Return a source of random numbers that the seed and a name determine."""
    return np.random.Generator(_bits(seed, name))


def _bits(seed: int, name: str) -> np.random.Philox:
    key = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "little"))
