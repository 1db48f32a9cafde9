"""What the kits share: the error that names a broken rule, exact comparison of pytrees, calls with a time limit."""

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols import paths

T = TypeVar("T")

__all__ = ["ConformanceError", "close_to", "difference", "is_key", "require", "require_raises", "within"]


class ConformanceError(AssertionError):
    """An implementation breaks a rule of its contract; the message is the rule and the values that break it."""


def require(holds: Any, rule: str, **values: Any) -> None:
    """Raise ConformanceError with the rule and the values unless `holds`."""
    if not holds:
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ConformanceError(f"{rule}; got {shown}" if shown else rule)


def require_raises(
    kinds: type[Exception] | tuple[type[Exception], ...],
    rule: str,
    call: Callable[[], Any],
    *,
    says: Sequence[str] = (),
) -> None:
    """Raise ConformanceError unless `call` raises one of `kinds` with a message that contains each of `says`."""
    try:
        value = call()
    except kinds as error:
        missing = [part for part in says if part not in str(error)]
        require(not missing, f"{rule}; the message must name it", missing=missing, message=str(error))
    except Exception as error:
        raise ConformanceError(f"{rule}; got {type(error).__name__}: {error}") from error
    else:
        raise ConformanceError(f"{rule}; got no error but {value!r}")


def is_key(leaf: Any) -> bool:
    """Tell whether a leaf is an array of typed random keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _leaf_difference(got: Any, expected: Any) -> str | None:
    if is_key(got) != is_key(expected):
        return f"{getattr(got, 'dtype', type(got))} instead of {getattr(expected, 'dtype', type(expected))}"
    if is_key(expected):
        if got.dtype != expected.dtype:
            return f"{got.dtype} instead of {expected.dtype}"
        got, expected = jax.random.key_data(got), jax.random.key_data(expected)
    left, right = np.asarray(got), np.asarray(expected)
    if left.dtype != right.dtype or left.shape != right.shape:
        return f"{left.dtype}{list(left.shape)} instead of {right.dtype}{list(right.shape)}"
    if left.tobytes() != right.tobytes():
        return f"{_excerpt(left)} instead of {_excerpt(right)}"
    return None


def _excerpt(array: np.ndarray) -> str:
    return np.array2string(array, threshold=8, edgeitems=3).replace("\n", "")


def difference(got: Any, expected: Any) -> str | None:
    """Return where two pytrees differ in address, dtype, shape or any bit, or None where they are the same."""
    left, right = paths.flatten(got), paths.flatten(expected)
    if list(left) != list(right):
        return f"leaves {sorted(left)} instead of {sorted(right)}"
    for address in right:
        text = _leaf_difference(left[address], right[address])
        if text is not None:
            return f"{address or 'the value'}: {text}"
    return None


def close_to(got: Any, expected: Any, tolerance: float) -> float | None:
    """Return the largest difference relative to the largest expected value, or None when it is within `tolerance`."""
    left, right = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if left.shape != right.shape:
        return float("inf")
    if not left.size:
        return None
    error = float(np.max(np.abs(left - right)) / max(1.0, float(np.max(np.abs(right)))))
    return None if error <= tolerance else error


def within(seconds: float, rule: str, call: Callable[[], T]) -> T:
    """Return what `call` returns, raise what it raises, or ConformanceError after the time limit."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    require(results, f"{rule} (waited {seconds:g} s)")
    return results[0]
