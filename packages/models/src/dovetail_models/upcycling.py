"""Upcycling: a dense model becomes a mixture of experts that begins as copies of its MLPs (arXiv:2212.05055).

Fine-grained experts are slices of an MLP (arXiv:2410.07524). Those of one copy have the same weights in the router, so
that a token that chooses a copy chooses all of its slices ("virtual groups" there); the last product is multiplied with
their number, since the weights of a token's experts sum to 1. The model then computes what the dense one does.
"""

import dataclasses
import functools
import operator
from collections.abc import Collection
from typing import Any

import numpy as np

from dovetail_models.family import Family, architecture_family
from dovetail_models.lazy_model import LazyModel, surgery
from dovetail_models.lazy_parts import computing_dtype, generator
from dovetail_models.sparse_family import sparse_family
from dovetail_weights import Lazy

__all__ = ["upcycle"]

NATIVE = {
    "LlamaForCausalLM": "MixtralForCausalLM",
    "MistralForCausalLM": "MixtralForCausalLM",
    "Qwen3ForCausalLM": "Qwen3MoeForCausalLM",
}
"""What transformers has with experts, of a dense architecture."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the experts of a layer are made: expert ``e`` is slice ``e % slices`` of copy ``e // slices``."""

    experts: int
    slices: int
    noise: float
    seed: int

    def tensor(self, address: str, source: Lazy) -> Lazy:
        """Return the experts' tensor for an MLP's."""
        name = address.rpartition("/")[2]
        axis = None if name == "down_bias" else 0 if name == "down" else -1
        shape = list(source.shape)
        if axis is not None:
            shape[axis] //= self.slices
        factor = np.float32(self.slices if name == "down" else 1)
        spread = functools.cache(
            lambda: self.noise * float(np.sqrt(np.mean(np.square(source.read(), dtype=np.float32))))
        )

        def one(expert: int, index: Any) -> Any:
            inside = list(index)
            if axis is not None:
                first = expert % self.slices * shape[axis]
                inside[axis] = slice(index[axis].start + first, index[axis].stop + first)
            value = source.read(tuple(inside)).astype(computing_dtype(source), copy=False)
            if self.noise and not name.endswith("_bias"):
                rng = generator(self.seed, f"{address}[{expert}]")
                value = value + spread() * rng.standard_normal(shape, np.float32)[index]
            return value * factor if factor != 1 else value

        def read(index: Any) -> Any:
            chosen, *inside = index
            out = np.empty([part.stop - part.start for part in index], source.dtype)
            for place, expert in enumerate(range(chosen.start, chosen.stop)):
                out[place] = one(expert, tuple(inside))
            return out

        return Lazy((self.experts, *shape), source.dtype, read)

    def router(self, address: str, features: int, std: float, dtype: Any) -> Lazy:
        """Return the router's weight, ``[features, experts]``."""

        def read(index: Any) -> Any:
            weight = std * generator(self.seed, address).standard_normal(
                (features, self.experts // self.slices), np.float32
            )
            return np.repeat(weight, self.slices, axis=1)[index].astype(dtype)

        return Lazy((features, self.experts), np.dtype(dtype), read)


@surgery
def upcycle(
    model: LazyModel,
    *,
    experts: int,
    top_k: int,
    granularity: int = 1,
    layers: Collection[int] | None = None,
    noise: float = 0.0,
    seed: int = 0,
    native: bool = True,
) -> LazyModel:
    """Make experts of the MLPs of a dense decoder: copies, or copies cut into slices.

    Without noise the logits stay what they are, up to rounding, where `granularity` divides `top_k`: a token's experts
    are whole copies then. Otherwise, and with noise, they differ.

    Args:
        model: a model, a directory, or a `LazyModel`, of a family of decoders with MLPs.
        experts: how many a layer has.
        top_k: how many a token chooses.
        granularity: slices of a copy; divides `experts` and the width of the MLPs.
        layers: which get experts; None for all.
        noise: standard deviation of what is added to the experts' weights, relative to their root mean square.
        seed: of the noise and of the routers.
        native: become a family that transformers knows where there is one: Mixtral of a Llama or Mistral, Qwen3-MoE of
            a Qwen3. Else, and of other families, one whose directories only this package reads.

    Returns:
        What was given: a model, or a `LazyModel` of a directory.

    Raises:
        TypeError: `experts`, `top_k` or `granularity` is no integer.
        ValueError: numbers that do not fit, or a family whose layers have no dense MLPs.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2)
    >>> sparse = upcycle(Llama(config, rngs=nnx.Rngs(0)), experts=8, top_k=2, granularity=2)
    >>> type(sparse).__name__, sparse.layers[0].mlp.experts.up.shape
    ('Mixtral', (8, 8, 8))
    """
    experts, top_k, granularity = (operator.index(number) for number in (experts, top_k, granularity))
    chosen = _checked(model, experts, top_k, granularity, layers)
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise}; expected a number of at least 0")
    hidden = _hidden(model, granularity, chosen)
    family, config = _target(model, native, chosen, {"experts": experts, "top_k": top_k, "hidden": hidden})
    plan = _Plan(experts, granularity, noise, seed)
    tensors = dict[str, Lazy]()
    for address, tensor in model.tensors.items():
        layer, name = _part(address)
        if layer not in chosen:
            tensors[address] = tensor
            continue
        tensors[f"layers/{layer}/mlp/experts/{name}"] = plan.tensor(address, tensor)
        router = f"layers/{layer}/mlp/router/weight"
        tensors[router] = plan.router(router, model.config.features, model.config.init_std, model.dtype)
    return dataclasses.replace(model, family=family, config=config, tensors=tensors)


