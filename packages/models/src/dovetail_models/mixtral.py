"""The Mixtral family: a Mistral whose MLPs are mixtures of experts (Jiang et al., arXiv:2401.04088)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_models.config_parts import WindowConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import field
from dovetail_models.hf_rules import THEIRS, decoder_rules, expert_rules
from dovetail_models.moe import BALANCE, SparseConfig, sparse_mlp
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Mixtral", "MixtralConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtralConfig(SparseConfig, WindowConfig):
    """Sizes and options of a Mixtral; see `SparseConfig` and `WindowConfig` for the others.

    `hidden` is the width of each expert.
    """

    experts: int = 8
    top_k: int = 2
    rope_theta: float = 1000000.0


class Mixtral(Decoder):
    """A Mixtral; see `Decoder`."""

    config: MixtralConfig

    @staticmethod
    def block(config: MixtralConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        del index
        attention = config.attention(window=config.window, **weights)
        return Block(config, attention, sparse_mlp(config, config.hidden, **weights), dtype=weights["dtype"])


def _weight_map(config: MixtralConfig) -> WeightMap:
    names = {"gate": "w1", "up": "w3", "down": "w2"}
    experts = expert_rules(config.experts, theirs=f"{THEIRS}.block_sparse_moe", names=names)
    return WeightMap([*decoder_rules(config), *experts])


def _read_window(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"window": field(values, "sliding_window", int, None)}


def _write_window(config: MixtralConfig) -> Mapping[str, Any]:
    return {"sliding_window": config.window}


FAMILY = Family(
    Mixtral,
    ConfigMap(
        "MixtralForCausalLM",
        "mixtral",
        MixtralConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, 8),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 131072),
            "rms_norm_eps": ("norm_eps", float, 1e-5),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "num_local_experts": ("experts", int, 8),
            "num_experts_per_tok": ("top_k", int, 2),
            **BALANCE,
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0, "router_jitter_noise": 0.0},
        refused={"partial_rotary_factor": 1.0},
        others=(Fields(("sliding_window",), _read_window, _write_window),),
        rope_theta=1000000.0,
    ),
    _weight_map,
)
