"""Shapes and types of every annotated call are checked at run time; programs that run once are compiled quickly."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

with jaxtyping.install_import_hook("dovetail_kernels", "beartype.beartype"):
    import dovetail_kernels  # noqa: F401


@pytest.fixture
def untyped() -> Iterator[None]:
    """Turn the run-time shape checks off, to see what a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
