"""The pipelines that change a trained model: both continuations begin alike, learn, and leave curves behind."""

import json
import sys
from pathlib import Path

import pytest

import dovetail_data as data

sys.path.insert(0, str(Path(__file__).parent.parent / "pipelines"))

import adapt
import continued
import deepen
import upcycle


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Small parts of the standard library."""
    import sysconfig

    folder = tmp_path_factory.mktemp("corpus")
    for name in ("argparse", "ast", "bdb", "cmd", "code", "copy", "csv", "dis", "enum", "shlex"):
        (folder / f"{name}.py").write_text((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text())
    return data.open_corpus(folder)


@pytest.mark.parametrize("pipeline", [upcycle, deepen, adapt], ids=lambda module: module.__name__)
def test_a_changed_model_begins_where_the_other_does_and_learns(pipeline, corpus, tmp_path, monkeypatch):
    """A surgery that loses what was learned, or a model that cannot be trained after it, is not worth its curve."""
    monkeypatch.setattr(continued, "EVALUATIONS", 2)
    monkeypatch.setattr(continued, "VALID_BATCHES", 1)
    monkeypatch.setattr(continued, "BATCH", 4)
    monkeypatch.setattr(continued, "VOCAB", 512)
    curves = pipeline.compare(tmp_path, 0.05, 0, corpus)
    known, new = curves.values()
    assert known[0].bits_per_byte == pytest.approx(new[0].bits_per_byte, rel=1e-4)
    assert all(curve[-1].bits_per_byte < curve[0].bits_per_byte for curve in (known, new))
    continued.write(tmp_path, "curves", [curves, curves], "a command")
    assert json.loads((tmp_path / "curves.json").read_text())["command"] == "a command"
    assert all(label in (tmp_path / "curves.svg").read_text() for label in curves)
