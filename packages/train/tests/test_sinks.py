"""JSON lines: nothing lost, nothing doubled."""

import json

import pytest

from dovetail_protocols import Sink
from dovetail_train import JsonLines, Throughput


def test_lines_are_complete_as_soon_as_they_are_written(tmp_path):
    """Breaks when a killed process loses buffered lines."""
    sink = JsonLines(tmp_path)
    assert isinstance(sink, Sink)
    sink.metrics(1, {"loss": 0.1})
    sink.timings(1, {"step_seconds": 2.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.1}\n'
    assert json.loads((tmp_path / "timings.jsonl").read_text()) == {"step": 1, "step_seconds": 2.0}
    sink.close()


def test_resume_drops_later_and_torn_lines(tmp_path, caplog):
    """Breaks when a resumed run repeats steps or stumbles over half a line."""
    text = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "loss": 0.2}\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    with JsonLines(tmp_path, resume=2) as sink:
        sink.metrics(3, {"loss": float("nan")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert json.loads(lines[2])["loss"] is None
    assert "unfinished line" in caplog.text


def test_an_existing_run_is_not_touched(tmp_path):
    with JsonLines(tmp_path) as sink:
        sink.metrics(1, {"loss": 1.0})
    with pytest.raises(FileExistsError, match="resume=STEP"):
        JsonLines(tmp_path)


def test_throughput_reports_what_it_knows():
    assert Throughput().rates(2.0) == {"step_seconds": 2.0}
    assert Throughput(tokens=10, flops=8).rates(2.0) == {"step_seconds": 2.0, "tokens_per_second": 5.0}
