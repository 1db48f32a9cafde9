"""The commands: what they print, their exit status, and that they load neither jax nor Orbax."""

import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_workers import Counter

from dovetail_checkpoint import Manager, all_steps
from dovetail_checkpoint.commands import List, Show, Verify
from dovetail_protocols import Command, CommandError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("steps")
    with Manager(path, keep=all_steps()) as manager:
        for step in (10, 20):
            state = {"w": jnp.ones((4, 2)), "b": np.ones(3), "n": 3, "none": None}
            manager.save(step, state, data=Counter(), meta={"note": "hi"}, metrics={"loss": 1 / step})
    shutil.copytree(path / "10", path / "15.corrupt-1")
    return path


def test_ls(root, capsys):
    """Steps, sizes, times, metrics and what was moved aside."""
    assert isinstance(List(root), Command)
    assert List(root).run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "size", "files", "committed", "metrics"]
    assert lines[1].split()[0] == "10"
    assert lines[2].split()[0] == "20"
    assert "loss=0.05" in lines[2]
    assert lines[3] == "15.corrupt-1  quarantined"


def test_show(root, capsys):
    """Leaves with shapes, dtypes and shardings; metadata; versions."""
    Show(root).run()
    out = capsys.readouterr().out
    assert out.startswith("step 20,")
    assert "float32[4,2]" in out
    assert "SingleDeviceSharding" in out
    assert "a Python int" in out
    assert '{"note":"hi"}' in out
    assert "orbax-checkpoint 0." in out
    Show(root, step=10).run()
    assert capsys.readouterr().out.startswith("step 10,")


def test_verify(root, tmp_path, capsys):
    """Exit status 1 and the file's name when a byte differs."""
    bad = shutil.copytree(root, tmp_path / "bad")
    assert Verify(root, all=True).run() == 0
    assert capsys.readouterr().out.count("good  step") == 2
    file = bad / "10" / "data.json"
    file.write_text(file.read_text().replace("0", "1"))
    assert Verify(bad).run() == 0
    assert Verify(bad, step=10).run() == 1
    assert Verify(bad, all=True).run() == 1
    assert "10/data.json has digest" in capsys.readouterr().out
    (bad / "20" / "manifest.json").unlink()
    assert List(bad).run() == 1
    with pytest.raises(CommandError, match=r"manifest\.json is missing"):
        Show(bad).run()


@pytest.mark.parametrize(
    "make",
    [
        lambda root: List(root / "absent"),
        lambda root: List(root / "10" / "data.json"),
        lambda root: Show(root / "10"),
        lambda root: Show(root, step=11),
        lambda root: Verify(root, step=11),
        lambda root: Verify(root, step=10, all=True),
    ],
)
def test_user_errors(root, make):
    """Mistakes print one line, no traceback."""
    with pytest.raises(CommandError):
        make(root).run()


CODE = """
import sys
from pathlib import Path
from dovetail_checkpoint.commands import List, Show, Verify
root = Path(sys.argv[1])
List(root).run(), Show(root).run(), Verify(root, all=True).run()
heavy = {"jax", "orbax", "tensorstore", "numpy"} & {name.split(".")[0] for name in sys.modules}
assert not heavy, heavy
"""


def test_commands_load_neither_jax_nor_orbax(root):
    """Looking at a directory takes a tenth of a second, not five."""
    subprocess.run([sys.executable, "-c", CODE, str(root)], check=True, timeout=60, capture_output=True)


BUDGET = """
import time, threading
import jax, numpy, xxhash
from orbax.checkpoint import v1
before = threading.active_count()
start = time.perf_counter()
import dovetail_checkpoint
from dovetail_checkpoint import _orbax, _restore, _tree, commands
print(time.perf_counter() - start)
assert threading.active_count() == before
jax.config.update("jax_num_cpu_devices", 3)  # refused once a backend has started
"""


def test_import_budget():
    """Our own modules add less than 0.3 s to the third-party imports, start no thread and no backend."""
    times = [
        float(subprocess.run([sys.executable, "-c", BUDGET], check=True, timeout=120, capture_output=True).stdout)
        for _ in range(2)
    ]
    assert min(times) < 0.3
