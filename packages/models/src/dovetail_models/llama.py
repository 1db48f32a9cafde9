"""The Llama family: pre-norm blocks of grouped rotary attention and a gated MLP (Touvron et al., arXiv:2302.13971).

Covers Llama 2 and 3.x and every checkpoint of Hugging Face's ``LlamaForCausalLM``.
"""

import dataclasses
from typing import Any

from dovetail_models.decoder import Block, Decoder, DecoderConfig
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.layers import GatedMLP
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Llama", "LlamaConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """Sizes and options of a Llama; see `DecoderConfig` for the others.

    Attributes:
        attention_bias: biases in the attention's projections.
        mlp_bias: biases in the MLP.
    """

    attention_bias: bool = False
    mlp_bias: bool = False


class Llama(Decoder):
    """A Llama; see `Decoder`."""

    config: LlamaConfig

    @staticmethod
    def block(config: LlamaConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        del index
        attention = config.attention(bias=config.attention_bias, out_bias=config.attention_bias, **weights)
        mlp = GatedMLP(config.features, config.hidden, bias=config.mlp_bias, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: LlamaConfig) -> WeightMap:
    return WeightMap(decoder_rules(config))


FAMILY = Family(
    Llama,
    ConfigMap(
        "LlamaForCausalLM",
        "llama",
        LlamaConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, None),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 2048),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "attention_bias": ("attention_bias", bool, False),
            "mlp_bias": ("mlp_bias", bool, False),
        },
        divides=True,
        fixed={"hidden_act": "silu", "pretraining_tp": 1, "attention_dropout": 0.0},
        refused={"rope_interleaved": False, "partial_rotary_factor": 1.0, "add_cross_attention": False},
        ignored=("is_llama_config",),
    ),
    _weight_map,
)
