"""Importing is cheap, complete and without side effects."""

import subprocess
import sys

import dovetail_protocols
from dovetail_protocols import testing

PROBE = """
import sys, time
import jax, jax.numpy, jaxtyping, numpy
start = time.process_time()
import dovetail_protocols
took = time.process_time() - start
assert "dovetail_protocols.testing" not in sys.modules, "the kits are imported by the top level"
assert not jax._src.xla_bridge._backends, "importing initialised a backend"
print(took)
"""


def test_import_budget():
    """Our own modules add less than 0.3 s to the third-party imports; the kits are not among them."""
    assert any(_probe() < 0.3 for _ in range(3))


def _probe():
    run = subprocess.run([sys.executable, "-c", PROBE], check=False, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def test_all_names_exist():
    for module in (dovetail_protocols, dovetail_protocols.paths, testing):
        assert sorted(module.__all__) == list(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
