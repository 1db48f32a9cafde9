"""``adapter_config.json`` of `peft`: what it says of an adapter, and what of it nobody here can honour."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail_models.hf_directory import read_config
from dovetail_models.hf_fields import ConfigError, field

__all__ = ["CONFIG", "PeftConfig", "named"]

CONFIG = "adapter_config.json"

FIXED = {"peft_type": "LORA", "bias": "none"}
"""Fields with the one value that is read."""

IGNORED = frozenset(
    [
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode"),
        *("init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    ]
)
"""Fields that the adapter's numbers do not depend on once it is trained."""

ALTERED = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initial values of adapters that alter the base weights, too."""


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What the file says of an adapter.

    Attributes:
        rank: of most modules.
        alpha: of most modules.
        ranks: of modules whose names match a regular expression, the first of them.
        alphas: likewise.
        rslora: the product is scaled by ``alpha / sqrt(rank)``, not ``alpha / rank``.
        dora: modules have magnitudes.
        modules: ends of the adapted modules' names, or a regular expression of whole names.
        parameters: ends of names of adapted parameters.
        excluded: as `modules`, those that are not adapted after all.
        layers: numbers of the layers that are adapted, but for modules whose whole name is in `modules`; None for all.
        lists: regular expressions of the lists' names that `layers` counts in; none for any, the innermost.
        tied: an adapter of the embedding is the tied unembedding's, too.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    rslora: bool = False
    dora: bool = False
    modules: Sequence[str] | str = ()
    parameters: Sequence[str] = ()
    excluded: Sequence[str] | str = ()
    layers: Sequence[int] | None = None
    lists: Sequence[str] = ()
    tied: bool = False

    @classmethod
    def read(cls, folder: Path) -> "PeftConfig":
        """Read the file of a directory.

        Raises:
            ConfigError: it is malformed, or has a field that is not honoured, which is named.
            FileNotFoundError: it does not exist.
        """
        if not (folder / CONFIG).exists():
            raise FileNotFoundError(f"{folder / CONFIG} does not exist; expected a directory of an adapter")
        values = read_config(folder / CONFIG)
        known: dict[str, Any] = {
            "rank": field(values, "r", int),
            "alpha": field(values, "lora_alpha", float),
            "ranks": _pattern(values, "rank_pattern", int),
            "alphas": _pattern(values, "alpha_pattern", float),
            "rslora": field(values, "use_rslora", bool, False),
            "dora": field(values, "use_dora", bool, False),
            "modules": _names(values, "target_modules"),
            "parameters": _names(values, "target_parameters"),
            "excluded": _names(values, "exclude_modules"),
            "layers": _layers(values),
            "lists": _lists(values),
            "tied": field(values, "ensure_weight_tying", bool, False),
        }
        _refuse(values)
        return cls(**known)

    def scale(self, name: str, rank: int) -> float:
        """Return the factor of the product of a module or parameter.

        Raises:
            ConfigError: its tensors have another rank than the file says.
        """
        expected = self.ranks.get(_match(self.ranks, name), self.rank)
        if rank != expected:
            raise ConfigError(f"{name}: its tensors have rank {rank}, {CONFIG} says {expected}")
        alpha = self.alphas.get(_match(self.alphas, name), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @property
    def all_linear(self) -> bool:
        """Whether all linear modules are adapted but the one that unembeds."""
        return self.modules == "all-linear"

    def adapts(self, module: str) -> bool:
        """Tell whether a module is one of those that are adapted."""
        if named(self.excluded, module) or not (self.all_linear or named(self.modules, module)):
            return False
        whole = isinstance(self.modules, str) or module in self.modules
        return whole or self.layers is None or self._layer(module) in self.layers

    def adapts_parameter(self, name: str) -> bool:
        """Tell whether a parameter is one of those that are adapted, which neither layers nor exclusions matter to."""
        return named(self.parameters, name)

    def _layer(self, module: str) -> int | None:
        """Return the number of the layer that a module is of."""
        found = (re.match(rf".*\.{name}\.(?P<number>\d+)\.", module) for name in self.lists or (r"[^.]*",))
        return next((int(match["number"]) for match in found if match), None)

    def write(self, *, base: str | None, task: str | None, swapped: bool) -> str:
        """Return the text of the file.

        Args:
            base: name or path of the base model.
            task: its task, in their words.
            swapped: the linear layers hold their weights ``[inputs, outputs]``.
        """
        alphas = {name: _number(alpha) for name, alpha in self.alphas.items()}
        values = {
            **FIXED,
            **{"base_model_name_or_path": base, "task_type": task, "inference_mode": True, "lora_dropout": 0.0},
            **{"r": self.rank, "lora_alpha": _number(self.alpha), "rank_pattern": self.ranks, "alpha_pattern": alphas},
            **{"use_rslora": self.rslora, "use_dora": self.dora, "fan_in_fan_out": swapped},
            **{"target_modules": list(self.modules), "target_parameters": list(self.parameters) or None},
            **{"modules_to_save": None, "init_lora_weights": True},
        }
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _number(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _refuse(values: Mapping[str, Any]) -> None:
    for name, value in FIXED.items():
        if values.get(name, value) != value:
            raise ConfigError(f"{name}={values[name]!r}; expected {value!r}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(ALTERED):
        raise ConfigError(
            f"init_lora_weights={start!r} alters the base weights; expected an adapter of the original ones (save it "
            "with path_initial_model_for_weight_conversion)"
        )
    honoured = {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules"),
        *("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    }
    for name, value in values.items():
        if name not in honoured | FIXED.keys() | IGNORED and value not in (None, False, [], {}, ""):
            raise ConfigError(f"{name}={value!r}; expected none, since it is not supported")


def _pattern(values: Mapping[str, Any], name: str, kind: type) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"{name}={found!r}; expected an object of numbers")
    for pattern in found:
        _compiled(name, pattern)
    return {pattern: field(found, pattern, kind) for pattern in found}


def _names(values: Mapping[str, Any], name: str) -> Sequence[str] | str:
    found = values.get(name) or ()
    if isinstance(found, str) and name != "target_parameters":
        _compiled(name, found)
        return found
    if not isinstance(found, list | tuple) or any(not isinstance(part, str) for part in found):
        raise ConfigError(f"{name}={found!r}; expected a list of names")
    return tuple(found)


def _compiled(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name}: {pattern!r} is no regular expression: {error}") from error


def _layers(values: Mapping[str, Any]) -> Sequence[int] | None:
    found = values.get("layers_to_transform")
    found = [found] if isinstance(found, int) else found
    if found is not None and (not isinstance(found, list) or any(not isinstance(i, int) for i in found)):
        raise ConfigError(f"layers_to_transform={found!r}; expected numbers of layers")
    return found or None


def _lists(values: Mapping[str, Any]) -> Sequence[str]:
    found = _names(values, "layers_pattern")
    patterns = (found,) if isinstance(found, str) else found
    for pattern in patterns:
        _compiled("layers_pattern", pattern)
    return patterns


def _match(patterns: Mapping[str, Any], name: str) -> str:
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), "")


def named(names: Sequence[str] | str, module: str) -> bool:
    """Tell whether a name ends with one of others, or matches a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
