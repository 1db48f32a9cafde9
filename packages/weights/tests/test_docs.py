"""The README's blocks and docstring examples run; importing is cheap and has no side effects."""

import doctest
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import dovetail_weights

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_readme_runs():
    """A reader who copies the blocks in order gets what the README says."""
    document = Sybil(parsers=[PythonCodeBlockParser()]).parse(README)
    examples = list(document.examples())
    assert len(examples) >= 3
    for example in examples:
        example.evaluate()


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(dovetail_weights.__path__)])
def test_docstring_examples_run(name):
    """A docstring shows something that no longer holds."""
    assert doctest.testmod(importlib.import_module(f"dovetail_weights.{name}")).failed == 0


IMPORT = """
import time, jax, ml_dtypes, numpy, xxhash, dovetail_protocols, threading, os
before, cwd = set(threading.enumerate()), dict(os.environ)
t = time.perf_counter(); import dovetail_weights; print(time.perf_counter() - t)
assert set(threading.enumerate()) == before and dict(os.environ) == cwd
"""


def test_own_modules_import_within_budget():
    """Importing the package became slow (0.3 s on top of the third-party imports), or does something."""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=True)
        times.append(float(done.stdout))
        if min(times) < 0.3:
            break
    assert min(times) < 0.3
