"""The environments of the contestants, made on first use under ``.nox`` and kept until their recipe changes."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch==2.13.0", "transformers==5.23.0")


def interpreter(version: str) -> str:
    """Return the path of an installed Python of this version.

    Raises:
        RuntimeError: there is none.
    """
    found = subprocess.run(["uv", "python", "find", "--system", version], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"Python {version} is not installed; uv says: {found.stderr.strip()}")
    return found.stdout.strip()


def current() -> str:
    """The environment that the harness itself runs in."""
    return sys.executable


def ours() -> str:
    """Every package at the versions of the lock on Python 3.13, hence with the newest jax."""
    where = ROOT / ".nox" / "bench-ours"
    command = ["uv", "sync", "-q", "--frozen", "--all-packages", "--all-extras", f"--python={interpreter('3.13')}"]
    env = {**os.environ, "UV_PROJECT_ENVIRONMENT": str(where)}
    env.pop("VIRTUAL_ENV", None)
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return str(where / "bin" / "python")


def torch() -> str:
    """PyTorch for the CPU and transformers on Python 3.11, installed with pip."""
    return with_pip("bench-torch", "3.11", TORCH)


def with_pip(name: str, version: str, requirements: tuple[str, ...]) -> str:
    """Make ``.nox/NAME`` with venv and pip, one requirement after the other, unless it is there already."""
    where = ROOT / ".nox" / name
    python, stamp = where / "bin" / "python", where / "recipe"
    recipe = hashlib.sha256(repr((version, requirements)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == recipe:
        return str(python)
    shutil.rmtree(where, ignore_errors=True)
    subprocess.run([interpreter(version), "-m", "venv", str(where)], check=True)
    for requirement in requirements:  # in order: a later one must not choose another build of an earlier one
        subprocess.run([str(python), "-m", "pip", "install", "-q", requirement], check=True)
    stamp.write_text(recipe)
    return str(python)


ENVIRONMENTS: dict[str, Callable[[], str]] = {"current": current, "ours": ours, "torch": torch}
