"""What this package raises about files and maps that it cannot use."""

import difflib
from collections.abc import Collection, Iterable

__all__ = ["WeightsError", "nearest"]


class WeightsError(ValueError):
    """A file is not what it should be, or a map does not fit; the message names file, tensor and expectation."""


def nearest(name: str, among: Collection[str]) -> str:
    """Return the names most like `name`, for a message."""
    return ", ".join(difflib.get_close_matches(name, among, n=3, cutoff=0.0)) or "none, there are no names"


def listing(names: Iterable[str]) -> str:
    """Return names one per line, for a message."""
    return "".join(f"\n  {name}" for name in names)
