"""How many rows each step has: steps to rows and back."""

import bisect
import itertools
import operator
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Schedule", "Stages"]

Stages: TypeAlias = int | Sequence[tuple[int, int]]


class Schedule:
    """Rows per step, which may change at given steps; all of them without skipped ranges.

    Args:
        batch: rows per step, or pairs of a step and the rows from it on, the first one at step 0.

    Raises:
        ValueError: a number out of range, or steps that do not rise from 0.

    >>> ramp = Schedule([(0, 2), (3, 4)])
    >>> [ramp.first_row(step) for step in range(6)]
    [0, 2, 4, 6, 10, 14]
    >>> [ramp.steps(rows) for rows in (6, 7, 10, 11)]
    [3, 4, 4, 5]
    """

    def __init__(self, batch: Stages) -> None:
        pairs = [(0, batch)] if not isinstance(batch, Sequence) else [_pair(item) for item in batch]
        self.stages = tuple((operator.index(step), operator.index(rows)) for step, rows in pairs)
        steps = [step for step, _ in self.stages]
        if not steps or steps[0] != 0 or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"batch={batch!r}; expected (step, rows) pairs whose steps rise from 0")
        for _, rows in self.stages:
            if rows < 1:
                raise ValueError(f"batch={rows}; expected at least 1")
        self._steps = steps
        spans = [(stop - start) * rows for (start, rows), (stop, _) in itertools.pairwise(self.stages)]
        self._rows = [0, *itertools.accumulate(spans)]

    def batch(self, step: int) -> int:
        """Return the rows of a step."""
        return self.stages[bisect.bisect_right(self._steps, step) - 1][1]

    def first_row(self, step: int) -> int:
        """Return the row with which a step begins."""
        at = bisect.bisect_right(self._steps, step) - 1
        return self._rows[at] + (step - self._steps[at]) * self.stages[at][1]

    def steps(self, rows: int) -> int:
        """Return how many steps it takes to have so many rows."""
        at = max(bisect.bisect_left(self._rows, rows) - 1, 0)
        return self._steps[at] + -(-(rows - self._rows[at]) // self.stages[at][1])

    def before(self, step: int) -> tuple[tuple[int, int], ...]:
        """Return the stages that begin before a step."""
        return tuple(stage for stage in self.stages if stage[0] < step)

    def __str__(self) -> str:
        return str(self.stages[0][1]) if len(self.stages) == 1 else ",".join(f"{s}:{rows}" for s, rows in self.stages)


def _pair(item: Sequence[int]) -> tuple[int, int]:
    if not isinstance(item, Sequence) or len(item) != 2:
        raise ValueError(f"batch stage {item!r}; expected (step, rows)")
    return item[0], item[1]


def parse(text: str) -> Schedule:
    """Return the schedule that ``str(schedule)`` wrote."""
    if ":" not in text:
        return Schedule(int(text))
    return Schedule([(int(step), int(rows)) for step, _, rows in (part.partition(":") for part in text.split(","))])
