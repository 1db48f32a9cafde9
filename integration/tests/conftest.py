"""The tests of this folder run with every package installed; they also import the benchmark harness.

Programs, most of which run once, are compiled quickly; those of child processes, too.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
