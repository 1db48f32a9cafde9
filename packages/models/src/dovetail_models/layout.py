"""Between layers one by one and layers that are stacked for a loop; see `dovetail_models.stack`."""

import functools
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_models.decoder import Decoder
from dovetail_models.stack import Stack

__all__ = ["stacked", "unstacked"]

M = TypeVar("M", bound=nnx.Module)


def stacked(model: M) -> M:
    """Return a model whose layers that repeat each other are a `Stack`, as one that was built with ``scan=True``.

    Values, options and devices stay; the given model stays as it is. A directory knows no layout: there it is
    ``from_pretrained(path, scan=True)``.

    Args:
        model: a decoder, or one with a decoder inside; stacked or not.

    Raises:
        TypeError: it has no decoder.
        ValueError: none of the layers is followed by one of its kind.

    >>> from dovetail_models import Llama, LlamaConfig, split
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=3, heads=2)
    >>> split(stacked(Llama(config, rngs=nnx.Rngs(0))))[1]["layers"]["cycle"][0]["mlp"]["up"].shape
    (3, 8, 16)
    """
    copy, decoder = _copied(model)
    if not isinstance(decoder.layers, Stack):
        singles = list(decoder.layers)
        stack = Stack(singles)
        first = len(stack.before)
        stack.cycle = nnx.List([_like(layer, singles[first + i]) for i, layer in enumerate(stack.cycle)])
        decoder.layers = stack
    return copy


def unstacked(model: M) -> M:
    """Return a model whose layers have parameters of their own: the inverse of `stacked`, see there.

    Raises:
        TypeError: it has no decoder.
    """
    copy, decoder = _copied(model)
    if isinstance(stack := decoder.layers, Stack):
        layers, first, period = stack.unstacked(), len(stack.before), len(stack.cycle)
        for i in range(period * stack.repeats):
            layers[first + i] = _like(layers[first + i], stack.cycle[i % period])
        decoder.layers = nnx.List(layers)
    return copy


def _copied(model: M) -> tuple[M, Decoder]:
    """Return a model of its own with the same arrays, and the decoder in it."""
    copy = nnx.merge(*nnx.split(model)) if isinstance(model, nnx.Module) else model
    decoder = copy if isinstance(copy, Decoder) else getattr(copy, "text", None)
    if not isinstance(decoder, Decoder):
        raise TypeError(f"{type(model).__name__} has no decoder, and only decoders run stacked layers")
    return copy, decoder


def _like(layer: Any, source: Any) -> Any:
    """Return a layer, one or a stack of them, whose parameters have the axes and the places of its counterpart's."""
    definition, state = nnx.split(layer)
    there = dict(nnx.to_flat_state(nnx.split(source)[1]))
    made = dict[Any, Any]()
    for path, variable in nnx.to_flat_state(state):
        metadata, axes = variable.get_metadata(), there[path].get_metadata()["axes"]
        stacks = axes[:1] != ("layers",)
        place = functools.partial(_placed, stacks=stacks)
        value = jax.tree.map(place, variable.get_value(), there[path].get_value())
        axes = ("layers", *axes) if stacks else axes[1:]
        made[path] = type(variable)(value, **{**metadata, "axes": axes})
    return nnx.merge(definition, nnx.from_flat_state(made.items()))


def _placed(value: jax.Array, source: jax.Array, *, stacks: bool) -> jax.Array:
    place = source.sharding
    if not isinstance(place, NamedSharding):
        return value
    spec = PartitionSpec(None, *place.spec) if stacks else PartitionSpec(*place.spec[1:])
    return jax.device_put(value, NamedSharding(place.mesh, spec))
