"""Which committed steps stay: small policies that are joined with ``|``.

A policy is a pure function from the committed steps to those that it wants to keep; a step stays when any of the
joined policies keeps it. The manager adds the newest step and the one it has just committed, whatever the policy.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

__all__ = ["Committed", "Policy", "all_steps", "best", "every", "latest"]


class Committed(NamedTuple):
    """A committed step and the metrics that were saved with it."""

    step: int
    metrics: Mapping[str, float]


class Policy:
    """Decides which steps stay; subclass it and define `kept` for another rule."""

    def kept(self, history: Sequence[Committed]) -> frozenset[int]:
        """Return the steps to keep out of `history`, which is sorted by step and has each step once."""
        raise NotImplementedError

    def __or__(self, other: "Policy") -> "Policy":
        if not isinstance(other, Policy):
            return NotImplemented
        return _Either(self, other)


@dataclasses.dataclass(frozen=True)
class _Either(Policy):
    left: Policy
    right: Policy

    def kept(self, history: Sequence[Committed]) -> frozenset[int]:
        return self.left.kept(history) | self.right.kept(history)


@dataclasses.dataclass(frozen=True)
class _Latest(Policy):
    n: int

    def kept(self, history: Sequence[Committed]) -> frozenset[int]:
        return frozenset(entry.step for entry in history[-self.n :])


@dataclasses.dataclass(frozen=True)
class _Every(Policy):
    n_steps: int

    def kept(self, history: Sequence[Committed]) -> frozenset[int]:
        return frozenset(entry.step for entry in history if entry.step % self.n_steps == 0)


@dataclasses.dataclass(frozen=True)
class _Best(Policy):
    metric: str
    n: int
    mode: Literal["min", "max"]

    def kept(self, history: Sequence[Committed]) -> frozenset[int]:
        sign = 1.0 if self.mode == "min" else -1.0
        values = [(sign * entry.metrics.get(self.metric, math.nan), -entry.step) for entry in history]
        ranked = sorted(value for value in values if not math.isnan(value[0]))
        return frozenset(-negated for _, negated in ranked[: self.n])


@dataclasses.dataclass(frozen=True)
class _All(Policy):
    def kept(self, history: Sequence[Committed]) -> frozenset[int]:
        return frozenset(entry.step for entry in history)


def latest(n: int) -> Policy:
    """Keep the `n` largest steps.

    >>> sorted(latest(2).kept([Committed(1, {}), Committed(5, {}), Committed(9, {})]))
    [5, 9]
    """
    return _Latest(_positive("n", n))


def every(n_steps: int) -> Policy:
    """Keep the steps that are divisible by `n_steps` (step 0 is).

    >>> sorted((every(10) | latest(1)).kept([Committed(10, {}), Committed(15, {}), Committed(17, {})]))
    [10, 17]
    """
    return _Every(_positive("n_steps", n_steps))


def best(metric: str, n: int = 1, *, mode: Literal["min", "max"] = "min") -> Policy:
    """Keep the `n` steps with the best value of a metric.

    Of equal values the later step is the better one. A step without the metric, or whose value is NaN, is never
    among the best.

    >>> history = [Committed(1, {"loss": 2.0}), Committed(2, {"loss": 2.0}), Committed(3, {"loss": float("nan")})]
    >>> sorted(best("loss").kept(history))
    [2]
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode={mode!r}; expected 'min' or 'max'")
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"metric={metric!r}; expected the name of a metric")
    return _Best(metric, _positive("n", n), mode)


def all_steps() -> Policy:
    """Keep every step."""
    return _All()


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; expected an integer of at least 1")
    return value
