"""Importing is cheap and has no side effects."""

import subprocess
import sys

IMPORT = """
import time, jax, tokenizers, tokenizers.decoders, jinja2, jinja2.sandbox, jinja2.ext, dovetail_protocols, threading, os
before, cwd = set(threading.enumerate()), dict(os.environ)
t = time.perf_counter(); import dovetail_text; print(time.perf_counter() - t)
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
