"""Layers one after the other: each with a program of its own, or a cycle of them as a loop over stacked parameters.

In a `Stack` a run of layers repeats a cycle, such as one layer, or one with a window and one without. The parameters of
the layers with the same place in the cycle are stacked, ``[repeats, ...]`` with the logical axis ``layers``, and the
cycle is compiled once, whatever the depth of the model. Layers before and after that do not fit stand alone.
"""

import functools
import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dovetail_kernels import DenseMixer
from dovetail_models.remat import Remat
from dovetail_protocols import Auxiliary, add_auxiliary
from dovetail_weights import StackedMap, WeightMap

__all__ = ["Cycle", "Stack", "find_cycle", "layer_map", "run_layers", "single_addresses"]

PLACE = re.compile(r"(?P<list>(?:.+/)?layers)/(?P<part>before|cycle|after)/(?P<index>[0-9]+)/(?P<rest>.+)")


class Cycle(NamedTuple):
    """Layers ``first`` to ``first + period * repeats - 1`` repeat each other with this period."""

    first: int
    period: int
    repeats: int


def find_cycle(kinds: Sequence[Hashable]) -> Cycle:
    """Return the cycle that leaves the fewest layers to compile, the earliest and shortest of those.

    Raises:
        ValueError: nothing repeats.

    >>> find_cycle("dwfwfwf")
    Cycle(first=1, period=2, repeats=3)
    """
    best = Cycle(0, len(kinds), 1)
    for first in range(len(kinds)):
        for period in range(1, (len(kinds) - first) // 2 + 1):
            same = 0
            while first + period + same < len(kinds) and kinds[first + same] == kinds[first + period + same]:
                same += 1
            found = Cycle(first, period, 1 + same // period)
            if found.period * (found.repeats - 1) > best.period * (best.repeats - 1):
                best = found
    if best.repeats == 1:
        raise ValueError(
            f"none of {len(kinds)} layers is followed by one of its kind; expected some that repeat, or scan=False, "
            "which is unstacked(model) before a surgery"
        )
    return best


class Stack(nnx.Module):
    """See the head of this module.

    Args:
        layers: modules that are called as `dovetail_models.decoder.Block` is.

    Raises:
        ValueError: nothing repeats.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        first, period, repeats = find_cycle([_kind(layer) for layer in layers])
        end = first + period * repeats
        self.before, self.after = nnx.List(layers[:first]), nnx.List(layers[end:])
        self.cycle = nnx.List([_stacked(layers[first + place : end : period]) for place in range(period)])
        self.repeats = repeats

    def __len__(self) -> int:
        """Return how many layers there are."""
        return len(self.before) + len(self.cycle) * self.repeats + len(self.after)

    def __iter__(self) -> Iterator[Any]:
        """Yield each layer in order, those that repeat without values."""
        yield from self.before
        yield from [_one(layer) for layer in self.cycle] * self.repeats
        yield from self.after

    @property
    def programs(self) -> list[Any]:
        """The layers that are compiled; parameters of those that repeat are stacked."""
        return [*self.before, *self.cycle, *self.after]

    def unstacked(self) -> list[Any]:
        """Return every layer with parameters of its own."""
        parts = [nnx.split(layer) for layer in self.cycle]
        middle = [
            nnx.merge(definition, jax.tree.map(lambda x, i=i: x[i], self.each(state)))
            for i in range(self.repeats)
            for definition, state in parts
        ]
        return [*self.before, *middle, *self.after]

    def each(self, state: Any) -> Any:
        """Give arrays that all layers share, such as scales of quantized weights, a copy for each of them."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.repeats, *x.shape[1:])), state)


def _kind(layer: Any) -> Hashable:
    """Return what layers must share to be stacked: everything but the values of their parameters."""
    definition, state = nnx.split(layer)
    leaves, structure = jax.tree.flatten(state)
    return definition, structure, tuple((x.shape, x.dtype) for x in leaves)


def _one(layer: Any) -> Any:
    """Return a layer with the shapes of one out of a stack."""
    definition, state = nnx.split(layer)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
    return nnx.merge(definition, shapes)


def _stacked(layers: Sequence[Any]) -> Any:
    """Return one layer with the parameters of all; those of the others are let go one after the other."""
    definition, state = nnx.split(layers[0])
    flat = [dict(nnx.to_flat_state(nnx.split(layer)[1])) for layer in layers]
    stacked = {}
    for path, variable in nnx.to_flat_state(state):
        value = jax.tree.map(lambda *x: jnp.stack(x), *(parts.pop(path).get_value() for parts in flat))
        metadata = variable.get_metadata()
        stacked[path] = type(variable)(value, **{**metadata, "axes": ("layers", *metadata["axes"])})
    return nnx.merge(definition, nnx.from_flat_state(stacked.items()))


class _Run(NamedTuple):
    """What is the same for all layers."""

    tables: Any
    mixer: Any
    remat: Remat | None

    def layer(self, index: Any, layer: Any, x: jax.Array, *, loop: bool = False) -> tuple[jax.Array, Auxiliary]:
        """Run one layer, of which the backward pass keeps what `remat` says."""
        if self.remat is None:
            return layer(index, x, self.tables, self.mixer)[:2]
        definition, state = nnx.split(layer)

        def call(state: Any, x: jax.Array) -> tuple[jax.Array, Auxiliary]:
            x = checkpoint_name(x, "residual")
            return nnx.merge(definition, state)(index, x, self.tables, self.mixer)[:2]

        return jax.checkpoint(call, policy=self.remat.policy(), prevent_cse=not loop)(state, x)

    def layers(
        self, first: Any, layers: Sequence[Any], x: jax.Array, *, loop: bool = False
    ) -> tuple[jax.Array, Auxiliary]:
        """Run one layer after the other; `first` is the index of the first one."""
        total: Auxiliary = {}
        for place, layer in enumerate(layers):
            x, aux = self.layer(first + place, layer, x, loop=loop)
            total = add_auxiliary(total, aux)
        return x, total

    def stack(self, stack: Stack, x: jax.Array) -> tuple[jax.Array, Auxiliary]:
        """Run the cycle as a loop, between the layers that stand alone."""
        definitions, states = zip(*(nnx.split(layer) for layer in stack.cycle), strict=True)

        def body(x: jax.Array, each: Any) -> tuple[jax.Array, Auxiliary]:
            index, states = each
            layers = [nnx.merge(*parts) for parts in zip(definitions, states, strict=True)]
            return self.layers(index, layers, x, loop=True)

        x, total = self.layers(0, stack.before, x)
        first, period = len(stack.before), len(stack.cycle)
        indices = first + period * jnp.arange(stack.repeats, dtype=jnp.int32)
        one = indices[0], tuple(nnx.split(_one(layer))[1] for layer in stack.cycle)
        x = x.astype(jax.eval_shape(body, x, one)[0].dtype)  # a family may keep its residual stream in another one
        x, each = jax.lax.scan(body, x, (indices, stack.each(states)))
        total = add_auxiliary(total, jax.tree.map(functools.partial(jnp.sum, axis=0), each))
        x, aux = self.layers(first + period * stack.repeats, stack.after, x)
        return x, add_auxiliary(total, aux)


def run_layers(
    layers: Any, x: jax.Array, tables: Any, mixer: Any, remat: Remat | None
) -> tuple[jax.Array, Auxiliary, Any]:
    """Return the residual stream ``[tokens, features]`` after all layers, their auxiliary values, and the mixer.

    A mixer whose calls depend on the layer, as those with caches do, is given one layer after the other, also of a
    `Stack`; it computes no gradients, and `remat` does not matter to it.

    Args:
        layers: a list, or a `Stack`.
        x: the residual stream before them.
        tables: of the rotary embeddings.
        mixer: see `dovetail_protocols.Mixer`.
        remat: what the backward pass keeps; None for everything.

    Raises:
        ValueError: a dense mixer has earlier choices of another number of layers.
    """
    chosen = mixer.choices if isinstance(mixer, DenseMixer) else None
    if chosen is not None and len(chosen) != len(layers):
        raise ValueError(f"choices of {len(chosen)} layers; the model has {len(layers)}, those without experts too")
    if not getattr(mixer, "per_layer", True):
        run = _Run(tables, mixer, remat)
        x, total = run.stack(layers, x) if isinstance(layers, Stack) else run.layers(0, layers, x)
        return x, total, mixer
    total: Auxiliary = {}
    for i, layer in enumerate(layers.unstacked() if isinstance(layers, Stack) else layers):
        x, aux, mixer = layer(i, x, tables, mixer)
        total = add_auxiliary(total, aux)
    return x, total, mixer


def layer_map(table: WeightMap, stacks: Mapping[str, int]) -> WeightMap:
    """Return a map for ``layers/{i}/...`` that knows the parameters of a `Stack`, too.

    Args:
        table: of the layers one by one.
        stacks: addresses of lists of layers, such as ``layers``, that may be a `Stack`, and how many each has.
    """
    return StackedMap(table.rules, functools.partial(_singles, stacks))


def single_addresses(model: nnx.Module, addresses: Collection[str]) -> dict[str, list[str]]:
    """Return the addresses of layers one by one that each address of a model's parameters stands for."""
    stacks = {"/".join(map(str, path)): len(node) for path, node in nnx.iter_graph(model) if isinstance(node, Stack)}
    return _singles(stacks, addresses)


def _singles(stacks: Mapping[str, int], addresses: Collection[str]) -> dict[str, list[str]]:
    """Return the addresses of the layers one by one that each address stands for."""
    stands: dict[str, list[str]] = {address: [address] for address in addresses}
    places = [match for match in map(PLACE.fullmatch, addresses) if match]
    for layers, count in stacks.items():
        stands |= _of_stack(count, [match for match in places if match["list"] == layers])
    return stands


def _of_stack(layers: int, places: Collection[re.Match[str]]) -> dict[str, list[str]]:
    before, period, after = (
        len({match["index"] for match in places if match["part"] == part}) for part in ("before", "cycle", "after")
    )
    every = {
        "before": lambda i: range(i, i + 1),
        "cycle": lambda i: range(before + i, layers - after, period),
        "after": lambda i: range(layers - after + i, layers - after + i + 1),
    }
    return {m[0]: [f"{m['list']}/{i}/{m['rest']}" for i in every[m["part"]](int(m["index"]))] for m in places}
