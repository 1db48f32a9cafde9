"""Narrower models: without some heads, experts or hidden features, by their indices or by scores.

What stays computes what it did: the result is the model whose removed heads, experts or features give nothing. Every
layer keeps equally many, since a configuration has one number for all; which ones, may differ.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dovetail_models.decoder import DecoderConfig
from dovetail_models.latent import LatentConfig
from dovetail_models.layer_lists import LayerList, checked_shapes, layer_list, parameter_axes, with_part
from dovetail_models.lazy_model import LazyModel, surgery
from dovetail_models.lazy_parts import taken
from dovetail_models.prunable import Keep, Place, kept_by_layer, places_of

__all__ = ["prune_experts", "prune_heads", "prune_hidden"]


@surgery
def prune_heads(model: LazyModel, keep: Keep, *, at: str | None = None) -> LazyModel:
    """Return a model with fewer heads of attention; a key-value head goes with all of its query heads.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        keep: which key-value heads stay (with latent attention: which heads), equally many in every layer.
        at: see `repeat_layers`.

    Raises:
        ValueError: an index is out of range or comes twice, numbers differ between layers, a layer is missing, or the
            family cannot have fewer heads: they share the features (`Gpt2`, encoders), or a norm (`Olmo2`).

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=4, kv_heads=2)
    >>> prune_heads(Llama(config, rngs=nnx.Rngs(0)), [1]).config.heads
    2
    """
    layers = layer_list(model, at)
    places = places_of(layers, "heads")
    kept = kept_by_layer("key-value heads", keep, places)
    _check_norms(model, places)
    return _pruned(model, layers, places, kept, _fewer_heads(layers.config, len(next(iter(kept.values())))))


@surgery
def prune_experts(model: LazyModel, keep: Keep, *, at: str | None = None) -> LazyModel:
    """Return a model with fewer experts: tokens choose among those that stay.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        keep: which experts stay, equally many in every layer that has some, and where they are in groups, in every
            group; for those that are chosen most, see `strongest`.
        at: see `repeat_layers`.

    Raises:
        ValueError: an index is out of range or comes twice, numbers differ between layers or groups, a layer is
            missing, there are no experts, or fewer would stay than a token chooses.

    >>> from flax import nnx
    >>> from dovetail_models import Mixtral, MixtralConfig
    >>> config = MixtralConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2, experts=4, top_k=2)
    >>> prune_experts(Mixtral(config, rngs=nnx.Rngs(0)), [0, 2, 3]).config.experts
    3
    """
    layers = layer_list(model, at)
    places = places_of(layers, "experts")
    kept = kept_by_layer("experts", keep, places)
    groups = getattr(layers.config, "expert_groups", None) or 1
    for index, chosen in kept.items():
        counts = np.bincount([i * groups // places[index].units for i in chosen], minlength=groups)
        if counts.min() != counts.max():
            raise ValueError(
                f"keep: {counts.tolist()} experts of the {groups} groups of layer {index}; expected one number for all"
            )
    return _pruned(model, layers, places, kept, {"experts": len(next(iter(kept.values())))})


@surgery
def prune_hidden(model: LazyModel, keep: Keep, *, at: str | None = None) -> LazyModel:
    """Return a model with fewer hidden features in its dense MLPs.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        keep: which features stay, equally many in every layer that has a dense MLP.
        at: see `repeat_layers`.

    Raises:
        ValueError: an index is out of range or comes twice, numbers differ between layers, a layer is missing, or
            there is no dense MLP, or others than these have its width.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig, output_norms, strongest
    >>> model = Llama(LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2), rngs=nnx.Rngs(0))
    >>> prune_hidden(model, strongest(output_norms(model, "hidden"), 4)).config.hidden
    4
    """
    layers = layer_list(model, at)
    places = places_of(layers, "hidden")
    kept = kept_by_layer("hidden features", keep, places)
    return _pruned(model, layers, places, kept, {"hidden": len(next(iter(kept.values())))})


def _fewer_heads(config: Any, count: int) -> dict[str, Any]:
    if isinstance(config, LatentConfig):
        return {"heads": count, "kv_heads": None}
    if not isinstance(config, DecoderConfig):
        raise ValueError(f"{type(config).__name__}: its heads share the features, so that none can go")
    return {"heads": count * (config.heads // config.groups), "kv_heads": count, "head_dim": config.dim}


def _check_norms(model: LazyModel, places: Mapping[int, Place]) -> None:
    axes = parameter_axes(model)
    for place in places.values():
        if "heads" in axes.get(f"{place.address}query_norm/weight", ((), 0))[0]:
            raise ValueError(
                f"{place.address}query_norm: a norm over all heads together, which changes with those that go"
            )


def _pruned(
    model: LazyModel,
    layers: LayerList,
    places: Mapping[int, Place],
    kept: Mapping[int, Sequence[int]],
    changes: Mapping[str, Any],
) -> LazyModel:
    config = with_part(model.config, layers.part, changes)
    tensors, named = dict(model.tensors), parameter_axes(model)
    for index, place in places.items():
        for address in (a for a in model.tensors if a.startswith(place.address)):
            for axis, name in enumerate(named[address].names):
                if name is not None and name in place.axes:
                    share = place.axes[name]
                    indices = [i * share + j for i in kept[index] for j in range(share)]
                    tensors[address] = taken(tensors[address], axis, indices)
    return checked_shapes(dataclasses.replace(model, config=config, tensors=tensors))
