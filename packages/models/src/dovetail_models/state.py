"""A module as a static definition and a nested dict of arrays, the form that jitted steps take."""

from typing import Any

import jax
from flax import nnx

__all__ = ["abstract", "logical_axes", "merge", "split"]


def split(module: nnx.Module) -> tuple[Any, dict[Any, Any]]:
    """Return ``(definition, parameters)``: a hashable static part and a nested dict of arrays.

    Addresses of the parameters (``layers/0/attention/query``) follow the attribute names; list entries are integers.
    """
    definition, state = nnx.split(module)
    return definition, nnx.to_pure_dict(state)


def merge(definition: Any, parameters: Any) -> Any:
    """Return the module of a definition with the given parameters (a leaf may be a QuantizedArray)."""
    return nnx.merge(definition, parameters)


def abstract(build: Any) -> tuple[Any, dict[Any, Any]]:
    """Return ``split(build())`` with ``jax.ShapeDtypeStruct`` leaves; nothing is computed or allocated."""
    return split(nnx.eval_shape(build))


def logical_axes(module: nnx.Module) -> dict[Any, Any]:
    """Return the logical axis names of every parameter: the tree of `split` with tuples of names as leaves."""
    _, state = nnx.split(module)
    return nnx.to_pure_dict(jax.tree.map(_names, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _names(variable: Any) -> Any:
    return variable.replace(tuple(variable.get_metadata()["axes"]))
