"""The pipelines that change a trained model: both continuations begin alike, learn, and leave curves behind."""

import json
import sys
import time
from pathlib import Path

import jax
import pytest

import dovetail_data as data
import dovetail_train as train
from dovetail_protocols import paths

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


@pytest.fixture
def small(monkeypatch):
    """Few evaluations of small batches."""
    for name, value in {"EVALUATIONS": 2, "VALID_BATCHES": 1, "BATCH": 4, "VOCAB": 512}.items():
        monkeypatch.setattr(continued, name, value)


@pytest.mark.usefixtures("small")
def test_curves_tell_the_time_of_steps_alone(corpus, tmp_path, monkeypatch):
    """Breaks when the compilation is in a curve, the steps are miscounted, or what is frozen has an optimizer state."""
    trainers = []

    class SlowToBegin(train.Trainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            trainers.append(self)
            self.begun = False

        def step(self, batch):
            if not self.begun:
                time.sleep(2)
            self.begun = True
            return super().step(batch)

    monkeypatch.setattr(train, "Trainer", SlowToBegin)
    given = continued.prepare(tmp_path, 0, corpus)
    model, curve = continued.run(continued.llama(given, 0), given, 1e-6, rate=1e-3, seed=0, trained="layers/0/**")
    assert curve[-1].seconds < 2
    assert [point.step for point in curve] == [0, 1, 2]
    assert [int(trainer.state.step) for trainer in trainers] == [11, 2]
    flat = paths.flatten(continued.models.split(model)[1])
    count = sum(address.startswith("layers/0/") for address in flat)
    moments = [leaf for leaf in jax.tree.leaves(trainers[-1].state.opt_state) if leaf.ndim]
    assert 0 < count < len(flat)
    assert len(moments) == 2 * count


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("pipeline", [upcycle, deepen, adapt], ids=lambda module: module.__name__)
def test_a_changed_model_begins_where_the_other_does_and_learns(pipeline, corpus, tmp_path):
    """A surgery that loses what was learned, or a model that cannot be trained after it, is not worth its curve."""
    curves = pipeline.compare(tmp_path, 0.05, 0, corpus)
    known, new = curves.values()
    assert known[0].bits_per_byte == pytest.approx(new[0].bits_per_byte, rel=1e-4)
    assert all(curve[-1].bits_per_byte < curve[0].bits_per_byte for curve in (known, new))
    continued.write(tmp_path, "curves", [curves, curves], "a command")
    assert json.loads((tmp_path / "curves.json").read_text())["command"] == "a command"
    assert all(label in (tmp_path / "curves.svg").read_text() for label in curves)
