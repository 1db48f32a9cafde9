"""What a program costs: counts per scope and primitive that can be added, scaled and printed."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

__all__ = ["Cost", "Counts"]


@dataclass(frozen=True)
class Counts:
    """Operations and traffic of some equations.

    Attributes:
        matmul_flops: multiplications and additions of matrix products and convolutions (2 per multiply-add).
        other_flops: all other arithmetic, one per output element of an elementwise operation.
        transcendentals: evaluations of exp, log, tanh, sqrt and the like; not part of `flops`.
        bytes: operands read and results written if nothing is fused.
    """

    matmul_flops: int = 0
    other_flops: int = 0
    transcendentals: int = 0
    bytes: int = 0

    @property
    def flops(self) -> int:
        """`matmul_flops` plus `other_flops`."""
        return self.matmul_flops + self.other_flops

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> "Counts":
        return Counts(*(round(getattr(self, f.name) * times) for f in fields(self)))

    __rmul__ = __mul__


Key = tuple[str, str]


@dataclass(frozen=True)
class Cost:
    """Counts of a program by ``(scope, primitive)``; see `dovetail_profile.cost` for the conventions.

    Attributes:
        entries: the counts; a scope is ``""`` or the named scopes joined by ``/``.
        io_bytes: arguments plus outputs of the whole program: no execution can move less (to and from memory that
            does not hold them already).
        uncounted: primitives without a model; their flops are 0, or those of their body taken once.
    """

    entries: Mapping[Key, Counts] = field(default_factory=dict)
    io_bytes: int = 0
    uncounted: frozenset[str] = frozenset()

    @property
    def total(self) -> Counts:
        """The sum over everything."""
        return sum(self.entries.values(), Counts())

    @property
    def flops(self) -> int:
        """`matmul_flops` plus `other_flops`."""
        return self.total.flops

    @property
    def matmul_flops(self) -> int:
        """Flops of matrix products and convolutions: the numerator of model flops utilisation."""
        return self.total.matmul_flops

    @property
    def other_flops(self) -> int:
        """Flops of everything else."""
        return self.total.other_flops

    @property
    def transcendentals(self) -> int:
        """Evaluations of transcendental functions."""
        return self.total.transcendentals

    @property
    def bytes(self) -> int:
        """Unfused traffic: an upper estimate; `io_bytes` is the lower bound."""
        return self.total.bytes

    @property
    def by_primitive(self) -> dict[str, Counts]:
        """The counts of each primitive, most flops first."""
        return _grouped((primitive, counts) for (_, primitive), counts in self.entries.items())

    def by_scope(self, depth: int | None = None) -> dict[str, Counts]:
        """Return the counts of each named scope, most flops first.

        Args:
            depth: how many parts of a scope to keep; all by default.

        Raises:
            ValueError: `depth` is not positive.
        """
        if depth is not None and depth < 1:
            raise ValueError(f"by_scope(depth={depth}); give at least 1, or None for whole scopes")
        return _grouped(("/".join(scope.split("/")[:depth]), counts) for (scope, _), counts in self.entries.items())

    def __add__(self, other: "Cost") -> "Cost":
        both = dict(self.entries)
        for key, counts in other.entries.items():
            both[key] = both.get(key, Counts()) + counts
        return Cost(both, self.io_bytes + other.io_bytes, self.uncounted | other.uncounted)

    def __mul__(self, times: float) -> "Cost":
        scaled = {key: counts * times for key, counts in self.entries.items()}
        return Cost(scaled, round(self.io_bytes * times), self.uncounted)

    __rmul__ = __mul__

    def table(
        self, by: Literal["scope", "primitive"] = "scope", *, depth: int | None = None, top: int | None = None
    ) -> str:
        """Return a printable table, most flops first.

        Args:
            by: one line per named scope or per primitive.
            depth: see `by_scope`.
            top: the number of lines; the rest is summed up in one more.

        Raises:
            ValueError: `by` is neither of the two.
        """
        if by not in ("scope", "primitive"):
            raise ValueError(f"table(by={by!r}); expected 'scope' or 'primitive'")
        groups = list((self.by_primitive if by == "primitive" else self.by_scope(depth)).items())
        shown = groups if top is None else groups[:top]
        rest = sum((counts for _, counts in groups[len(shown) :]), Counts())
        lines = [*shown, *([("(others)", rest)] if len(shown) < len(groups) else []), ("total", self.total)]
        return _text(by, lines)


def _grouped(items: Iterable[tuple[str, Counts]]) -> dict[str, Counts]:
    groups: dict[str, Counts] = {}
    for name, counts in items:
        groups[name] = groups.get(name, Counts()) + counts
    return dict(sorted(groups.items(), key=lambda item: (-item[1].flops, -item[1].bytes, item[0])))


def _text(first: str, lines: list[tuple[str, Counts]]) -> str:
    head = (first, "matmul flops", "other flops", "transcendentals", "bytes", "share")
    whole = max(1, lines[-1][1].flops)
    cells: list[tuple[str, ...]] = [head]
    for name, c in lines:
        numbers = (c.matmul_flops, c.other_flops, c.transcendentals, c.bytes)
        cells.append((name or "(no scope)", *map(_short, numbers), f"{c.flops / whole:.1%}"))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def _short(value: int) -> str:
    if value < 10_000:
        return str(value)
    power = min(6, int(math.log10(value)) // 3)
    return f"{value / 1000**power:.4g} {' kMGTPE'[power]}"
