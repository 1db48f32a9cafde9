"""The composed pipeline: one process, two processes, several devices; killed and resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest

PIPELINE = Path(__file__).parent.parent / "pipelines" / "pretrain.py"
STEPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name in ("argparse", "ast", "bdb", "cmd", "code", "copy", "csv", "dis", "enum", "shlex"):
        (folder / f"{name}.py").write_text((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text())
    return folder


def start(corpus, out, *, devices=1, **environment):
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    words = [sys.executable, str(PIPELINE), str(corpus), "--out", str(out), "--steps", str(STEPS)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, env=os.environ | settings, **pipes)


def finish(*children, timeout=240):
    """Wait for all; SIGKILL what is left, because jax swallows SIGTERM in multi-process runs."""
    limit = time.monotonic() + timeout
    try:
        outputs = [child.communicate(timeout=max(1, limit - time.monotonic()))[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs, strict=True):
        assert child.returncode == 0, output[-3000:]


def metrics(out, process=0):
    lines = (out / f"process{process}" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    finish(start(corpus, out))
    return out


def losses(out, process=0):
    return [row["loss"] for row in metrics(out, process) if "loss" in row]


def test_the_run_learns_and_exports(alone):
    rows = losses(alone)
    assert len(rows) == STEPS
    assert rows[-1] < rows[0] - 0.3
    assert (alone / "model" / "config.json").exists()
    assert (alone / "model" / "tokenizer.json").exists()


@pytest.mark.multiprocess
def test_two_processes_see_the_same_data_and_losses(corpus, alone, tmp_path):
    """Breaks when rows are lost, repeated or reordered over processes, or gradients are averaged wrongly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    finish(*(start(corpus, tmp_path, **shared, JAX_PROCESS_ID=str(i)) for i in range(2)))
    assert metrics(tmp_path, 0) == metrics(tmp_path, 1)
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-4)
    weights = [[r["weight"] for r in metrics(out) if "weight" in r] for out in (tmp_path, alone)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_killed_and_resumed_on_another_number_of_devices(corpus, alone, tmp_path):
    """Breaks when a checkpoint of one mesh cannot be continued on another, or the data moves."""
    child = start(corpus, tmp_path)
    path = tmp_path / "process0" / "metrics.jsonl"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and not (path.exists() and len(path.read_text().splitlines()) >= 7):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    finish(start(corpus, tmp_path, devices=4))
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=1e-4)
