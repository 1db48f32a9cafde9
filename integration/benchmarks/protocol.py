"""What a benchmark file declares, and what it runs in a worker. Standard library only: every environment imports it.

A benchmark file defines `BENCHMARK` and, for each contestant, a class of the name that the contestant gives:

    class JaxMatmul:
        def __init__(self, config): ...    # build, compile and warm up; `config` is the case's
        name = "jax 0.12.0"                # optional: what the results call it, versions included
        clock = time.perf_counter          # optional: what tells the seconds; `time.process_time` for CPU-seconds
        def run(self): ...                 # one timed iteration; returns when its results are there
        def checksum(self): ...            # what the other must agree with: floats, or what the case's agreement takes
        def memory(self): ...              # optional: MB; by default the anonymous memory of the process
        def extra(self): ...               # optional: {name: value} to print next to the result

The file is imported in every environment, so it imports jax, torch and the like inside those classes.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Who takes part: a class of the benchmark file and the environment (see `environments.py`) it runs in."""

    system: str
    environment: str


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: what the results call it.
        config: a JSON value for the constructor of the systems.
        tolerance: largest difference of the checksums relative to the largest of them.
        unit: of the result; milliseconds of one iteration unless `work` is given.
        work: how much one iteration does, in the numerator of `unit` (tokens, for ``tokens/s``).
        inner: iterations of one turn; each turn gives one time, and the result is the median of the turns.
        starts: pairs of processes, one pair after the other, whose turns are pooled. More than one where the pages that
            a process happens to get decide more than its program.
        pair: ours and the peer, where they are not those of the benchmark.
        agreement: tells how two checksums (ours, the peer's) differ, or None; in place of `tolerance`.
    """

    name: str
    config: Mapping[str, Any]
    tolerance: float = 1e-4
    unit: str = "ms"
    work: float | None = None
    inner: int = 1
    starts: int = 1
    pair: tuple[Contestant, Contestant] | None = None
    agreement: Callable[[Any, Any], str | None] | None = None

    def value(self, seconds: float) -> float:
        """The result of an iteration that takes this long."""
        return seconds * 1e3 if self.work is None else self.work / seconds

    def ratio(self, ours: float, peer: float) -> float:
        """How many times better ours is."""
        return peer / ours if self.work is None else ours / peer

    def disagreement(self, ours: Any, peer: Any) -> str | None:
        """How two checksums differ, or None."""
        return self.agreement(ours, peer) if self.agreement else disagreement(ours, peer, self.tolerance)


def disagreement(ours: Sequence[float], peer: Sequence[float], tolerance: float) -> str | None:
    """Tell how two checksums differ by more than the tolerance, or None."""
    if len(ours) != len(peer):
        return f"{len(ours)} values against {len(peer)}"
    scale = max((abs(value) for value in peer), default=0.0) or 1.0
    errors = [abs(a - b) / scale for a, b in zip(ours, peer, strict=True)]
    bad = [place for place, error in enumerate(errors) if not error <= tolerance]  # a NaN is bad
    if not bad:
        return None
    first = bad[0]
    return f"value {first}: {ours[first]!r} against {peer[first]!r}, {errors[first]:.2g} > {tolerance:g}"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A subject: `cases(rng)` gives the named cases, and three drawn near them when `rng` is not None."""

    name: str
    ours: Contestant
    peer: Contestant
    cases: Callable[[random.Random | None], list[Case]]


def nearby(rng: random.Random, config: Mapping[str, Any], multiples: Mapping[str, int]) -> dict[str, Any]:
    """Draw each named dimension between 0.7 and 1.4 times its value, as a positive multiple of the given number."""
    drawn = dict(config)
    for name, multiple in multiples.items():
        drawn[name] = max(1, round(config[name] * 2 ** rng.uniform(-0.5, 0.5) / multiple)) * multiple
    return drawn
