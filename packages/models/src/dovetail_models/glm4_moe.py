"""The GLM-4 MoE family: attention on partly turned heads, experts and heads that look ahead as in DeepSeek-V3.

Covers GLM-4.5 and its like (arXiv:2508.06471).
"""

import dataclasses
from typing import Any

from dovetail_models.ahead import REPEATED, AheadConfig, AheadDecoder, held_heads, with_heads
from dovetail_models.config_parts import PartlyTurnedConfig
from dovetail_models.decoder import Block
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.shared_experts import CorrectedConfig, shared_block, shared_rules
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Glm4Moe", "Glm4MoeConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Glm4MoeConfig(CorrectedConfig, AheadConfig, PartlyTurnedConfig):
    """Sizes and options of a Glm4Moe; see `CorrectedConfig`, `AheadConfig` and `PartlyTurnedConfig` for the others.

    Attributes:
        attention_bias: biases of queries, keys and values.
        attention_norms: each query and key head is normalised.
    """

    expert_groups: int | None = 1
    kept_groups: int | None = 1
    rotary_fraction: float = 0.5
    attention_bias: bool = False
    attention_norms: bool = False


class Glm4Moe(AheadDecoder):
    """A GLM-4 MoE; see `AheadDecoder`."""

    config: Glm4MoeConfig

    @staticmethod
    def block(config: Glm4MoeConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        norm = "head" if config.attention_norms else None
        attention = config.attention(bias=config.attention_bias, norm=norm, **weights)
        return shared_block(config, index, attention, **weights)


def _weight_map(config: Glm4MoeConfig) -> WeightMap:
    return WeightMap(with_heads(config, [*decoder_rules(config), *shared_rules(config)]))


FAMILY = Family(
    Glm4Moe,
    ConfigMap(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        Glm4MoeConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, 8),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 131072),
            "rms_norm_eps": ("norm_eps", float, 1e-5),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "attention_bias": ("attention_bias", bool, False),
            "use_qk_norm": ("attention_norms", bool, False),
            "moe_intermediate_size": ("expert_hidden", int, 1408),
            "n_routed_experts": ("experts", int, 128),
            "n_shared_experts": ("shared_experts", int, 1),
            "num_experts_per_tok": ("top_k", int, 8),
            "routed_scaling_factor": ("routed_scale", float, 1.0),
            "first_k_dense_replace": ("first_dense", int, 1),
            "n_group": ("expert_groups", int, 1),
            "topk_group": ("kept_groups", int, 1),
            "norm_topk_prob": ("renormalize", bool, True),
            "num_nextn_predict_layers": ("ahead", int, 1),
            "output_router_logits": ("balanced", bool, False),
            "aux_loss_alpha": ("balance_coef", float, 0.001),
        },
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        rotary_fraction=0.5,
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
    ),
    _weight_map,
    ignored=REPEATED,
    held=held_heads,
)
