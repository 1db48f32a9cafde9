"""Typed fields of a parsed JSON object."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["FULL", "WINDOW", "ConfigError", "field"]

FULL, WINDOW = "full_attention", "sliding_attention"
"""Kinds of layers."""

_NONE: Any = object()


class ConfigError(ValueError):
    """A ``config.json`` does not describe a model that this package builds."""


def field(values: Mapping[str, Any], name: str, kind: type, default: Any = _NONE) -> Any:
    """Return a field, or the default where it is absent or null.

    Raises:
        ConfigError: the field has another type, is not finite, or is absent without a default.
    """
    value = values.get(name)
    if value is None and default is not _NONE:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{name}={value!r}; expected {'an' if kind is int else 'a'} {kind.__name__}")
    return value
