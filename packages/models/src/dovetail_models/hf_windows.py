"""Which layers see a window only: ``layer_types`` with ``sliding_window`` to and from windows per layer."""

from collections.abc import Callable, Mapping
from typing import Any

from dovetail_models.hf_config import Fields
from dovetail_models.hf_fields import ConfigError, field

__all__ = ["FULL", "WINDOW", "check_windows", "one_width", "qwen_windows", "read_types"]

FULL, WINDOW = "full_attention", "sliding_attention"


def check_windows(windows: tuple[int | None, ...] | None, layers: int) -> None:
    """Check windows per layer.

    Raises:
        ValueError: not one for each layer, or a window that holds no token.
    """
    if windows is None:
        return
    if len(windows) != layers:
        raise ValueError(f"windows={windows}; expected one for each of {layers} layers, or None")
    if any(window is not None and window < 1 for window in windows):
        raise ValueError(f"windows={windows}; expected numbers of at least 1, or None for all tokens")


def read_types(values: Mapping[str, Any], layers: int, default: Callable[[int], str]) -> list[str]:
    """Return the kind of every layer, `FULL` or `WINDOW`.

    Args:
        values: a parsed ``config.json``.
        layers: how many.
        default: the kind of a layer where ``layer_types`` is absent.

    Raises:
        ConfigError: not one for each layer, or an unknown kind.
    """
    types = values.get("layer_types")
    if types is None:
        return [default(i) for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or set(types) - {FULL, WINDOW}:
        raise ConfigError(f"layer_types={types!r}; expected a list of {layers} of {FULL!r} and {WINDOW!r}")
    return types


def one_width(windows: tuple[int | None, ...]) -> int | None:
    """Return the width of all windows, or None where there are none.

    Raises:
        ConfigError: they differ.
    """
    widths = {window for window in windows if window is not None}
    if len(widths) > 1:
        raise ConfigError(f"windows={windows}; transformers knows one width for all layers of a model")
    return next(iter(widths), None)


def _read_qwen(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    used = field(values, "use_sliding_window", bool, False)
    width = field({"sliding_window": 4096} | dict(values), "sliding_window", int, None) if used else None
    first = field(values, "max_window_layers", int, 28)
    layers = fields["layers"]
    types = read_types(values, layers, lambda i: WINDOW if width is not None and i >= first else FULL)
    if width is None and WINDOW in types:
        raise ConfigError(f"layer_types={types!r} without use_sliding_window; expected {FULL!r} everywhere")
    return {"windows": tuple(width if kind == WINDOW else None for kind in types) if WINDOW in types else None}


def _write_qwen(config: Any) -> Mapping[str, Any]:
    windows = config.windows or (None,) * config.layers
    width = one_width(windows)
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "max_window_layers": next((i for i, window in enumerate(windows) if window is not None), config.layers),
        "layer_types": [FULL if window is None else WINDOW for window in windows],
    }


qwen_windows = Fields(
    ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"), _read_qwen, _write_qwen
)
