"""Shapes and types of every annotated call are checked at run time."""

from collections.abc import Iterator

import jaxtyping
import pytest

with jaxtyping.install_import_hook("dovetail_kernels", "beartype.beartype"):
    import dovetail_kernels  # noqa: F401


@pytest.fixture
def untyped() -> Iterator[None]:
    """Turn the run-time shape checks off, to see what a user without them sees."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
