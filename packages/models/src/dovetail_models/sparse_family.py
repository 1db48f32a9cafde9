"""Families whose layers have experts in place of the MLPs of another family.

Their configurations and models derive from those of the other one, so that all else is as there. transformers does not
know them: their directories name the architecture ``Sparse...`` and hold the experts of a layer in one tensor.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import SPARSE, Family, architecture_family
from dovetail_models.hf_config import Fields
from dovetail_models.hf_fields import ConfigError
from dovetail_models.hf_rules import OURS, THEIRS
from dovetail_models.layers import MLP, GatedMLP
from dovetail_models.moe import BALANCE, Experts, PlainExperts, SparseMLP, Sparsity
from dovetail_models.qwen3_moe import read_dense_layers
from dovetail_models.router import Router
from dovetail_weights import Rule, WeightMap

__all__ = ["sparse_family"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Fields(Sparsity):
    """What configurations of these families have besides.

    Attributes:
        expert_hidden: width of each expert.
        dense_layers: layers that keep their MLP.
    """

    expert_hidden: int
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert_hidden < 1:
            raise ValueError(f"expert_hidden={self.expert_hidden}; expected at least 1")
        if min(self.dense_layers, default=0) < 0:
            raise ValueError(f"dense_layers={self.dense_layers}; expected indices from 0")

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """See `StackConfig.rearranged`."""
        dense = tuple(place for place, i in enumerate(order) if i in self.dense_layers)
        changes: dict[str, Any] = super().rearranged(order)  # pyright: ignore[reportAttributeAccessIssue] - of the stack
        return {**changes, "dense_layers": dense}


@functools.cache
def sparse_family(architecture: str) -> Family:
    """Return the family with experts of one of the `FAMILIES` of decoders with MLPs.

    Raises:
        ConfigError: there is no such architecture.
        ValueError: its layers have experts already, or it is no decoder.
    """
    family = architecture_family(architecture)
    base, known = family.model, family.config_map
    kind = known.config
    if not (isinstance(base, type) and issubclass(base, Decoder) and isinstance(kind, type)):
        raise ValueError(f"{architecture} is no family of decoders; expected one whose layers have MLPs")
    if issubclass(kind, Sparsity):
        raise ValueError(f"{architecture} has experts already; expected a family whose layers have MLPs")

    def block(config: Any, index: int, **weights: Any) -> Block:
        made = base.block(config, index, **weights)
        if index not in config.dense_layers:
            made.mlp = _sparse(config, made, **weights)
        return made

    known_as = {"sparse_of": architecture}
    config = dataclasses.make_dataclass(f"Sparse{kind.__name__}", [], bases=(_Fields, kind), frozen=True, kw_only=True)
    model = type(f"Sparse{base.__name__}", (base,), {"block": staticmethod(block), **known_as})
    config_map = dataclasses.replace(
        known,
        architecture=f"{SPARSE}{known.architecture}",
        model_type=f"sparse_{known.model_type}",
        config=config,
        options={
            **known.options,
            "num_experts": ("experts", int, 8),
            "num_experts_per_tok": ("top_k", int, 2),
            "moe_intermediate_size": ("expert_hidden", int, 0),
            **BALANCE,
        },
        others=(*known.others, Fields(("mlp_only_layers",), _read, _write)),
    )
    return dataclasses.replace(family, model=model, config_map=config_map, weight_map=_with_experts(family))


def _sparse(config: Any, block: Any, **weights: Any) -> SparseMLP:
    """Return experts of the kind of a layer's MLP."""
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, GatedMLP | MLP):
        raise ValueError(
            f"a layer of {type(config).__name__} has {type(mlp).__name__} for an MLP; expected a dense one"
        )
    kind = Experts if isinstance(mlp, GatedMLP) else PlainExperts
    options: dict[str, Any] = {"activation": mlp.activation, "bias": mlp.bias, **weights}
    given: dict[str, Any] = {name: weights[name] for name in ("init", "dtype", "rngs")}
    router = Router(config.features, config.select, **given)
    return SparseMLP(router, kind(config.features, config.expert_hidden, config.experts, **options))


def _with_experts(family: Family) -> Any:
    def weight_map(config: Any) -> WeightMap:
        parts = ("experts/{part}", "router/{part}")
        ours = [Rule(f"{OURS}/mlp/{p}", f"{THEIRS}.mlp.{p.replace('/', '.')}") for p in parts]
        return WeightMap([*ours, *family.weight_map(config).rules])

    return weight_map


def _read(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    if not values.get("moe_intermediate_size"):
        raise ConfigError("missing field moe_intermediate_size; it has no default")
    return {"dense_layers": read_dense_layers(values)}


def _write(config: Any) -> Mapping[str, Any]:
    return {"mlp_only_layers": list(config.dense_layers)}
