"""The whole line on a small corpus: everything is written, and a kill at any moment changes no number."""

import multiprocessing
import os
import re
import shlex
import signal
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from quickstart_child import invoke

STEPS = 40
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["dovetail.stages", "matplotlib.figure"])


def run(out, *extra, fault=None, kill_when=None, largest_file=None, timeout=240):
    """Run the quickstart in a child; return its exit status (negative: the signal)."""
    words = ["quickstart", "--out", str(out), "--preset", "tiny", "--steps", str(STEPS), *extra]
    child = CONTEXT.Process(target=invoke, args=(words, str(out) + ".log", fault, largest_file))
    child.start()
    limit = time.monotonic() + timeout
    while child.is_alive() and time.monotonic() < limit:
        if kill_when is not None and kill_when():
            os.kill(child.pid, signal.SIGKILL)
            child.join(60)
            break
        child.join(0.02)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
        pytest.fail(f"no end within {timeout} s:\n{Path(str(out) + '.log').read_text()[-3000:]}")
    return child.exitcode


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus with space and ü")
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("argparse", "ast", "bdb", "calendar", "cmd", "code", "copy", "csv", "dis", "enum", "shlex", "zipfile"):
        source = stdlib / f"{name}.py"
        if source.exists():
            (folder / f"{name}.py").write_text(source.read_text())
    return folder


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(out, "--corpus", str(corpus)) == 0, Path(str(out) + ".log").read_text()
    return out


def lines_of(path):
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def test_everything_is_written_and_said(whole):
    """Breaks when a stage is lost: files, report, printed comparison, next steps."""
    shown = Path(str(whole) + ".log").read_text()
    found = re.search(r"validation: ([\d.]+) bits per byte; unigram baseline: ([\d.]+)", shown)
    assert float(found[1]) < float(found[2])
    assert "dovetail checkpoint ls" in shown
    assert f"dovetail serve {whole / 'model'}" in shown
    assert re.search(r"ready in [\d.]+ s, then [\d,]+ tokens per second", shown)
    page = (whole / "report.html").read_text()
    assert "<svg" in page
    assert "bits per byte" in page
    assert "server ready after" in page
    assert "<b>import os" in page
    assert "http://" not in re.sub(r'xmlns[:\w]*="[^"]*"|<!DOCTYPE[^>]*>|<(cc|rdf|dc):[^>]*>', "", page)
    written = {path.name for path in (whole / "model").iterdir()}
    assert written >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert lines_of(whole / "timings.jsonl") == STEPS


def test_the_export_opens_with_the_same_parameters(whole):
    import jax

    import dovetail_models
    from dovetail_checkpoint import Manager

    model = dovetail_models.from_pretrained(whole / "model")
    _, exported = dovetail_models.split(model)
    with Manager(whole / "checkpoints") as checkpoints:
        saved = checkpoints.restore().state
    saved = saved["params"] if isinstance(saved, dict) else saved[1]
    for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def same(out, whole):
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in (p.name for p in (whole / "model").iterdir()):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name


@pytest.mark.slow
def test_killed_inside_a_save_and_between_steps_then_resumed(corpus, whole, tmp_path):
    """Breaks when a torn checkpoint counts, or metrics of lost steps stay: two kills in one run, then the end."""
    out = tmp_path / "run"
    assert run(out, "--corpus", str(corpus), fault=("commit", 2)) == -signal.SIGKILL
    metrics = out / "metrics.jsonl"
    assert run(out, "--resume", kill_when=lambda: lines_of(metrics) >= 27) == -signal.SIGKILL
    assert run(out, "--resume") == 0, Path(str(out) + ".log").read_text()
    same(out, whole)


@pytest.mark.soak
def test_killed_at_many_moments(corpus, whole, tmp_path):
    """The same at every stage of a save, before the plan, and at random steps."""
    rng = np.random.default_rng(0)
    faults = [("orbax", 1), ("manifest", 2), ("commit", 1), ("delete", 1)]
    for number, fault in enumerate([*faults, *[None] * 8]):
        out = tmp_path / f"run{number}"
        at, metrics = int(rng.integers(0, STEPS)), out / "metrics.jsonl"
        marks = (out / ".dovetail", out / "tokenizer", out / "cache")
        early = marks[number % 3] if number >= 9 else None
        when = (lambda early=early: early.exists()) if early else (lambda at=at, m=metrics: lines_of(m) >= at)
        assert run(out, "--corpus", str(corpus), fault=fault, kill_when=None if fault else when) == -signal.SIGKILL
        again = ("--resume",) if (out / ".dovetail").exists() else ()  # nothing to resume before the directory is there
        given = () if (out / "run.json").exists() else ("--corpus", str(corpus))
        assert run(out, *again, *given) == 0, Path(str(out) + ".log").read_text()
        same(out, whole)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes(corpus, whole, tmp_path):
    """The first Ctrl-C saves and says how to go on; the run ends with the same numbers."""
    out = tmp_path / "run"
    metrics = out / "metrics.jsonl"
    words = ["quickstart", "--out", str(out), "--preset", "tiny", "--steps", str(STEPS), "--corpus", str(corpus)]
    child = CONTEXT.Process(target=invoke, args=(words, str(out) + ".log"))
    child.start()
    limit = time.monotonic() + 240
    while lines_of(metrics) < 5 and time.monotonic() < limit:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGINT)
    child.join(120)
    shown = Path(str(out) + ".log").read_text()
    assert child.exitcode == 3, shown
    assert "--resume" in shown
    assert run(out, "--resume") == 0
    same(out, whole)


@pytest.mark.slow
def test_a_full_disk_leaves_a_run_that_resumes(corpus, whole, tmp_path):
    """Breaks when an error of the disk ends in a traceback, a half-written file that counts, or other numbers."""
    out = tmp_path / "run"
    assert run(out, "--corpus", str(corpus), largest_file=700_000) == 2
    shown = Path(str(out) + ".log").read_text()
    assert "error: " in shown
    assert run(out, "--resume") == 0, Path(str(out) + ".log").read_text()
    same(out, whole)


def test_the_printed_next_steps_work(whole, capsys):
    """Breaks when the first thing that a user copies from the screen fails."""
    from dovetail.cli import main

    shown = Path(str(whole) + ".log").read_text()
    found = re.findall(r"^  [\w ]+: dovetail (checkpoint .*|data .*|generate .*)$", shown, re.MULTILINE)
    assert len(found) == 4
    for command in found:
        assert main(shlex.split(command)) == 0, command
    shown = capsys.readouterr().out
    assert "good  step 40" in shown
    assert "import os" in shown


def test_an_existing_run_is_refused(whole):
    assert run(whole) == 2
    assert "--overwrite" in Path(str(whole) + ".log").read_text()


def test_a_resumed_run_refuses_other_settings(whole):
    assert run(whole, "--resume", "--seed", "5") == 2
    assert "seed=5, but the run has 0" in Path(str(whole) + ".log").read_text()
