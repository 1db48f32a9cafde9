"""What importing the package costs and does."""

import subprocess
import sys

LIGHT = """
import time
import numpy, xxhash, jaxtyping
begin = time.process_time()
import dovetail_data, dovetail_data.commands
print(time.process_time() - begin)
import sys, threading
assert not {"jax", "grain", "pyarrow", "tokenizers", "dovetail_protocols"} & set(sys.modules)
assert not {"array_record", "bagz", "fsspec", "zstandard"} & set(sys.modules)
assert threading.active_count() == 1
"""

LOADER = """
import time
import numpy, xxhash, jaxtyping, grain, dovetail_protocols
begin = time.process_time()
import dovetail_data.loader
print(time.process_time() - begin)
"""


def seconds(program):
    command = [sys.executable, "-c", program]
    return min(float(subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=120).stdout) for _ in "12")


def test_importing_is_light():
    """Every worker process and every command line call pays for it."""
    assert seconds(LIGHT) < 0.3


def test_the_loader_adds_little_to_grain():
    """Grain itself takes seconds; ours must not show."""
    assert seconds(LOADER) < 0.3
