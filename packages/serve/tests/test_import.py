"""Importing is cheap, has no side effects, and needs no model, no engine and no jax."""

import subprocess
import sys

IMPORT = """
import time, uvicorn, uvicorn.config, prometheus_client, msgspec, asyncio, concurrent.futures, uuid, difflib
import sys, threading, os, dovetail_protocols
before, environment = set(threading.enumerate()), dict(os.environ)
t = time.perf_counter(); import dovetail_serve; print(time.perf_counter() - t)
assert set(threading.enumerate()) == before and dict(os.environ) == environment
assert not [m for m in ("jax", "flax", "dovetail_engine", "dovetail_models", "starlette") if m in sys.modules]
"""


def test_own_modules_import_within_budget():
    """Importing the package became slow (0.3 s on top of the third-party imports), or does or brings something."""
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=True)
        times.append(float(done.stdout))
        if min(times) < 0.3:
            break
    assert min(times) < 0.3
