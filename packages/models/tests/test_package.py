"""What importing the package costs and does."""

import subprocess
import sys

PROGRAM = """
import sys, time
import jax, jaxtyping, numpy, flax.nnx, ml_dtypes, xxhash
import dovetail_protocols, dovetail_kernels, dovetail_runtime, dovetail_weights
jax.numpy
before = dict(jax.config.values)
begin = time.process_time()
import dovetail_models
print(time.process_time() - begin)
import threading
assert threading.active_count() == 1
assert dict(jax.config.values) == before
assert not {"pytest", "transformers", "torch", "dovetail_train"} & set(sys.modules)
"""


def test_importing_is_light_and_does_nothing() -> None:
    """Every process pays for an import, and settings must not change behind a user's back."""
    command = [sys.executable, "-c", PROGRAM]
    runs = (subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout for _ in "12")
    assert min(float(out) for out in runs) < 0.3
