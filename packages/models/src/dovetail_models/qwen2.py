"""The Qwen2 and Qwen2.5 family: a Llama with biases of queries, keys and values (Yang et al., arXiv:2407.10671)."""

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

__all__ = ["FAMILY", "Qwen2", "Qwen2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config(LayerWindowsConfig):
    """Sizes and options of a Qwen2; see `LayerWindowsConfig` for the others."""


class Qwen2(Decoder):
    """A Qwen2; see `Decoder`."""

    config: Qwen2Config

    @staticmethod
    def block(config: Qwen2Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = config.attention(bias=True, window=config.window_of(index), **weights)
        mlp = GatedMLP(config.features, config.hidden, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: Qwen2Config) -> WeightMap:
    return WeightMap(decoder_rules(config))


FAMILY = Family(
    Qwen2,
    ConfigMap(
        "Qwen2ForCausalLM",
        "qwen2",
        Qwen2Config,
        options={
            "num_key_value_heads": ("kv_heads", int, 32),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 32768),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
        others=(qwen_windows,),
    ),
    _weight_map,
)
