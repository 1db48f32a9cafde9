"""Rotary settings of Hugging Face configurations: ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``.

Where layers with a window have a base of their own, ``rope_parameters`` holds the settings of each kind of layer, and
transformers 4 has one more field (or one base for both).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_kernels import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from dovetail_models.hf_fields import FULL, WINDOW, ConfigError, field

__all__ = [
    "FIELDS",
    "KINDS",
    "LONG_KINDS",
    "ORIGINAL",
    "SHARE",
    "from_hf",
    "local_from_hf",
    "local_to_hf",
    "share",
    "to_hf",
]

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
KINDS: dict[str, type[Any]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
LONG_KINDS: dict[str, type[Any]] = {"longrope": LongRopeScaling}
"""Scalings that need to know how long sequences get, which most families do not ask."""
ORIGINAL = "original_max_position_embeddings"
SHARE = "partial_rotary_factor"


def from_hf(
    values: Mapping[str, Any],
    max_position: int,
    theta: float,
    *,
    partial: bool = False,
    kinds: Mapping[str, type[Any]] = KINDS,
) -> tuple[float, RopeScaling | None]:
    """Return the base of the wavelengths, `theta` where none is given, and the scaling.

    Args:
        values: a parsed ``config.json``.
        max_position: the longest context.
        theta: base of the wavelengths where none is given.
        partial: a share of features is read by `share`, and not refused here.
        kinds: scalings by name.

    Raises:
        ConfigError: another kind of scaling, a malformed field, or two descriptions that differ.
    """
    found = {name: values[name] for name in FIELDS[1:] if values.get(name)}
    values = {"rope_theta": theta} | {name: value for name, value in values.items() if value is not None}
    read = {name: _read(name, given, values, max_position, kinds, partial) for name, given in found.items()}
    if len(read) == 2 and read["rope_scaling"] != read["rope_parameters"]:
        raise ConfigError(f"rope_scaling={found['rope_scaling']} and rope_parameters={found['rope_parameters']} differ")
    return next(iter(read.values()), (field(values, "rope_theta", float), None))


def share(values: Mapping[str, Any], default: float) -> float:
    """Return which share of a head's features is turned.

    Raises:
        ConfigError: it is no number from 0 to 1, or two that differ.
    """
    places = {name: (values.get(name) or {}).get(SHARE) for name in FIELDS[1:]}
    given = {name: value for name, value in places.items() if value is not None}
    if len(given) == 2 and given["rope_scaling"] != given["rope_parameters"]:
        raise ConfigError(f"{SHARE} is different in two places, {given}; expected one number")
    found = field({SHARE: next(iter(given.values()), values.get(SHARE))}, SHARE, float, default)
    if not 0 < found <= 1:
        raise ConfigError(f"{SHARE}={found}; expected above 0 and at most 1")
    return found


def _read(
    name: str,
    given: Any,
    values: Mapping[str, Any],
    max_position: int,
    kinds: Mapping[str, type[Any]],
    partial: bool,
) -> tuple[float, RopeScaling | None]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}={given!r}; expected an object")
    rest = {key: value for key, value in given.items() if value is not None}
    theta = field({"rope_theta": values["rope_theta"]} | rest, "rope_theta", float)
    kind = rest.get("rope_type", rest.get("type", "default"))
    for key in ("rope_theta", "rope_type", "type"):
        rest.pop(key, None)
    if partial or rest.get(SHARE) == 1:
        rest.pop(SHARE, None)
    return theta, _scaling(kind, rest, max_position, kinds)


def _scaling(kind: Any, rest: dict[str, Any], max_position: int, kinds: Mapping[str, type[Any]]) -> RopeScaling | None:
    if kind != "default" and (not isinstance(kind, str) or kind not in kinds):
        raise ConfigError(f"rope type {kind!r}; supported are 'default', {', '.join(map(repr, kinds))}")
    fields = {f.name: f for f in dataclasses.fields(kinds[kind])} if kind in kinds else {}
    if kind in ("yarn", "longrope") and "factor" not in rest and ORIGINAL in rest:
        rest["factor"] = max_position / max(1, field(rest, ORIGINAL, int))
    if "original_max_position" in fields:
        rest["original_max_position"] = rest.pop(ORIGINAL, max_position)
    unknown = sorted(set(rest) - set(fields))
    if unknown:
        raise ConfigError(f"rope of type {kind!r} has the fields {unknown}, which are not supported")
    required = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in rest]
    if required:
        raise ConfigError(f"rope of type {kind!r} lacks {required}")
    types = {"original_max_position": int, "truncate": bool}
    lists = ("short_factor", "long_factor")
    options = {
        name: _numbers(rest, name) if name in lists else field(rest, name, types.get(name, float)) for name in rest
    }
    try:
        return kinds[kind](**options) if kind in kinds else None
    except ValueError as error:
        raise ConfigError(f"rope of type {kind!r}: {error}") from error


def _numbers(rest: Mapping[str, Any], name: str) -> tuple[float, ...]:
    if not isinstance(rest[name], list | tuple) or not rest[name]:
        raise ConfigError(f"{name}={rest[name]!r}; expected a list of numbers")
    return tuple(field({name: value}, name, float) for value in rest[name])


def to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the fields of transformers 4 and those of transformers 5."""
    if scaling is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        }
    kind = next(name for name, made in (KINDS | LONG_KINDS).items() if isinstance(scaling, made))
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    if "original_max_position" in fields:
        fields[ORIGINAL] = fields.pop("original_max_position")
    fields["rope_type"] = kind
    return {"rope_theta": theta, "rope_scaling": fields, "rope_parameters": {"rope_theta": theta, **fields}}


def local_from_hf(
    values: Mapping[str, Any], max_position: int, name: str, theta: float
) -> tuple[Mapping[str, Any], float]:
    """Return the fields that `from_hf` reads for layers without a window, and the base in those with one.

    Args:
        values: a parsed ``config.json``.
        max_position: the context length.
        name: of the field that holds the base in transformers 4.
        theta: the base where none is given.

    Raises:
        ConfigError: settings that are not of each kind of layer, or a scaling in layers with a window.
    """
    given = values.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or set(given) - {FULL, WINDOW}:
        raise ConfigError(f"rope_parameters={given!r}; expected an object with {FULL!r} and {WINDOW!r}")
    mine = {"rope_theta": values.get(name), "rope_parameters": given.get(WINDOW)}
    local, scaling = from_hf(mine, max_position, theta)
    if scaling is not None:
        raise ConfigError(f"rope_parameters={given!r}; layers of kind {WINDOW!r} support the type 'default' alone")
    return {**values, "rope_parameters": given.get(FULL)}, local


def local_to_hf(fields: Mapping[str, Any], name: str, theta: float) -> dict[str, Any]:
    """Return what `to_hf` gave, with the base in layers with a window; see `local_from_hf`."""
    kinds = {FULL: fields["rope_parameters"], WINDOW: to_hf(theta, None)["rope_parameters"]}
    return {name: theta, **fields, "rope_parameters": kinds}
