"""Configuration files as thin views of frozen dataclasses: an unknown key is an error with the nearest match."""

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["ConfigError", "dump", "load"]

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration file cannot be read as the dataclass it should describe."""


def load(kind: type[T], path: Path) -> T:
    """Read a dataclass from a YAML, TOML or JSON file.

    Raises:
        ConfigError: the file is missing or malformed, has an unknown key, or a value of the wrong type.
    """
    try:
        return build(kind, _parse(path), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path) -> Any:
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        match path.suffix:
            case ".yaml" | ".yml":
                return yaml.safe_load(text) or {}
            case ".toml":
                return tomllib.loads(text)
            case ".json":
                return json.loads(text)
            case _:
                raise ConfigError(f"{path} ends in {path.suffix!r}; expected .yaml, .toml or .json")
    except (yaml.YAMLError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is malformed: {error}") from error


def build(kind: type[T], values: Any, where: str = "configuration") -> T:
    """Make a dataclass from nested mappings.

    Raises:
        ConfigError: an unknown key (with the nearest match) or a value that the dataclass refuses.
    """
    import cattrs

    _check_keys(kind, values, where)
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_structure_hook(Path, lambda value, _: Path(value))
    for plain in (int, float, bool, str):
        converter.register_structure_hook(plain, _exactly)
    try:
        return converter.structure(values, kind)
    except Exception as error:
        reasons = "; ".join(cattrs.transform_error(error, path=where, format_exception=lambda e, _: str(e)))
        raise ConfigError(reasons) from error


def _exactly(value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _check_keys(kind: Any, values: Any, where: str) -> None:
    if not dataclasses.is_dataclass(kind):
        return
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {values!r}; expected a mapping of {[f.name for f in dataclasses.fields(kind)]}")
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}? (known: {', '.join(fields)})")
        _check_keys(fields[key], value, f"{where}.{key}")


def dump(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON-serialisable nested mappings, the inverse of `build`."""
    import cattrs

    converter = cattrs.Converter()
    converter.register_unstructure_hook(Path, str)
    return converter.unstructure(value)
