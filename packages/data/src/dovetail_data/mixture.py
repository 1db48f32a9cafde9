"""Mixtures of sources whose weights change at given steps or tokens, and the source of every row."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Int, Int64

from dovetail_data.interleaving import Turns, shares
from dovetail_data.tokens import TokenSource

__all__ = ["Exhausted", "Mixture", "Timeline"]

_ENDLESS = 2**62  # rows
Exhausted: TypeAlias = Literal["drop", "stop"]
Unit: TypeAlias = Literal["steps", "tokens"]
Weights: TypeAlias = Mapping[str, float | int]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources by name, and how much of each: what `Plan` takes in place of one source.

    A row comes from one source. At every prefix of a stage the rows of each source are within one row of its weight's
    share. A source that has been read goes on with its next epoch, unless it has a limit.

    Attributes:
        sources: by name, all with one vocabulary.
        weights: shares of rows, of which only the proportions matter; 0 or no weight leaves a source out. Or stages:
            pairs of a start and weights, the first one at 0. A start is in the steps of the plan without skipped
            ranges, or in tokens (rows times T), rounded up to a row.
        unit: whether stages start at ``steps`` or ``tokens``.
        max_epochs: how many times a source is read at most.
        on_exhausted: what happens when a source with a limit has been read: ``drop`` leaves it out from then on, so
            that the others share its part; ``stop`` ends the plan, the row before the one that is not there.

    Raises:
        ValueError: weights of an unknown source or below zero, starts that do not rise from 0, different
            vocabularies, or a limit below 1.
    """

    sources: Mapping[str, TokenSource]
    weights: Weights | Sequence[tuple[int, Weights]]
    unit: Unit = "steps"
    max_epochs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    on_exhausted: Exhausted = "drop"

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("a mixture of no sources; expected at least one")
        for name in self.sources:
            if not name or not set(name) <= _PLAIN:
                raise ValueError(f"source {name!r}; expected letters, digits and any of ._/-")
        for name, value, known in (("unit", self.unit, Unit), ("on_exhausted", self.on_exhausted, Exhausted)):
            if value not in get_args(known):
                raise ValueError(f"{name}={value!r}; expected one of {get_args(known)}")
        sizes = {name: source.vocab_size for name, source in self.sources.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the sources have vocabularies of {sizes} ids; expected one size")
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"stages start at {starts}; expected numbers that rise from 0")
        for name, most in self.max_epochs.items():
            self._known(name, "max_epochs")
            if operator.index(most) < 1:
                raise ValueError(f"max_epochs of {name!r} is {most}; expected at least 1")
        for start, weights in self.stages:
            for name in weights:
                self._known(name, f"the stage at {start}")
            try:
                shares([weights.get(name, 0) for name in self.sources])
            except ValueError as error:
                raise ValueError(f"the stage at {start} {self.unit}: {error}") from None

    @property
    def stages(self) -> tuple[tuple[int, Weights], ...]:
        """Starts and weights."""
        if isinstance(self.weights, Mapping):
            return ((0, self.weights),)
        return tuple((operator.index(start), weights) for start, weights in self.weights)

    @property
    def vocab_size(self) -> int:
        """Of all sources."""
        return next(iter(self.sources.values())).vocab_size

    def _known(self, name: str, where: str) -> None:
        if name not in self.sources:
            raise ValueError(f"{where} names {name!r}; the sources are {sorted(self.sources)}")


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._/-")


class _Span(NamedTuple):
    """Rows from a first one on, by whose turn it is, and how many rows each source had before."""

    first: int
    turns: Turns
    before: Int64[np.ndarray, " sources"]


class Timeline:
    """Which source each row comes from, and which of the source's rows it is.

    Args:
        stages: first rows, rising from 0, and whole turns of each source.
        limits: rows that each source has; None for no limit.
        stop: whether the rows end where a source is exhausted, or it is left out.

    Attributes:
        count: all rows; None without end.
    """

    def __init__(
        self, stages: Sequence[tuple[int, Sequence[int]]], limits: Sequence[int | None], *, stop: bool
    ) -> None:
        self._spans: list[_Span] = []
        self._left = np.array([_ENDLESS if limit is None else limit for limit in limits], np.int64)
        self.count: int | None = None
        ends = [first for first, _ in stages[1:]] + [_ENDLESS]
        row, before = 0, np.zeros(len(limits), np.int64)
        for (_, turns), end in zip(stages, ends, strict=True):
            while row < end and self.count is None:
                active = [turn if left > 0 else 0 for turn, left in zip(turns, self._left - before, strict=True)]
                gone = any(turn and not kept for turn, kept in zip(turns, active, strict=True))
                if not any(active) or (stop and gone):
                    self.count = row
                    break
                span = _Span(row, _turns(active), before)
                rows = self._until_exhausted(span, end - row)
                self._spans.append(span)
                if row + rows >= _ENDLESS:
                    return
                row, before = row + rows, before + span.turns.counts(rows)
        self.count = row if self.count is None else self.count

    def find(self, rows: Int[np.ndarray, " rows"]) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
        """Return the source of each row, and how many rows of it come before; -1 and 0 past the end."""
        sources, ordinals = np.full(len(rows), -1, np.int64), np.zeros(len(rows), np.int64)
        at = np.searchsorted(self._firsts, rows, side="right") - 1
        inside = np.ones(len(rows), bool) if self.count is None else rows < self.count
        for number in np.unique(at[inside]).tolist():
            span, mine = self._spans[number], inside & (at == number)
            places = rows[mine] - span.first
            sources[mine] = span.turns.whose(places)
            ordinals[mine] = span.turns.ordinals(places) + span.before[sources[mine]]
        return sources, ordinals

    def counts(self, rows: int) -> Int64[np.ndarray, " sources"]:
        """Return how many of the first rows come from each source."""
        rows = rows if self.count is None else min(rows, self.count)
        span = self._spans[int(np.searchsorted(self._firsts, rows, side="right")) - 1] if self._spans else None
        return (
            np.zeros(len(self._left), np.int64) if span is None else span.before + span.turns.counts(rows - span.first)
        )

    @functools.cached_property
    def _firsts(self) -> Int64[np.ndarray, " spans"]:
        return np.array([span.first for span in self._spans], np.int64)

    def _until_exhausted(self, span: _Span, most: int) -> int:
        """Return how many rows there are until a source would have a turn that it has no row for."""
        left = self._left - span.before
        places = [
            span.turns.place(source, rows)
            for source, (rows, turns) in enumerate(zip(left.tolist(), span.turns.shares, strict=True))
            if turns and rows < most
        ]
        return min([most, *places])


def _turns(active: Sequence[int]) -> Turns:
    divisor = math.gcd(*active)
    return Turns([turns // divisor for turns in active])