def _part(address: str) -> tuple[int, str]:
    """Return the layer and the name of an MLP's parameter; -1 for another one."""
    parts = address.split("/")
    is_mlp = len(parts) == 4 and parts[0] == "layers" and parts[2] == "mlp"
    return (int(parts[1]), parts[3]) if is_mlp else (-1, "")


def _checked(
    model: LazyModel, experts: int, top_k: int, granularity: int, layers: Collection[int] | None
) -> frozenset[int]:
    if experts < 1 or granularity < 1 or experts % granularity:
        raise ValueError(
            f"experts={experts}, granularity={granularity}; expected a multiple of it, and both at least 1"
        )
    if not 0 < top_k <= experts:
        raise ValueError(f"top_k={top_k}; expected between 1 and the {experts} experts")
    every = range(model.config.layers)
    chosen = frozenset(every if layers is None else layers)
    if not chosen or not chosen <= set(every):
        raise ValueError(f"layers={sorted(chosen)}; expected some of the {len(every)} layers, from 0")
    return chosen


def _hidden(model: LazyModel, granularity: int, layers: frozenset[int]) -> int:
    """Return the width of each expert."""
    sizes = dict[int, int]()
    for address, tensor in model.tensors.items():
        layer, name = _part(address)
        if layer in layers and name == "up":
            sizes[layer] = tensor.shape[-1]
    architecture = model.family.config_map.architecture
    if lost := sorted(layers - set(sizes)):
        raise ValueError(f"layers {lost} of {architecture} have no dense MLP; expected layers that have")
    if wrong := {f"layers/{layer}/mlp": size for layer, size in sizes.items() if size % granularity}:
        raise ValueError(f"granularity={granularity} does not divide the width of {wrong}; choose a divisor")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"MLPs have the widths {sorted(set(sizes.values()))}; name layers= of one width")
    return next(iter(sizes.values())) // granularity


def _target(model: LazyModel, native: bool, layers: frozenset[int], sizes: dict[str, int]) -> tuple[Family, Any]:
    """Return the family with experts, and the configuration."""
    config, architecture = model.config, model.family.config_map.architecture
    dense = tuple(sorted(set(range(config.layers)) - layers))
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if native and architecture in NATIVE and not _differs(config, architecture, dense):
        family = architecture_family(NATIVE[architecture])
        known = {field.name for field in dataclasses.fields(family.config_map.config)}  # pyright: ignore
        sizes = dict(sizes)
        if "expert_hidden" in known:
            given |= {"expert_hidden": sizes.pop("hidden"), "dense_layers": dense, "renormalize": True}
        return family, family.config_map.config(**{k: v for k, v in given.items() if k in known} | sizes)
    family = sparse_family(architecture)
    hidden = sizes.pop("hidden")
    return family, family.config_map.config(**given, **sizes, expert_hidden=hidden, dense_layers=dense)


def _differs(config: Any, architecture: str, dense: tuple[int, ...]) -> bool:
    """Tell whether transformers' family with experts lacks what a dense model has."""
    if architecture == "LlamaForCausalLM":
        return config.attention_bias or config.mlp_bias or bool(dense)
    if architecture == "MistralForCausalLM":
        return bool(dense)
    return config.windows is not None
