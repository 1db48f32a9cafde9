"""Importing is cheap: our modules add little to what third parties take."""

import subprocess
import sys

CODE = """
import time
import flax.nnx, jax, jaxtyping, numpy, optax
from jax.sharding import Mesh
t = time.perf_counter()
import dovetail_train
print(time.perf_counter() - t)
"""


def test_import_budget():
    runs = [
        float(
            subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, timeout=120).stdout
        )
        for _ in range(3)
    ]
    assert min(runs) < 0.3
