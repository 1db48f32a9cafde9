"""report.html: what a run was, in one self-contained file."""

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

__all__ = ["Report", "curves", "write"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What the page shows; tables are lists of ``(name, value)``.

    Attributes:
        title: heading.
        facts: what ran.
        results: what came out.
        samples: ``(prompt, text)``.
        seconds: duration of each stage.
        next_steps: ``(what, command)``.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    results: Sequence[tuple[str, str]]
    samples: Sequence[tuple[str, str]]
    seconds: Mapping[str, float]
    next_steps: Sequence[tuple[str, str]]


def write(path: Path, report: Report, run: Path, *, reference: tuple[str, float] | None = None) -> None:
    """Write the page with the curves of ``metrics.jsonl`` and ``timings.jsonl`` in `run`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dovetail", "templates"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(report=report, curves=curves(run, reference))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)


def curves(run: Path, reference: tuple[str, float] | None = None) -> str:
    """Return an SVG with the loss, the validation and the throughput of a run by step."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    metrics, timings = _lines(run / "metrics.jsonl"), _lines(run / "timings.jsonl")
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    loss, valid, speed = figure.subplots(1, 3)
    _plot(loss, metrics, "loss", "training loss (nats per token)")
    _plot(valid, metrics, "valid/bits_per_byte", "validation (bits per byte)", marker="o")
    if reference is not None:
        valid.axhline(reference[1], color="#999999", linestyle="--", linewidth=1)
        valid.annotate(reference[0], (0.98, reference[1]), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    _plot(speed, timings, "tokens_per_second", "tokens per second")
    speed.set_ylim(bottom=0)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "dovetail"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def _plot(axes: Any, records: Sequence[Mapping[str, Any]], name: str, title: str, marker: str = "") -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color="#2a6f97", linewidth=1.3, marker=marker, markersize=3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.3)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
