"""A Hugging Face directory: its configuration, the family that it names, the headers of its tensors."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail_models.family import Family, architecture_family, named_family
from dovetail_models.hf_fields import ConfigError
from dovetail_models.hub import located
from dovetail_models.layers import without_values
from dovetail_models.state import split
from dovetail_protocols import paths
from dovetail_weights import Directory, WeightMap, check, open_directory

__all__ = ["Opened", "chosen_family", "noted_dtype", "open_pretrained", "read_config"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A directory of which configuration and headers were read.

    Attributes:
        path: the directory.
        values: the parsed ``config.json``.
        family: how to read it.
        config: our configuration.
        tensors: by their names.
    """

    path: Path
    values: Mapping[str, Any]
    family: Family
    config: Any
    tensors: Directory

    def module(self, **options: Any) -> Any:
        """Return the model without values, see `from_pretrained`."""
        return without_values(self.family.model, self.config, **options)

    @property
    def ignored(self) -> list[str]:
        """Names of tensors that a checkpoint may repeat or that are no parameters, as globs."""
        tied = ["lm_head.weight"] if getattr(self.config, "tied", False) else []
        return ["*.rotary_emb.inv_freq", *tied, *self.family.ignored]

    def table(self, like: Any) -> WeightMap:
        """Return the map of a tree of parameters and of the tensors, as this checkpoint spells their names."""
        plain = self.family.table(self.config)
        addresses, names = paths.flatten(like), set(self.tensors)

        def there(table: WeightMap) -> int:
            return sum(name in names for group in table.groups(addresses) for name in group.names)

        others = [plain.spelled(pairs) for pairs in self.family.spellings]
        return max([plain, *others], key=there) if others else plain

    def check(self) -> dict[str, str]:
        """Return the names of the tensors that the model needs: as they are written, with those of this checkpoint.

        Raises:
            dovetail_weights.WeightsError: tensors are missing, unexpected, or of another shape.
        """
        _, like = split(self.module())
        groups = self.family.weight_map(self.config).groups(paths.flatten(like))
        found = check(self.tensors, self.table(like), like, ignore=self.ignored)
        return dict(zip((name for group in groups for name in group.names), found, strict=True))


def open_pretrained(
    path: str | os.PathLike[str], family: Family | str | None = None, revision: str | None = None
) -> Opened:
    """Read the configuration and the headers of a directory.

    Args:
        path: the directory, or a name of the hub, see `located`.
        family: how to read it, or its architecture; None for the one that ``config.json`` names.
        revision: of the hub.

    Raises:
        ConfigError: the configuration is malformed or describes another model.
        HubError: the hub does not give the model.
        dovetail_weights.WeightsError: a file of tensors is damaged.
        FileNotFoundError: there is no such directory or file.
    """
    folder = located(path, revision)
    values = read_config(folder / "config.json")
    family = chosen_family(values, family)
    config = family.config_map.read(values)
    tensors = open_directory(folder)
    if config.layers > len(tensors):
        raise ConfigError(f"num_hidden_layers={config.layers}, but the checkpoint has only {len(tensors)} tensors")
    return Opened(folder, values, family, family.held(config, tensors), tensors)


def chosen_family(values: Mapping[str, Any], family: Family | str | None) -> Family:
    """Return the family of an architecture, or without one that of a parsed ``config.json``; for errors see there."""
    if isinstance(family, str):
        return architecture_family(family)
    return named_family(values) if family is None else family


def read_config(path: Path) -> dict[str, Any]:
    """Return a parsed ``config.json``.

    Raises:
        ConfigError: it holds no JSON object.
        FileNotFoundError: it does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is malformed: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected an object")
    return values


def noted_dtype(values: Mapping[str, Any]) -> str:
    """Return the dtype of the parameters that a ``config.json`` notes, float32 where it notes none.

    Raises:
        ConfigError: it is no floating-point dtype.
    """
    noted = values.get("dtype") or values.get("torch_dtype") or "float32"
    if noted not in ("bfloat16", "float16", "float32", "float64"):
        raise ConfigError(f"dtype={noted!r}; expected a floating-point dtype such as 'bfloat16'")
    return noted
