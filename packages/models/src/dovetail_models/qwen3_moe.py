"""The Qwen3-MoE family: a Qwen3 whose MLPs are mixtures of experts, in all layers or in some (arXiv:2505.09388)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail_models.config_parts import WindowConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.hf_rules import decoder_rules, expert_rules
from dovetail_models.layers import GatedMLP
from dovetail_models.moe import BALANCE, SparseConfig, sparse_mlp
from dovetail_models.router import Selection
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Qwen3Moe", "Qwen3MoeConfig", "QwenSparseConfig", "read_dense_layers"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenSparseConfig(SparseConfig):
    """What Qwens with experts share; see `SparseConfig` for the others. `hidden` is the width of dense MLPs.

    Attributes:
        expert_hidden: width of each expert.
        renormalize: the weights of a token's experts sum to 1.
        sparse_step: only every so manieth layer has experts.
        dense_layers: layers without experts, besides.
        attention_bias: biases in the attention's projections.
    """

    expert_hidden: int
    renormalize: bool = False
    sparse_step: int = 1
    dense_layers: tuple[int, ...] = ()
    attention_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("expert_hidden", "sparse_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if min(self.dense_layers, default=0) < 0:
            raise ValueError(f"dense_layers={self.dense_layers}; expected indices from 0")

    @property
    def select(self) -> Selection:
        """See `SparseConfig.select`."""
        return dataclasses.replace(super().select, renormalize=self.renormalize)

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """See `StackConfig.rearranged`."""
        dense = tuple(place for place, i in enumerate(order) if not self.is_sparse(i))
        return {**super().rearranged(order), "sparse_step": 1, "dense_layers": dense}

    def is_sparse(self, index: int) -> bool:
        """Tell whether a layer has experts."""
        return index not in self.dense_layers and not (index + 1) % self.sparse_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(QwenSparseConfig, WindowConfig):
    """Sizes and options of a Qwen3Moe; see `QwenSparseConfig` and `WindowConfig` for the others."""


class Qwen3Moe(Decoder):
    """A Qwen3-MoE; see `Decoder`."""

    config: Qwen3MoeConfig

    @staticmethod
    def block(config: Qwen3MoeConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = config.attention(
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            norm="head",
            window=config.window,
            **weights,
        )
        if not config.is_sparse(index):
            mlp = GatedMLP(config.features, config.hidden, **weights)
            return Block(config, attention, mlp, dtype=weights["dtype"])
        mlp = sparse_mlp(config, config.expert_hidden, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: Qwen3MoeConfig) -> WeightMap:
    return WeightMap([*decoder_rules(config), *expert_rules(config.experts)])


def read_dense_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers that have no experts.

    Raises:
        ConfigError: it is no list of indices.
    """
    dense = values.get("mlp_only_layers")
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or any(type(index) is not int for index in dense):
        raise ConfigError(f"mlp_only_layers={dense!r}; expected a list of indices")
    return tuple(dense)


def _read(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    used = field(values, "use_sliding_window", bool, False)
    given = {"sliding_window": 4096} | dict(values)  # null is another value than none
    width = field(given, "sliding_window", int, None) if used else None
    return {"dense_layers": read_dense_layers(values), "window": width}


def _write(config: Qwen3MoeConfig) -> Mapping[str, Any]:
    return {
        "mlp_only_layers": list(config.dense_layers),
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
    }


FAMILY = Family(
    Qwen3Moe,
    ConfigMap(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        Qwen3MoeConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, 4),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 32768),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "attention_bias": ("attention_bias", bool, False),
            "moe_intermediate_size": ("expert_hidden", int, 768),
            "num_experts": ("experts", int, 128),
            "num_experts_per_tok": ("top_k", int, 8),
            "norm_topk_prob": ("renormalize", bool, False),
            "decoder_sparse_step": ("sparse_step", int, 1),
            **BALANCE,
        },
        aliases={"num_local_experts": "num_experts"},  # as transformers 4 and 5 write it
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
        ignored=("max_window_layers",),
        others=(Fields(("mlp_only_layers", "use_sliding_window", "sliding_window"), _read, _write),),
    ),
    _weight_map,
)
