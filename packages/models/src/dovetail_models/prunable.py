"""Units that a layer can lose: heads, experts and hidden features; where they are, and which of them act most."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from dovetail_models.latent import LatentAttention
from dovetail_models.layer_lists import LayerList, checked_indices, layer_list
from dovetail_models.layers import MLP, GatedMLP, GroupedAttention
from dovetail_models.lazy_model import lazy
from dovetail_models.lazy_parts import Array, computing_dtype, finite
from dovetail_models.moe import SparseMLP
from dovetail_weights import Lazy

__all__ = ["Keep", "Place", "Units", "kept_by_layer", "output_norms", "places_of", "strongest"]

Keep: TypeAlias = Sequence[int] | Mapping[int, Sequence[int]]
"""Indices of what stays: the same in every layer, or by layer. Heads that look ahead follow the last layer."""

ELEMENTS = 1 << 22
"""How many numbers are read at a time, if a unit has no more."""

Units: TypeAlias = Literal["heads", "experts", "hidden"]


class Place(NamedTuple):
    """Where a layer has units of a kind.

    Attributes:
        address: of the module.
        axes: names of the axes along which its parameters hold them, and how many lie there for each.
        units: how many there are.
        out: address of the parameter whose first axis is summed over in the end.
    """

    address: str
    axes: Mapping[str, int]
    units: int
    out: str


def output_norms(model: Any, units: Units, *, at: str | None = None) -> dict[int, Array]:
    """Return by layer the norm of the weights that each head, expert or hidden feature acts through.

    Args:
        model: or a directory, or a `LazyModel`.
        units: "heads" (key-value heads, of which each goes with its query heads), "experts" or "hidden".
        at: see `repeat_layers`.

    Raises:
        ValueError: the model has none.
        dovetail_weights.WeightsError: weights are not finite.
    """
    given = lazy(model)
    found: dict[int, Array] = {}
    for index, place in places_of(layer_list(given, at), units).items():
        found[index] = _norms(place, given.tensors[place.out])
    return found


def _norms(place: Place, tensor: Lazy) -> Array:
    """Return the norm of each unit's rows, of which some are read at a time."""
    each = tensor.shape[0] // place.units
    step = max(1, ELEMENTS // (each * math.prod(tensor.shape[1:])))
    norms = np.empty(place.units, dtype := computing_dtype(tensor))
    for first in range(0, place.units, step):
        last = min(first + step, place.units)
        rows = (slice(first * each, last * each), *(slice(0, n) for n in tensor.shape[1:]))
        weights = finite(place.out, tensor.read(rows)).astype(dtype)
        norms[first:last] = np.linalg.norm(weights.reshape(last - first, -1), axis=1)
    return norms


def strongest(scores: Mapping[int, Any], count: int, *, groups: int = 1) -> dict[int, list[int]]:
    """Return for each layer the indices of its largest scores, in order; of equal ones the first.

    Args:
        scores: by layer, such as `output_norms`, or how many tokens chose each expert.
        count: how many.
        groups: in equal parts from so many groups of neighbours, see `prune_experts`.

    Raises:
        ValueError: there are fewer, scores are no numbers, or groups do not divide them.

    >>> strongest({0: [0.5, 2.0, 1.0, 0.1]}, 2)
    {0: [1, 2]}
    """
    return {
        index: _largest(f"scores of layer {index}", np.asarray(x, float), count, groups) for index, x in scores.items()
    }


def _largest(what: str, scores: Any, count: int, groups: int) -> list[int]:
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"{what}: {scores}; expected a finite number for each")
    if groups < 1 or scores.size % groups or count % groups or not 0 < count <= scores.size:
        raise ValueError(f"count={count}, groups={groups}; expected from 1 to {scores.size}, in equal groups")
    parts = np.argsort(-scores.reshape(groups, -1), axis=1, kind="stable")[:, : count // groups]
    return sorted(int(i) for i in (parts + np.arange(groups)[:, None] * (scores.size // groups)).reshape(-1))


def places_of(layers: LayerList, units: Units) -> dict[int, Place]:
    """Return where which layers have units of a kind.

    Raises:
        ValueError: nowhere.
    """
    kinds = {"heads": _heads, "experts": _experts, "hidden": _hidden}
    if units not in kinds:
        raise ValueError(f"units={units!r}; expected one of {list(kinds)}")
    found = {i: place for i, item in enumerate(layers.addressed.items()) for place in kinds[units](*item)}
    if not found:
        raise ValueError(f"{type(layers.config).__name__}: no layer has {units} that can be told apart")
    return found


def _heads(address: str, layer: Any) -> Iterator[Place]:
    if isinstance(attention := layer.attention, GroupedAttention | LatentAttention):
        heads = attention.out.get_value().shape[0]
        groups = attention.kv_heads if isinstance(attention, GroupedAttention) else heads
        yield Place(
            f"{address}/attention/", {"heads": heads // groups, "kv_heads": 1}, groups, f"{address}/attention/out"
        )


def _experts(address: str, layer: Any) -> Iterator[Place]:
    if isinstance(mlp := getattr(layer, "mlp", None), SparseMLP):
        count = mlp.router.select.experts
        yield Place(f"{address}/mlp/", {"experts": 1}, count, f"{address}/mlp/experts/down")


def _hidden(address: str, layer: Any) -> Iterator[Place]:
    if isinstance(mlp := getattr(layer, "mlp", None), MLP | GatedMLP):
        yield Place(f"{address}/mlp/", {"mlp": 1}, mlp.down.get_value().shape[0], f"{address}/mlp/down")


def kept_by_layer(what: str, keep: Keep, places: Mapping[int, Place]) -> dict[int, list[int]]:
    """Return the sorted indices of what stays, by layer."""
    given = keep if isinstance(keep, Mapping) else dict.fromkeys(places, keep)
    if set(given) != set(places):
        raise ValueError(f"keep: {what} of layers {sorted(given)}; expected layers {sorted(places)}")
    kept = {i: sorted(checked_indices(f"keep: {what} of layer {i}", given[i], places[i].units)) for i in places}
    double = [i for i, chosen in kept.items() if len(set(chosen)) != len(chosen)]
    if double:
        raise ValueError(f"keep: {what} of layer {double[0]}: {kept[double[0]]}; expected each at most once")
    counts = {i: len(chosen) for i, chosen in kept.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"keep: numbers of {what} by layer are {counts}; expected one number for all layers")
    return kept
