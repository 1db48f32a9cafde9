"""Ranges of steps that a plan leaves out, and fingerprints that tell how two plans differ.

A range is in the steps of the plan without any ranges, so adding one never changes the meaning of another.
"""

import bisect
import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import TypeAlias

__all__ = ["Skips", "fields", "merged"]

Ranges: TypeAlias = tuple[tuple[int, int], ...]


class Skips:
    """Maps the steps that are taken to the steps of the plan without ranges."""

    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges
        self.total = sum(stop - start for start, stop in ranges)
        lengths = [stop - start for start, stop in ranges]
        self._shifts = [0, *itertools.accumulate(lengths)]
        self._starts = [start - shift for (start, _), shift in zip(ranges, self._shifts, strict=False)]

    def raw(self, step: int) -> int:
        """Return the step of the plan without ranges.

        >>> [Skips(((1, 3), (4, 5))).raw(step) for step in range(4)]
        [0, 3, 5, 6]
        """
        return step + self._shifts[bisect.bisect_right(self._starts, step)]

    def before(self, raw: int) -> Ranges:
        """Return the ranges that begin before a step of the plan without ranges."""
        return tuple(pair for pair in self.ranges if pair[0] < raw)

    def __str__(self) -> str:
        return ",".join(f"{start}-{stop}" for start, stop in self.ranges) or "none"


def merged(ranges: Iterable[Sequence[int]]) -> Ranges:
    """Return half-open ranges in order, those that touch or overlap joined.

    Raises:
        ValueError: a range is not ``0 <= start < stop``.

    >>> merged([(5, 6), (1, 3), (3, 4)])
    ((1, 4), (5, 6))
    """
    out: list[tuple[int, int]] = []
    for start, stop in sorted(_pair(item) for item in ranges):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(stop, out[-1][1]))
        else:
            out.append((start, stop))
    return tuple(out)


def _pair(item: Sequence[int]) -> tuple[int, int]:
    values = tuple(operator.index(value) for value in item)
    if len(values) != 2 or not 0 <= values[0] < values[1]:
        raise ValueError(f"skip range {item!r}; expected (start, stop) with 0 <= start < stop")
    return values[0], values[1]


def parse(text: str) -> Skips:
    """Return the ranges that ``str(skips)`` wrote.

    Raises:
        ValueError: the text is something else.
    """
    if text == "none":
        return Skips(())
    return Skips(merged([[int(number) for number in part.split("-")] for part in text.split(",")]))


def fields(fingerprint: str) -> dict[str, str]:
    """Return the parts ``name=value`` of a plan's fingerprint.

    >>> fields("seed=0 batch=8")
    {'seed': '0', 'batch': '8'}
    """
    pairs = (part.partition("=") for part in fingerprint.split(" "))
    return {name: value for name, _, value in pairs}
