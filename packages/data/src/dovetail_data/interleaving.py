"""Whose turn it is: sequences of turns that keep to given weights as closely as whole turns can, at every prefix.

Weights are fractions of a period; after a period each has had exactly its share, so the turn at any place costs a
division and a look into the table of one period. Inside the period it is the turn of whoever is most behind, as in
Megatron-LM's blended datasets. Most-behind alone can let one fall behind by more than a turn; then the period
is made by deadlines (Pfair scheduling, S. Baruah et al. 1996), which never let it.
"""

import functools
import heapq
import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from jaxtyping import Int, Int64

__all__ = ["MOST_TURNS", "Turns", "shares"]

Table: TypeAlias = tuple[Int64[np.ndarray, " places"], Int64[np.ndarray, " places"]]

MOST_TURNS = 1 << 18  # of a period


def shares(weights: Sequence[float | int | Fraction]) -> tuple[int, ...]:
    """Return whole turns in the same proportion, without a common divisor: a period.

    A float means the shortest decimal that it is written as: 0.1 is a tenth, and a third to 12 digits a third. Where
    the period would be longer than ``2**18`` turns, the weights are rounded to so many, none to zero.

    Raises:
        ValueError: a weight is negative or no number, or all are zero.

    >>> shares([0.5, 0.3, 0.2]), shares([1 / 3, 2 / 3]), shares([0, 7])
    ((5, 3, 2), (1, 2), (0, 1))
    """
    exact = [_fraction(weight) for weight in weights]
    total = sum(exact)
    if not total:
        raise ValueError(f"weights={list(weights)}; expected at least one above 0")
    exact = [weight / total for weight in exact]
    period = math.lcm(*(weight.denominator for weight in exact))
    short = period <= MOST_TURNS
    turns = [int(weight * period) for weight in exact] if short else _rounded(exact, MOST_TURNS)
    divisor = math.gcd(*turns)
    return tuple(turn // divisor for turn in turns)


def _fraction(weight: float | int | Fraction) -> Fraction:
    try:
        value = Fraction(weight) if isinstance(weight, int | Fraction) else _short(float(weight))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"weight {weight!r}; expected a number of 0 or more") from None
    if value < 0:
        raise ValueError(f"weight {weight!r}; expected a number of 0 or more")
    return value


def _short(weight: float) -> Fraction:
    """Return a fraction of a small denominator if it is the same to 12 digits, else the decimal."""
    decimal = Fraction(repr(weight))
    small = decimal.limit_denominator(10_000)
    return small if abs(small - decimal) <= abs(decimal) / 10**12 else decimal


def _rounded(weights: Sequence[Fraction], period: int) -> list[int]:
    """Return whole turns that add up to the period, those of positive weights positive."""
    total = sum(weights)
    exact = [weight * period / total for weight in weights]
    turns = [max(math.floor(share), int(share > 0)) for share in exact]
    behind = sorted(range(len(turns)), key=lambda i: turns[i] - exact[i])
    for index in behind[: period - sum(turns)]:
        turns[index] += 1
    while sum(turns) > period:  # many tiny ones were raised to a turn
        turns[max(range(len(turns)), key=lambda i: turns[i] - exact[i] if turns[i] > 1 else -math.inf)] -= 1
    return turns


class Turns:
    """The endless sequence of turns of some sources.

    Attributes:
        shares: turns per period.
        period: their sum.

    >>> turns = Turns((1, 2))
    >>> turns.whose(np.arange(6)).tolist()
    [1, 0, 1, 0, 1, 1]
    >>> turns.counts(999).tolist()
    [333, 666]
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self.shares = tuple(operator.index(share) for share in shares)
        self.period = sum(self.shares)
        self._per_period = np.array(self.shares, np.int64)

    def whose(self, places: Int[np.ndarray, " places"]) -> Int64[np.ndarray, " places"]:
        """Return who has each turn."""
        return self._looked_up(places)[0]

    def ordinals(self, places: Int[np.ndarray, " places"]) -> Int64[np.ndarray, " places"]:
        """Return how many turns the one who has each turn had before it."""
        whose, inside = self._looked_up(places)
        return places // self.period * self._per_period[whose] + inside

    def counts(self, places: int) -> Int64[np.ndarray, " sources"]:
        """Return how many of the first turns each has."""
        periods, rest = divmod(places, self.period)
        whose, _ = _table(self.shares, first=not periods)
        return periods * self._per_period + np.bincount(whose[:rest], minlength=len(self.shares))

    def place(self, source: int, count: int) -> int:
        """Return the place of the turn that comes after so many of one's own."""
        periods, rest = divmod(count, self.shares[source])
        whose, _ = _table(self.shares, first=not periods)
        return periods * self.period + int(np.flatnonzero(whose == source)[rest])

    def _looked_up(self, places: Int[np.ndarray, " places"]) -> Table:
        inside, later = places % self.period, places >= self.period
        tables = _table(self.shares, first=True), _table(self.shares, first=False)
        whose, before = (np.where(later, two[inside], one[inside]) for one, two in zip(*tables, strict=True))
        return whose, before


@functools.lru_cache(64)
def _table(shares: tuple[int, ...], *, first: bool) -> Table:
    """Return whose turn it is in the first or in each later period, and how many one had before in it."""
    there = np.flatnonzero(shares)
    positive = tuple(shares[source] for source in there.tolist())
    whose = there[_most_behind(positive, first=first) or _by_deadline(positive)]
    before = np.empty_like(whose)
    for source in range(len(shares)):
        mine = whose == source
        before[mine] = np.arange(np.count_nonzero(mine))
    return whose, before


def _most_behind(shares: tuple[int, ...], *, first: bool) -> list[int] | None:
    """Return a period in which the one most behind goes next, the first of equals.

    None if one falls more behind than a turn. Megatron-LM lets the largest weight have the very first turn.
    """
    period = sum(shares)
    behind = list(shares) if first else [0] * len(shares)  # in turns times the period
    order: list[int] = []
    for place in range(period):
        latest = max(behind)
        if latest > period:
            return None
        source = behind.index(latest)
        order.append(source)
        behind[source] -= period
        if place or not first:
            behind = [one + share for one, share in zip(behind, shares, strict=True)]
    return order if np.bincount(order, minlength=len(shares)).tolist() == list(shares) else None


def _by_deadline(shares: tuple[int, ...]) -> list[int]:
    """Return a period in which nobody is ever a turn ahead or behind: earliest deadline first.

    The ``j``-th turn may be taken once a whole turn is not too early, and must be before it is a turn late.
    """
    period = sum(shares)
    future = [(0, -(-period // share), source, 0) for source, share in enumerate(shares)]
    heapq.heapify(future)
    ready: list[tuple[int, int, int]] = []
    order: list[int] = []
    for place in range(period):
        while future and future[0][0] <= place:
            _, deadline, source, number = heapq.heappop(future)
            heapq.heappush(ready, (deadline, source, number))
        _, source, number = heapq.heappop(ready)
        order.append(source)
        following = number + 1
        if following < shares[source]:
            release = following * period // shares[source]
            deadline = -(-(following + 1) * period // shares[source])
            heapq.heappush(future, (release, deadline, source, following))
    return order
