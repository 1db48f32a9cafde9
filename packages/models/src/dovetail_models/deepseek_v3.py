"""The DeepSeek-V3 family: a V2 with sigmoid routing, a correction of it, and heads that look further ahead.

DeepSeek-V3 is arXiv:2412.19437; its checkpoints and those of R1 must be stored in bfloat16 first.
"""

import dataclasses
from typing import Any

from dovetail_models.ahead import REPEATED, AheadConfig, AheadDecoder, held_heads, with_heads
from dovetail_models.decoder import Block
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.latent import OPTIONS, LatentConfig, latent_block, latent_fields, latent_rules
from dovetail_models.shared_experts import CorrectedConfig
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "DeepseekV3", "DeepseekV3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(LatentConfig, CorrectedConfig, AheadConfig):
    """Sizes and options of a DeepseekV3; see `LatentConfig`, `CorrectedConfig` and `AheadConfig` for the others.

    Attributes:
        interleaved: neighbouring features are rotated, otherwise those of the two halves.
    """

    expert_groups: int | None = 8
    kept_groups: int | None = 4
    routed_scale: float = 2.5
    interleaved: bool = True


class DeepseekV3(AheadDecoder):
    """A DeepSeek-V3; see `AheadDecoder`."""

    config: DeepseekV3Config

    @staticmethod
    def block(config: DeepseekV3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        return latent_block(config, index, interleaved=config.interleaved, **weights)


def _weight_map(config: DeepseekV3Config) -> WeightMap:
    return WeightMap(with_heads(config, latent_rules(config)))


FAMILY = Family(
    DeepseekV3,
    ConfigMap(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        DeepseekV3Config,
        options={
            **OPTIONS,
            "max_position_embeddings": ("max_position", int, 4096),
            "moe_intermediate_size": ("expert_hidden", int, 2048),
            "n_routed_experts": ("experts", int, 256),
            "n_shared_experts": ("shared_experts", int, 1),
            "num_experts_per_tok": ("top_k", int, 8),
            "routed_scaling_factor": ("routed_scale", float, 2.5),
            "first_k_dense_replace": ("first_dense", int, 3),
            "n_group": ("expert_groups", int, 8),
            "topk_group": ("kept_groups", int, 4),
            "norm_topk_prob": ("renormalize", bool, True),
            "rope_interleave": ("interleaved", bool, True),
            "num_nextn_predict_layers": ("ahead", int, 1),
        },
        aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={
            **{"pretraining_tp": 1, "moe_layer_freq": 1, "seq_aux": True},
            **{"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        },
        ignored=("head_dim", "qk_head_dim", "ep_size", "auto_map"),
        others=(latent_fields,),
    ),
    _weight_map,
    ignored=REPEATED,
    held=held_heads,
)
