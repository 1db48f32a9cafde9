"""Servable: named, typed inputs and outputs with symbolic batch axes; callable."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = ["Servable", "TensorSpec"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype and shape; a string axis is symbolic: the same name stands for the same length everywhere."""

    dtype: str
    shape: tuple[int | str, ...]

    def bind(self, name: str, value: Any, axes: dict[str, int]) -> None:
        """Check a value against this spec and record the lengths of its symbolic axes in `axes`.

        Raises:
            ValueError: dtype, rank or an axis differs.
        """
        array = np.asarray(value)
        if str(array.dtype) != self.dtype or array.ndim != len(self.shape):
            raise ValueError(f"input {name!r} is {array.dtype}{list(array.shape)}; expected {self.dtype}{self.shape}")
        for length, axis in zip(array.shape, self.shape, strict=True):
            expected = axes.setdefault(axis, length) if isinstance(axis, str) else axis
            if length != expected:
                raise ValueError(
                    f"input {name!r} has shape {array.shape}; expected {self.shape} with {axis}={expected}"
                )


@runtime_checkable
class Servable(Protocol):
    """A function on named arrays."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What `__call__` takes."""
        ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What `__call__` returns."""
        ...

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Evaluate.

        Raises:
            ValueError: an input is missing, unknown, or does not fit its spec.
        """
        ...
