"""Metrics: deterministic values apart from wall times, and any number of sinks."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

__all__ = ["Sink"]


@runtime_checkable
class Sink(Protocol):
    """Receives numbers. Deterministic values and timings come through different methods and stay apart."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record values that a repeated run reproduces bit by bit."""
        ...

    def timings(self, step: int, values: Mapping[str, float]) -> None:
        """Record wall times and rates."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...
