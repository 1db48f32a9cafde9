"""JSON that comes back as it went in: values are checked before they are written."""

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["checked_dumps", "dumps"]


def dumps(value: Any) -> str:
    """Return the one text that this package writes for a JSON value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def checked_dumps(name: str, value: Any) -> str:
    """Return the JSON text of a user's value.

    Raises:
        TypeError: a value or a key that JSON cannot hold; the message names its place.
        ValueError: NaN or infinity, which JSON cannot hold.
    """
    _check(name, value)
    return dumps(value)


def _check(place: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{place} has the key {key!r} of type {type(key).__name__}; JSON keys are strings")
            _check(f"{place}/{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(f"{place}/{index}", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value!r}, which JSON cannot hold; save None or a string")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{place} is a {type(value).__name__}; expected a JSON value (None, bool, int, float, str, list, dict)"
        )
