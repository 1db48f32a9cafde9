"""kill -9 inside a save: the last committed step stays, whole; what was half written goes at the next start."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import checkpoint_workers
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_workers import Counter, expected, save_until_killed

from dovetail_checkpoint import Manager, all_steps

pytestmark = pytest.mark.slow
STAGES = ["orbax", "manifest", "commit"]


@pytest.fixture(scope="module")
def context():
    """Children start from a server that has imported jax and Orbax but started no backend."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jax", "orbax.checkpoint", "dovetail_checkpoint", "checkpoint_workers"])
    return context


def kill_once(context, root, first, stage, delay, tmp_path):
    """Save in a child from step `first` on until it dies; return the last step that it reported."""
    progress = tmp_path / f"progress-{first}"
    child = context.Process(target=save_until_killed, args=(str(root), first, stage, str(progress)))
    child.start()
    if stage == "random":
        deadline = time.monotonic() + 60
        while not progress.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
    child.join(90)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join(10)
    assert not alive
    assert child.exitcode == -signal.SIGKILL
    return int(progress.read_text() or first)


def test_killed_at_every_stage_and_at_random(context, tmp_path, soak):
    """Every listed step restores bit-equal after every kill, and nothing that was reported is lost."""
    root, first, r = tmp_path / "root", 1, random.Random(0)
    for kill in range(100 if soak else 8):
        stage = STAGES[kill % 5] if kill % 5 < 3 else "random"
        reported = kill_once(context, root, first, stage, r.random() * 0.1, tmp_path)
        manager = Manager(root, keep=all_steps())
        steps = manager.steps()
        # The report follows the commit, so one more step may be committed than was reported.
        assert steps == list(range(1, len(steps) + 1))
        assert reported <= steps[-1] <= reported + 1, stage
        assert not list(root.glob(".tmp-*"))
        for step in {r.choice(steps), steps[-1]}:
            restored = manager.restore(
                {"w": jnp.zeros((257, 33)), "n": {"i": np.zeros(100, np.int64), "step": 0}},
                data=(loader := Counter()),
                step=step,
            )
            assert np.asarray(restored.state["w"]).tobytes() == expected(step)["w"].tobytes()
            assert restored.state["n"]["i"].tobytes() == expected(step)["n"]["i"].tobytes()
            assert (restored.state["n"]["step"], loader.position) == (step, step)
        assert not list(root.glob("*.corrupt-*"))
        first = steps[-1] + 1


def test_a_deletion_that_is_killed_leaves_no_half_step(tmp_path):
    """Deleting file by file under the step's own name would leave a listed step that cannot be read."""
    code = (
        "import os, shutil, signal, sys, numpy as np; from dovetail_checkpoint import Manager, latest\n"
        "def half(path, ignore_errors=False):\n"
        "    if not ignore_errors: os.unlink(path / 'manifest.json'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "m = Manager(sys.argv[1], keep=latest(1)); m.save(1, {'x': np.ones(1)}); m.wait(); shutil.rmtree = half\n"
        "m.save(2, {'x': np.ones(1)}); m.wait()\n"
    )
    # The staging directory is removed quietly after a commit; the deletion of step 1 is what dies.
    child = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=90, check=False, env=_cpu())
    assert child.returncode == -signal.SIGKILL
    manager = Manager(tmp_path)
    assert manager.steps() == [2]
    assert manager.restore().step == 2
    assert not list(tmp_path.glob(".tmp-*"))


def _cpu():
    return os.environ | {"JAX_PLATFORMS": "cpu"}


def test_one_process_saves_at_a_time(tmp_path):
    """A second trainer in the same directory is refused; the kill of the first frees it."""
    script = checkpoint_workers.__file__
    with subprocess.Popen(
        [sys.executable, script, "hold", str(tmp_path)], stdout=subprocess.PIPE, text=True, env=_cpu()
    ) as child:
        try:
            assert child.stdout.readline() == "ready\n"
            (tmp_path / ".tmp-9-dead00000000-1").mkdir()
            manager = Manager(tmp_path)
            assert manager.restore().step == 1
            assert (tmp_path / ".tmp-9-dead00000000-1").exists()
            with pytest.raises(RuntimeError, match="another process is saving"):
                manager.save(2, expected(2))
        finally:
            child.kill()
    manager.save(2, expected(2))
    manager.close()
    assert Manager(tmp_path).steps() == [1, 2]
    assert not (tmp_path / ".tmp-9-dead00000000-1").exists()


def test_a_script_that_ends_without_close(tmp_path):
    """A save that runs when the interpreter ends is committed; Orbax alone hangs there for 20 minutes.

    Python 3.12 starts no threads then, which Orbax needs: the process ends at once, with an error, one step behind.
    """
    code = (
        "import sys, numpy as np; from dovetail_checkpoint import Manager\n"
        "m = Manager(sys.argv[1]); m.save(1, {'x': np.ones(1)}); m.wait(); m.save(2, {'x': np.ones(1 << 20)})\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, timeout=90, check=False, env=_cpu(), capture_output=True, text=True)
    if sys.version_info[:2] == (3, 12) and done.returncode:
        assert done.returncode == 1
        assert "call close()" in done.stderr
        assert Manager(tmp_path).restore().step == 1
    else:
        assert Manager(tmp_path).restore().step == 2
