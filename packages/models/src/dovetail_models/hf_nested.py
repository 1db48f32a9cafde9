"""Objects inside ``config.json`` that describe models of their own."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError

__all__ = ["Part", "nested"]


class Part(NamedTuple):
    """One of the objects.

    Attributes:
        name: of the field that holds it.
        config_map: how it is read and written.
        absent: fields of it that may be left out though `config_map` has no default for them.
    """

    name: str
    config_map: ConfigMap
    absent: Mapping[str, Any]

    def read(self, values: Mapping[str, Any]) -> Any:
        """Return our configuration of the object; errors are those of `ConfigMap.read` and begin with its name."""
        given = values.get(self.name)
        if not isinstance(given, Mapping):
            raise ConfigError(f"{self.name}={given!r}; expected an object")
        try:
            return self.config_map.read({"model_type": self.config_map.model_type, **self.absent, **given})
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from error

    def write(self, config: Any) -> dict[str, Any]:
        """Return the object of a configuration, without the dtype, which the whole model has."""
        written = self.config_map.write(config, dtype="")
        return {name: value for name, value in written.items() if name != "torch_dtype"}


def nested(parts: Mapping[str, Part]) -> Fields:
    """Return the fields of configurations that hold others, by our names for them."""

    def read(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
        return {ours: part.read(values) for ours, part in parts.items()}

    def write(config: Any) -> Mapping[str, Any]:
        return {part.name: part.write(getattr(config, ours)) for ours, part in parts.items()}

    return Fields(tuple(part.name for part in parts.values()), read, write)
