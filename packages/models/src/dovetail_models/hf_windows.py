"""Which layers see a window only: ``layer_types`` with ``sliding_window`` to and from windows per layer."""

from collections.abc import Callable, Mapping
from typing import Any

from dovetail_models.hf_config import Fields
from dovetail_models.hf_fields import FULL, WINDOW, ConfigError, field

__all__ = ["FULL", "WINDOW", "one_width", "periodic_windows", "qwen_windows", "read_types"]


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


def periodic_windows(width: int, period: int, period_field: str | None = None) -> Fields:
    """Return the fields of models in which all layers but the last of each period see a window.

    Args:
        width: of the windows where none is given.
        period: layers in it.
        period_field: has another period.
    """

    def read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
        every = period if period_field is None else field(values, period_field, int, period)
        if every < 1:
            raise ConfigError(f"{period_field}={every}; expected at least 1")
        types = read_types(values, fields["layers"], lambda i: WINDOW if (i + 1) % every else FULL)
        if WINDOW not in types:
            return {"windows": None}
        seen = field({"sliding_window": width} | dict(values), "sliding_window", int)  # null is another value than none
        return {"windows": tuple(seen if kind == WINDOW else None for kind in types)}

    def write(config: Any) -> Mapping[str, Any]:
        windows = config.windows or (None,) * config.layers
        return {
            "sliding_window": one_width(windows) or width,  # transformers wants one even where no layer has a window
            "layer_types": [FULL if window is None else WINDOW for window in windows],
        }

    names = ("sliding_window", "layer_types", *(() if period_field is None else (period_field,)))
    return Fields(names, read, write)


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
