"""Checks shapes and types of every annotated call."""

import sys
from pathlib import Path

import jaxtyping
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # worker processes import data_toys from here

with jaxtyping.install_import_hook("dovetail_data", "beartype.beartype"):
    import dovetail_data

import numpy as np
from data_toys import Arrays, Bytes


@pytest.fixture
def untyped():
    """Turns the run-time type checks off, to see the errors that a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def source():
    """37 documents of 1 to 12 tokens, in memory."""
    return Arrays(np.random.default_rng(0).integers(1, 13, 37))


@pytest.fixture
def cache(tmp_path):
    """40 documents in 5 shards."""
    texts = [f"document {i} " * (i % 7) for i in range(40)]
    return dovetail_data.build_cache(texts, Bytes(), tmp_path / "cache", shard_tokens=300)
