"""Rotary settings of Hugging Face configurations: ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_kernels import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from dovetail_models.hf_fields import ConfigError, field

__all__ = ["FIELDS", "SHARE", "from_hf", "share", "to_hf"]

FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
KINDS: dict[str, type[Any]] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}
ORIGINAL = "original_max_position_embeddings"
SHARE = "partial_rotary_factor"


def from_hf(
    values: Mapping[str, Any], max_position: int, theta: float, *, partial: bool = False
) -> tuple[float, RopeScaling | None]:
    """Return the base of the wavelengths, `theta` where none is given, and the scaling.

    Args:
        values: a parsed ``config.json``.
        max_position: the longest context.
        theta: base of the wavelengths where none is given.
        partial: a share of features is read by `share`, and not refused here.

    Raises:
        ConfigError: another kind of scaling, a malformed field, or two descriptions that differ.
    """
    found = {name: values[name] for name in FIELDS[1:] if values.get(name)}
    values = {"rope_theta": theta} | {name: value for name, value in values.items() if value is not None}
    read = {name: _read(name, given, values, max_position, partial) for name, given in found.items()}
    if len(read) == 2 and read["rope_scaling"] != read["rope_parameters"]:
        raise ConfigError(f"rope_scaling={found['rope_scaling']} and rope_parameters={found['rope_parameters']} differ")
    return next(iter(read.values()), (field(values, "rope_theta", float), None))


def share(values: Mapping[str, Any], default: float) -> float:
    """Return which share of a head's features is turned.

    Raises:
        ConfigError: it is no number from 0 to 1.
    """
    places = [values.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    given = next((place for place in (*places, values) if place.get(SHARE) is not None), {})
    found = field(given, SHARE, float, default)
    if not 0 < found <= 1:
        raise ConfigError(f"{SHARE}={found}; expected above 0 and at most 1")
    return found


def _read(
    name: str, given: Any, values: Mapping[str, Any], max_position: int, partial: bool
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
    return theta, _scaling(kind, rest, max_position)


def _scaling(kind: Any, rest: dict[str, Any], max_position: int) -> RopeScaling | None:
    if kind != "default" and (not isinstance(kind, str) or kind not in KINDS):
        raise ConfigError(f"rope type {kind!r}; supported are 'default', {', '.join(map(repr, KINDS))}")
    fields = {f.name: f for f in dataclasses.fields(KINDS[kind])} if kind in KINDS else {}
    if kind == "yarn" and "factor" not in rest and ORIGINAL in rest:
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
    options = {name: field(rest, name, types.get(name, float)) for name in rest}
    try:
        return KINDS[kind](**options) if kind in KINDS else None
    except ValueError as error:
        raise ConfigError(f"rope of type {kind!r}: {error}") from error


def to_hf(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """Return the fields of transformers 4 and those of transformers 5."""
    if scaling is None:
        return {
            "rope_theta": theta,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        }
    kind = next(name for name, made in KINDS.items() if isinstance(scaling, made))
    fields = {name: value for name, value in dataclasses.asdict(scaling).items() if value is not None}
    if "original_max_position" in fields:
        fields[ORIGINAL] = fields.pop("original_max_position")
    fields["rope_type"] = kind
    return {"rope_theta": theta, "rope_scaling": fields, "rope_parameters": {"rope_theta": theta, **fields}}
