"""The tests of this folder run with every package installed; they also import the benchmark harness."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
