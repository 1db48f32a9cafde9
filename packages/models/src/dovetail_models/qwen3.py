"""The Qwen3 family, dense: a Llama that normalises each query and key head (Yang et al., arXiv:2505.09388)."""

import dataclasses
from typing import Any

from dovetail_models.config_parts import LayerWindowsConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.hf_windows import qwen_windows
from dovetail_models.layers import GatedMLP
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Qwen3", "Qwen3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3Config(LayerWindowsConfig):
    """Sizes and options of a Qwen3; see `LayerWindowsConfig` for the others.

    Attributes:
        attention_bias: biases in the attention's projections.
    """

    attention_bias: bool = False


class Qwen3(Decoder):
    """A Qwen3; see `Decoder`."""

    config: Qwen3Config

    @staticmethod
    def block(config: Qwen3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = config.attention(
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            norm="head",
            window=config.window_of(index),
            **weights,
        )
        mlp = GatedMLP(config.features, config.hidden, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: Qwen3Config) -> WeightMap:
    return WeightMap(decoder_rules(config))


FAMILY = Family(
    Qwen3,
    ConfigMap(
        "Qwen3ForCausalLM",
        "qwen3",
        Qwen3Config,
        options={
            "num_key_value_heads": ("kv_heads", int, 32),
            "head_dim": ("head_dim", int, 128),
            "max_position_embeddings": ("max_position", int, 32768),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "attention_bias": ("attention_bias", bool, False),
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
        others=(qwen_windows,),
    ),
    _weight_map,
)
