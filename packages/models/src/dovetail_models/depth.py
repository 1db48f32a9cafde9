"""Depth: layers in another order, more than once, or not at all."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from dovetail_models.encoder import EncoderBlock
from dovetail_models.layer_lists import LayerList, checked_indices, facts, layer_list, with_part
from dovetail_models.lazy_model import LazyModel, surgery
from dovetail_models.lazy_parts import constant
from dovetail_protocols import paths
from dovetail_weights import Lazy

__all__ = ["prune_layers", "repeat_layers"]

OUTPUTS = ("{attention,mlp}/**/{out,down}", "{attention,mlp}/**/{out,down}_bias")
"""The last products of attention and MLP (of all experts), within a layer."""


@surgery
def repeat_layers(model: LazyModel, order: Sequence[int], *, zero: bool = False, at: str | None = None) -> LazyModel:
    """Return a model whose layers are those of another one, in any order and any number of times.

    Depth up-scaling of SOLAR (Kim et al., arXiv:2312.15166) puts all but the last eight layers before all but the
    first eight: ``[*range(0, 24), *range(8, 32)]``. Each layer keeps its kind (its window, its experts, whether it
    knows positions), and heads that look further ahead stay as they are.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        order: for each layer of the result, which layer of the model it is.
        zero: the copies of a layer, which is its first occurrence, add nothing at the beginning: their last products
            are zero, or the norms behind these where there are some. So the model computes what it did.
        at: address of the layers, where the model has several lists of them: ``text/layers``.

    Raises:
        ValueError: an index is out of range; the configuration cannot say that a layer is of its source's kind; or
            `zero` with a layer that is missing or comes too early, or with layers that end in a norm of the sum.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=3, heads=2)
    >>> repeat_layers(Llama(config, rngs=nnx.Rngs(0)), [0, 1, 1, 2], zero=True).config.layers
    4
    """
    layers = layer_list(model, at)
    chosen = checked_indices("order", order, len(layers.layers))
    config = with_part(model.config, layers.part, layers.config.rearranged(chosen))
    others = {a: tensor for a, tensor in model.tensors.items() if not a.startswith(f"{layers.address}/")}
    copies = _copies(chosen, len(layers.layers)) if zero else set[int]()
    tensors = dict(others)
    for place, index in enumerate(chosen):
        parts = _within(model, f"{layers.address}/{index}/")
        parts = parts | _zero(layers.layers[index], parts) if place in copies else parts
        tensors |= {f"{layers.address}/{place}/{rest}": tensor for rest, tensor in parts.items()}
    made = dataclasses.replace(model, config=config, tensors=tensors)
    _check_kinds(layers, chosen, layer_list(made, layers.address))
    return made


@surgery
def prune_layers(model: LazyModel, layers: Sequence[int], *, at: str | None = None) -> LazyModel:
    """Return a model without some of its layers, such as those that change the residual stream least.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        layers: indices of those that go.
        at: see `repeat_layers`.

    Raises:
        ValueError: an index is out of range or comes twice, none is left, or see `repeat_layers`.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=3, heads=2)
    >>> prune_layers(Llama(config, rngs=nnx.Rngs(0)), [1]).config.layers
    2
    """
    count = len(layer_list(model, at).layers)
    gone = checked_indices("layers", layers, count)
    if len(set(gone)) != len(gone) or len(gone) == count:
        raise ValueError(f"layers: {gone}; expected each at most once, and not all {count}")
    return repeat_layers(model, [index for index in range(count) if index not in gone], at=at)


def _within(model: LazyModel, prefix: str) -> dict[str, Lazy]:
    return {a.removeprefix(prefix): tensor for a, tensor in model.tensors.items() if a.startswith(prefix)}


def _copies(order: Sequence[int], count: int) -> set[int]:
    """Return the places of layers that came before."""
    first = {index: place for place, index in reversed(list(enumerate(order)))}
    if sorted(first) != list(range(count)) or sorted(first, key=first.__getitem__) != list(range(count)):
        raise ValueError(
            f"order: {list(order)} with zero=True; expected every layer from 0 to {count - 1} for the first time in "
            "that order, or the model does not begin as it was"
        )
    return set(range(len(order))) - set(first.values())


def _zero(layer: Any, parts: dict[str, Lazy]) -> dict[str, Lazy]:
    """Return the parameters that must be zero for a layer to add nothing."""
    if isinstance(layer, EncoderBlock) and not layer.before:
        raise ValueError(
            "zero=True, but these layers end in a norm of the sum, which changes even what nothing is added to; "
            "expected zero=False"
        )
    if not getattr(layer, "after", False):
        zeros = {name: constant(tensor, 0.0) for name, tensor in parts.items() if paths.matches(name, OUTPUTS)}
        if not zeros:
            raise ValueError(f"zero=True, but {type(layer).__name__} has no parameters like {OUTPUTS}; expected some")
        return zeros
    norms = {name: getattr(layer, name) for name in ("attention_out_norm", "mlp_out_norm")}
    weights = {f"{name}/weight": -getattr(norm, "offset", 0.0) for name, norm in norms.items()}
    return {
        name: constant(tensor, weights.get(name, 0.0)) for name, tensor in parts.items() if name.split("/")[0] in norms
    }


def _check_kinds(layers: LayerList, order: Sequence[int], made: LayerList) -> None:
    """See that every layer is of its source's kind."""
    kinds = [facts(layer) for layer in layers.layers]
    for place, (index, layer) in enumerate(zip(order, made.layers, strict=True)):
        found = facts(layer)
        if found == kinds[index]:
            continue
        fit = [i for i, kind in enumerate(kinds) if kind == found]
        differ = [f"{name}={value!r}" for name, value in found.items() if kinds[index].get(name) != value]
        raise ValueError(
            f"order: layer {place} cannot be of the kind of layer {index}: {type(made.config).__name__} would give it "
            f"{', '.join(differ[:3])}; layers that fit there: {fit or 'none'}"
        )
