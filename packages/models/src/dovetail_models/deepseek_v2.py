"""The DeepSeek-V2 family: latent attention and experts, of which some are shared (arXiv:2405.04434)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_kernels import ExpertGroups
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.latent import OPTIONS, LatentConfig, latent_block, latent_fields, latent_rules
from dovetail_models.router import Selection
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "DeepseekV2", "DeepseekV2Config"]

GREEDY, GROUPED = "greedy", "group_limited_greedy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV2Config(LatentConfig):
    """Sizes and options of a DeepseekV2; see `LatentConfig` for the others. Weights of experts do not sum to 1.

    Attributes:
        mlp_bias: biases in dense MLPs, the shared one included.
    """

    mlp_bias: bool = False

    @property
    def select(self) -> Selection:
        """See `LatentConfig.select`."""
        count, kept = self.expert_groups, self.kept_groups
        groups = None if count is None or kept is None else ExpertGroups(count, kept, best=1)
        return dataclasses.replace(super().select, renormalize=False, groups=groups)


class DeepseekV2(Decoder):
    """A DeepSeek-V2; see `Decoder`."""

    config: DeepseekV2Config

    @staticmethod
    def block(config: DeepseekV2Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        return latent_block(config, index, mlp_bias=config.mlp_bias, **weights)


def _weight_map(config: DeepseekV2Config) -> WeightMap:
    return WeightMap(latent_rules(config))


def _read(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    method = field(values, "topk_method", str, GREEDY)
    if method not in (GREEDY, GROUPED):
        raise ConfigError(f"topk_method={method!r}; expected {GREEDY!r} or {GROUPED!r}")
    found: dict[str, Any] = {"top_k": field(values, "num_experts_per_tok", int)}
    if method == GROUPED:
        found |= {"expert_groups": field(values, "n_group", int), "kept_groups": field(values, "topk_group", int)}
    return found


def _write(config: DeepseekV2Config) -> Mapping[str, Any]:
    return {
        "num_experts_per_tok": config.top_k,
        "topk_method": GREEDY if config.expert_groups is None else GROUPED,
        "n_group": config.expert_groups,
        "topk_group": config.kept_groups,
    }


FAMILY = Family(
    DeepseekV2,
    ConfigMap(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        DeepseekV2Config,
        options={
            **OPTIONS,
            "max_position_embeddings": ("max_position", int, 2048),
            "moe_intermediate_size": ("expert_hidden", int, 1407),
            "n_routed_experts": ("experts", int, 64),
            "n_shared_experts": ("shared_experts", int, 2),
            "routed_scaling_factor": ("routed_scale", float, 1.0),
            "first_k_dense_replace": ("first_dense", int, 0),
            "mlp_bias": ("mlp_bias", bool, False),
        },
        divides=True,
        fixed={"hidden_act": "silu", "attention_dropout": 0.0, "norm_topk_prob": False},
        refused={"pretraining_tp": 1, "moe_layer_freq": 1, "scoring_func": "softmax", "seq_aux": True},
        ignored=("head_dim", "qk_head_dim", "ep_size", "auto_map"),
        others=(latent_fields, Fields(("num_experts_per_tok", "topk_method", "n_group", "topk_group"), _read, _write)),
    ),
    _weight_map,
)
