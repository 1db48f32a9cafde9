"""Two real processes (gloo on CPU): one step from both, errors on both, read back by one."""

import os
import signal
import socket
import subprocess
import sys

import checkpoint_workers
import jax
import numpy as np
import pytest
from checkpoint_workers import Counter, expected
from orbax.checkpoint import v1 as ocp

from dovetail_checkpoint import Manager, verify

pytestmark = pytest.mark.slow


def run_two(path, mode, timeout=150):
    """Run both processes; return their exit codes and outputs. When one is killed the other is killed too."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    children = [
        subprocess.Popen(
            [sys.executable, checkpoint_workers.__file__, "distributed", str(path), str(port), str(index), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        outputs = [children[0].communicate(timeout=timeout)[0]]
        if children[0].returncode == -signal.SIGKILL:
            children[1].kill()
        outputs.append(children[1].communicate(timeout=timeout)[0])
    finally:
        for child in children:
            child.kill()
            child.wait(10)
    return [child.returncode for child in children], outputs


def test_two_processes_save_and_one_restores(tmp_path):
    """Host-local leaves, keys, sharded and replicated arrays of two processes, read back on one with eight devices."""
    codes, outputs = run_two(tmp_path, "good")
    assert codes == [0, 0], "\n".join(outputs)
    for output in outputs:
        assert "step=3 has been saved" in output
        assert "step 3 differs from `like`" in output
        assert "fell back to 2" in output
    manager = Manager(tmp_path)
    assert manager.steps() == [2]
    assert not list(tmp_path.glob(".tmp-*"))
    values = expected(0)["w"][:256]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    like = manager.restore().state
    like |= {
        "split": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=split),
        "keys": jax.random.split(jax.random.key(0), 4),
    }
    step, state, meta = manager.restore(like, data=(loader := Counter()))
    assert (step, meta, loader.position) == (2, {"step": 2}, 11)
    assert state["split"].sharding == split
    np.testing.assert_array_equal(state["split"], values)
    np.testing.assert_array_equal(state["same"], values[:3])
    np.testing.assert_array_equal(state["local"], np.arange(5))
    np.testing.assert_array_equal(state["host"], values[:2])
    assert (state["keys"] == jax.random.split(jax.random.key(7), 4)).all()
    assert (state["count"], state["none"]) == (3, None)
    plain = ocp.load(
        str(tmp_path / "2"), {name: np.empty(0) for name in ("split", "same", "keys", "local", "host", "count")}
    )
    np.testing.assert_array_equal(plain["split"], values)


def test_failures_on_process_0(tmp_path):
    """A failed commit is an error on both; a process 0 that dies just before the rename leaves no listed step."""
    codes, outputs = run_two(tmp_path, "bad")
    assert codes == [-signal.SIGKILL, -signal.SIGKILL], "\n".join(outputs)
    assert "raised OSError: [Errno 28] No space left on device" in outputs[0]
    assert "raised RuntimeError: process 0 did not commit step 1" in outputs[1]
    assert all("steps []" in output for output in outputs)
    left = list(tmp_path.glob(".tmp-*/2"))
    assert verify(left[0]).step == 2
    manager = Manager(tmp_path)
    assert manager.steps() == []
    assert not list(tmp_path.glob(".tmp-*"))
