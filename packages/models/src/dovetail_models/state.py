"""A module as a static definition and a nested dict of arrays, the form that jitted steps take."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from dovetail_runtime import Rules, shardings

M = TypeVar("M", bound=nnx.Module)

__all__ = ["abstract", "init", "logical_axes", "merge", "placements", "split"]


def split(module: nnx.Module) -> tuple[Any, dict[Any, Any]]:
    """Return ``(definition, parameters)``: a hashable static part and a nested dict of arrays.

    Addresses of the parameters (``layers/0/attention/query``) follow the attribute names; list entries are integers.
    """
    definition, state = nnx.split(module)
    return definition, nnx.to_pure_dict(state)


def merge(definition: Any, parameters: Any) -> Any:
    """Return the module of a definition with the given parameters (a leaf may be a QuantizedArray)."""
    return nnx.merge(definition, parameters)


def abstract(build: Callable[[], nnx.Module]) -> tuple[Any, dict[Any, Any]]:
    """Return ``split(build())`` with ``jax.ShapeDtypeStruct`` leaves; nothing is computed or allocated."""
    return split(nnx.eval_shape(build))


def logical_axes(module: nnx.Module) -> dict[Any, Any]:
    """Return the logical axis names of every parameter: the tree of `split` with tuples of names as leaves."""
    _, state = nnx.split(module)
    return nnx.to_pure_dict(jax.tree.map(_names, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _names(variable: Any) -> Any:
    return variable.replace(tuple(variable.get_metadata()["axes"]))


def placements(module: nnx.Module, mesh: Mesh, rules: Rules) -> dict[Any, Any]:
    """Return the sharding of every parameter: the tree of `split` with `NamedSharding` leaves.

    Args:
        module: a module, abstract (``nnx.eval_shape(build)``) or not.
        mesh: from `dovetail_runtime.mesh`.
        rules: their weight rules apply to the names of `logical_axes`.

    Raises:
        dovetail_runtime.ShardingError: the rules do not fit the names.
    """
    return shardings(split(module)[1], logical_axes(module), rules, mesh)


def init(build: Callable[[], M], mesh: Mesh, rules: Rules) -> M:
    """Return ``build()`` with every parameter made where it belongs; no device ever holds a whole model.

    The values are those of ``build()`` on every mesh, up to the rounding of the last bit. For errors see `placements`.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> from dovetail_runtime import FSDP, mesh
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2)
    >>> model = init(lambda: Llama(config, rngs=nnx.Rngs(0)), mesh(fsdp=8), FSDP)
    >>> model.head.get_value().addressable_shards[0].data.shape
    (1, 16)
    """
    module = nnx.eval_shape(build)
    definition, _ = split(module)
    make = jax.jit(lambda: split(build())[1], out_shardings=placements(module, mesh, rules))
    return merge(definition, make())
