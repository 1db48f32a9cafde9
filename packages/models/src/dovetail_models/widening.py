"""Wider models that compute what they did: every feature, hidden feature or head is there several times over."""

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from dovetail_models.decoder import Decoder, StackConfig
from dovetail_models.layer_lists import Axes, checked_shapes, parameter_axes
from dovetail_models.lazy_model import LazyModel, surgery
from dovetail_models.lazy_parts import Array, calculated, taken, uniform
from dovetail_weights import Lazy

__all__ = ["widen"]

GROWING = {
    "embed": ("features",),
    "mlp": ("hidden", "expert_hidden", "shared_hidden"),
    "heads": ("heads", "key_heads", "value_heads"),
    "kv_heads": ("kv_heads",),
}
"""Logical axes, and the fields that say how long they are."""


class _Noise(NamedTuple):
    """By which share the weights of copies differ: cosines of angles that divide the circle, which sum to 0."""

    size: float
    seed: int

    def of(self, address: str, shape: tuple[int, ...], axis: int, count: int, index: Any) -> Array:
        """Return the part at an index for a tensor that has `count` copies along an axis."""
        single = shape[axis] // count
        places = np.arange(index[axis].start, index[axis].stop)
        every = (*index[:axis], slice(0, single), *index[axis + 1 :])
        phases = uniform(self.seed, address, (*shape[:axis], single, *shape[axis + 1 :]), every)
        turns = (places // single / count).reshape(-1, *(1,) * (len(shape) - axis - 1))
        return self.size * np.cos(2 * np.pi * (np.take(phases, places % single, axis) + turns))


@surgery
def widen(
    model: LazyModel, *, features: int = 1, hidden: int = 1, heads: int = 1, noise: float = 0.0, seed: int = 0
) -> LazyModel:
    """Return a wider decoder with the same logits: HyperCloning (Samragh et al., arXiv:2409.12903).

    What grows is there several times over, one copy after the other, and a product over it is divided by their number.
    Heads keep their size. A tied unembedding sums over all copies, so the last norm is divided instead.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        features: factor of the residual stream's width.
        hidden: factor of the width of MLPs and experts.
        heads: factor of the heads, those of keys and values alike.
        noise: copies get weights that differ by up to this share, so that training tells them apart; the differences
            cancel in every sum over copies. Below 1; 0 leaves copies alike, which then stay so without dropout.
        seed: of the differences.

    Raises:
        TypeError: it is no decoder, or a factor no integer.
        ValueError: a factor is below 1, `noise` out of range, or the family cannot grow so: `Gpt2` must grow features
            and heads alike, since one follows from the other; a `Mamba2` its features alone; heads that look further
            ahead join two streams, and must go first.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2)
    >>> wide = widen(Llama(config, rngs=nnx.Rngs(0)), features=2, hidden=3)
    >>> wide.layers[0].mlp.up.get_value().shape
    (16, 48)
    """
    features, hidden, heads = (operator.index(factor) for factor in (features, hidden, heads))
    growth = {"embed": features, "mlp": hidden, "heads": heads, "kv_heads": heads}
    if min(growth.values()) < 1 or not 0 <= noise < 1:
        raise ValueError(
            f"features={features}, hidden={hidden}, heads={heads}, noise={noise}; expected factors of at least 1, "
            "and noise from 0 to below 1"
        )
    named = parameter_axes(model)
    _check(model, growth, {name for axes in named.values() for name in axes.names})
    config = dataclasses.replace(model.config, **_grown(model.config, growth))
    tensors = dict[str, Lazy]()
    for address, tensor in model.tensors.items():
        made = _copied(tensor, named[address], growth)
        count = math.prod(growth.get(name or "", 1) for name in _inputs(named[address]))
        tensors[address] = made if count == 1 else _divided(address, made, named[address], growth, _Noise(noise, seed))
    embedding = model.config.embedding_scale / config.embedding_scale
    tensors["embedding"] = _times(tensors["embedding"], embedding)
    if config.tied:
        offset = config.norm_offset
        tensors["norm/weight"] = _times(tensors["norm/weight"], 1 / (features * embedding), offset)
        if "norm/bias" in tensors:
            tensors["norm/bias"] = _times(tensors["norm/bias"], 1 / (features * embedding))
    return checked_shapes(dataclasses.replace(model, config=config, tensors=tensors))


def _check(model: LazyModel, growth: Mapping[str, int], there: Collection[str | None]) -> None:
    kind = type(model.config).__name__
    if not isinstance(model.module(), Decoder) or not isinstance(model.config, StackConfig):
        raise TypeError(f"{kind}: not the configuration of a decoder, and only these grow with the same logits")
    if ahead := getattr(model.config, "ahead", 0):
        raise ValueError(f"ahead={ahead}; heads that look further ahead cannot grow, expected ahead=0")
    absent = {GROWING[axis][0]: n for axis, n in growth.items() if n > 1 and axis not in there and axis != "kv_heads"}
    if absent:
        raise ValueError(f"{absent}: a {kind} has nothing of that kind that could grow; expected 1")
    if hasattr(model.config, "state_size") and growth["heads"] != 1:
        raise ValueError(f"heads={growth['heads']}: the groups of {kind} would have others; expected heads=1")


def _grown(config: Any, growth: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of the configuration that change."""
    fields = {field.name for field in dataclasses.fields(config)}
    changes = {"head_dim": config.dim} if "head_dim" in fields and getattr(config, "divided", False) else {}
    if hasattr(config, "inner"):  # a Gpt2Config
        changes["hidden"] = config.inner * growth["mlp"]
    for axis, names in GROWING.items():
        given = {name: getattr(config, name) for name in names if name in fields}
        changes |= {name: n * growth[axis] for name, n in given.items() if n is not None and name not in changes}
    return changes


def _inputs(axes: Axes) -> tuple[str | None, ...]:
    """Return the names of the axes that products sum over."""
    first = int(bool(axes.inputs) and axes.names[0] == "experts")
    return axes.names[first : first + axes.inputs]


def _copied(tensor: Lazy, axes: Axes, growth: Mapping[str, int]) -> Lazy:
    for axis, name in enumerate(axes.names):
        if (count := growth.get(name or "", 1)) > 1:
            tensor = taken(tensor, axis, list(range(tensor.shape[axis])) * count)
    return tensor


def _divided(address: str, tensor: Lazy, axes: Axes, growth: Mapping[str, int], noise: _Noise) -> Lazy:
    """Return a weight by the number of copies that it sums over, whose shares differ by noise."""
    inputs = _inputs(axes)
    axis = next(axes.names.index(name) for name in inputs if growth.get(name or "", 1) > 1)
    count, total = growth[axes.names[axis] or ""], math.prod(growth.get(name or "", 1) for name in inputs)

    def divide(part: Array, index: Any) -> Array:
        part = part / total
        return part * (1 + noise.of(address, tensor.shape, axis, count, index)) if noise.size else part

    return calculated(tensor, divide)


def _times(tensor: Lazy, factor: float, offset: float = 0.0) -> Lazy:
    """Return a tensor that is stored less an offset, times a factor."""
    if factor == 1:
        return tensor
    return calculated(tensor, lambda part, _: (part + offset) * factor - offset)
