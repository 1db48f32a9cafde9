"""Kit of `Sink`: deterministic values and wall times stay apart, and a value is recorded to the last bit."""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from dovetail_protocols.metrics import Sink
from dovetail_protocols.testing._rules import require

__all__ = ["check_sink"]

Rows: TypeAlias = Sequence[tuple[int, Mapping[str, float]]]

_METRICS = (
    (0, {"loss": 0.1 + 0.2, "accuracy": 0.0}),
    (1, {"loss": 1e-300}),
    (1, {"grad_norm": -1 / 3}),
    (7, {"n": 3.0}),
)
_TIMINGS = ((0, {"seconds": 0.25}), (7, {"tokens_per_second": 1234.5, "seconds": 1e6}))


def check_sink(
    make_sink: Callable[[], Sink], read_metrics: Callable[[], Rows], read_timings: Callable[[], Rows]
) -> None:
    """Check a sink by what can be read after it is closed.

    Args:
        make_sink: returns a sink that writes to a new, empty place.
        read_metrics: returns the deterministic rows ``(step, {name: value})`` of the last sink in order; rows of one
            step may be merged.
        read_timings: the same for wall times.

    Raises:
        ConformanceError: a rule is broken.
    """
    sink = make_sink()
    for (step, values), timing in zip(_METRICS, (_TIMINGS[0], None, None, _TIMINGS[1]), strict=True):
        sink.metrics(step, values)
        if timing is not None:
            sink.timings(*timing)
    sink.close()
    _compare("metrics", read_metrics(), _METRICS)
    _compare("timings", read_timings(), _TIMINGS)


def _compare(kind: str, got: Rows, expected: Rows) -> None:
    rule = f"Sink: after close the {kind}, and nothing else, are recorded in order and to the last bit"
    flat, right = _flat(got), _flat(expected)
    require([row[:2] for row in flat] == [row[:2] for row in right], rule, rows=flat, expected=right)
    for (step, name, value), (_, _, wanted) in zip(flat, right, strict=True):
        same = struct.pack("<d", value) == struct.pack("<d", wanted)
        require(same, rule, step=step, name=name, value=value, expected=wanted)


def _flat(rows: Rows) -> list[tuple[int, str, float]]:
    return [(step, name, value) for step, values in rows for name, value in values.items()]
