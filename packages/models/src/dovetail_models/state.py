"""A module as a static definition and a nested dict of arrays, the form that jitted steps take."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from dovetail_protocols import LowRankArray, QuantizedArray
from dovetail_runtime import Rules, shardings

M = TypeVar("M", bound=nnx.Module)

__all__ = [
    "abstract",
    "check_no_adapters",
    "init",
    "logical_axes",
    "merge",
    "nested",
    "placements",
    "replaced",
    "split",
    "variables",
]


def split(module: nnx.Module) -> tuple[Any, dict[Any, Any]]:
    """Return ``(definition, parameters)``: a hashable static part and a nested dict of arrays.

    Addresses of the parameters (``layers/0/attention/query``) follow the attribute names; list entries are integers.
    """
    definition, state = nnx.split(module)
    return definition, nnx.to_pure_dict(state)


def merge(definition: Any, parameters: Any) -> Any:
    """Return the module of a definition with the given parameters (a leaf may be a QuantizedArray or LowRankArray)."""
    return nnx.merge(definition, parameters)


def variables(module: nnx.Module) -> dict[str, Any]:
    """Return the parameters with their metadata by address; a quantized or adapted one is one of them."""
    return {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.split(module)[1])}


def replaced(module: M, values: Mapping[str, Any]) -> M:
    """Return the module with other values of the parameters at the given addresses."""
    definition, state = nnx.split(module)
    flat = {path: values.get("/".join(map(str, path)), x.get_value()) for path, x in nnx.to_flat_state(state)}
    return nnx.merge(definition, nnx.to_pure_dict(nnx.from_flat_state(flat)))


def check_no_adapters(module: nnx.Module) -> None:
    """Check that no parameter has an adapter.

    Raises:
        ValueError: one has.
    """
    for address, variable in variables(module).items():
        if isinstance(variable.get_value(), LowRankArray):
            raise ValueError(
                f"{type(module).__name__} has adapted parameters ({address}); expected merge_lora(model), or "
                "remove_lora(model) and save_lora(model, ...)"
            )


def nested(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """Return a tree like that of `split` of its leaves by address; numbers become integers."""
    tree: dict[Any, Any] = {}
    for address, leaf in flat.items():
        *outer, last = [int(part) if part.isdigit() else part for part in address.split("/")]
        functools.reduce(lambda node, part: node.setdefault(part, {}), outer, tree)[last] = leaf
    return tree


def abstract(build: Callable[[], nnx.Module]) -> tuple[Any, dict[Any, Any]]:
    """Return ``split(build())`` with ``jax.ShapeDtypeStruct`` leaves; nothing is computed or allocated."""
    return split(nnx.eval_shape(build))


def logical_axes(module: nnx.Module) -> dict[Any, Any]:
    """Return the logical axis names of every parameter: the tree of `split` with tuples of names as leaves.

    The parts of a quantized parameter have its names where they have its lengths, those of an adapted one the names of
    their axes; the rank has none.
    """
    _, state = nnx.split(module)
    return nnx.to_pure_dict(jax.tree.map(_names, state, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _names(variable: Any) -> Any:
    return variable.replace(_of_parts(variable.get_value(), tuple(variable.get_metadata()["axes"])))


def _of_parts(value: Any, names: tuple[str | None, ...]) -> Any:
    if isinstance(value, QuantizedArray):
        long = lambda x: tuple(name if n == m else None for name, n, m in zip(names, x.shape, value.shape, strict=True))  # noqa: E731
        return jax.tree.map(long, value)
    if not isinstance(value, LowRankArray):
        return names
    leading, end = value.leading, value.leading + value.inputs
    into, out = names[:end], names[end:]
    parts: Any = LowRankArray  # whose parts are names here
    return parts(
        base=_of_parts(value.base, names),
        a=(*into, None),
        b=(*names[:leading], None, *out),
        magnitude=None if value.magnitude is None else (*names[:leading], *out),
        scale=value.scale,
    )


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
