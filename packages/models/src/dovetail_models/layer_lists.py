"""The layers that a model has, what configures them, what makes their kind, and names of their parameters' axes."""

import dataclasses
import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flax import nnx

from dovetail_models.lazy_model import LazyModel
from dovetail_models.state import split
from dovetail_protocols import paths

__all__ = [
    "Axes",
    "LayerList",
    "checked_indices",
    "checked_shapes",
    "facts",
    "layer_list",
    "parameter_axes",
    "with_part",
]

ADDRESS = re.compile(r"((?:.+/)?layers)/[0-9]+/.+")


class LayerList(NamedTuple):
    """Layers of a model.

    Attributes:
        address: of the list, such as ``layers`` or ``text/layers``.
        part: names of attributes that lead from the model's configuration to that of the layers; mostly none.
        config: of the layers.
        layers: without values.
        ahead: layers of heads that look further ahead (see `AheadDecoder`), by their addresses.
    """

    address: str
    part: tuple[str, ...]
    config: Any
    layers: Sequence[Any]
    ahead: Mapping[str, Any]

    @property
    def addressed(self) -> dict[str, Any]:
        """All layers by their addresses, those of heads that look further ahead last."""
        return {f"{self.address}/{i}": layer for i, layer in enumerate(self.layers)} | dict(self.ahead)


def layer_list(model: LazyModel, at: str | None = None) -> LayerList:
    """Return the layers at an address; None for the only ones that the model has.

    Raises:
        ValueError: there are no layers at that address, or none is given and the model has several lists of them.
    """
    found = list(dict.fromkeys(match[1] for address in model.tensors if (match := ADDRESS.fullmatch(address))))
    if at is None and len(found) != 1:
        raise ValueError(f"the model has layers at {found}; pass at= one of them")
    address = found[0] if at is None else at
    if address not in found:
        raise ValueError(f"at={at!r}; the model has layers at {found}")
    module, config, part = model.module(), model.config, ()
    *owners, _ = address.split("/")
    owner = functools.reduce(getattr, owners, module)
    for name in owners:
        if dataclasses.is_dataclass(getattr(config, name, None)):
            config, part = getattr(config, name), (*part, name)
    heads = getattr(owner, "ahead", ())
    ahead = {"/".join((*owners, "ahead", str(i), "block")): head.block for i, head in enumerate(heads)}
    return LayerList(address, part, config, list(owner.layers), ahead)


def with_part(config: Any, part: Sequence[str], changes: Mapping[str, Any]) -> Any:
    """Return a configuration in which fields of a part of it are other ones; see `LayerList`.

    Raises:
        ValueError: the configuration refuses them.
    """
    if not part:
        return dataclasses.replace(config, **changes)
    return dataclasses.replace(config, **{part[0]: with_part(getattr(config, part[0]), part[1:], changes)})


def facts(layer: Any, within: str = "") -> dict[str, Any]:
    """Return all that makes the kind of a layer: shapes of its parameters, and every setting, by name.

    >>> from dovetail_models import RMSNorm
    >>> facts(RMSNorm(4, eps=0.1))["eps"]
    0.1
    """
    found: dict[str, Any] = {f"{within}type": type(layer).__name__}
    for name, value in vars(layer).items():
        if isinstance(value, nnx.Module):
            found |= facts(value, f"{within}{name}/")
        elif isinstance(value, nnx.Variable):
            found[f"{within}{name}"] = value.get_value().shape
        elif not name.startswith("_pytree"):
            found[f"{within}{name}"] = value
    return found


class Axes(NamedTuple):
    """Logical names of a parameter's axes, and how many of them products sum over; see `dovetail_models.layers`."""

    names: tuple[str | None, ...]
    inputs: int


def parameter_axes(model: LazyModel) -> dict[str, Axes]:
    """Return the axes of every parameter by address."""
    found: dict[str, Axes] = {}
    for path, variable in nnx.to_flat_state(nnx.split(model.module())[1]):
        metadata = variable.get_metadata()
        found["/".join(map(str, path))] = Axes(metadata["axes"], metadata.get("inputs", 0))
    return found


def checked_shapes(made: LazyModel) -> LazyModel:
    """Return a model.

    Raises:
        ValueError: parameters have other shapes than its configuration says, since it has no word for the change.
    """
    needed = {a: x.shape for a, x in paths.flatten(split(made.module())[1]).items()}
    given = {address: tensor.shape for address, tensor in made.tensors.items()}
    differ = [
        f"{a}: {given.get(a)}, expected {needed.get(a)}" for a in {**needed, **given} if given.get(a) != needed.get(a)
    ]
    if differ:
        raise ValueError(
            f"{type(made.config).__name__} cannot describe a model whose parameters have these shapes: "
            f"{'; '.join(differ[:3])}{' and more' if differ[3:] else ''}"
        )
    return made


def checked_indices(what: str, indices: Sequence[int], count: int) -> list[int]:
    """Return indices.

    Raises:
        TypeError: one is no integer.
        ValueError: there are none, or one is outside of ``range(count)``.
    """
    chosen = [operator.index(index) for index in indices]
    wrong = [index for index in chosen if not 0 <= index < count]
    if wrong or not chosen:
        raise ValueError(f"{what}: {chosen or 'none'}; expected at least one, each from 0 to {count - 1}")
    return chosen
