"""Run the README's blocks and the docstrings' examples; let tests import their helpers."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

sys.path.insert(0, str(Path(__file__).parent))

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()],
    patterns=["README.md"],
    path=str(Path(__file__).parent.parent),
    setup=lambda namespace: namespace.update(jax=jax, jnp=jnp),
).pytest()
