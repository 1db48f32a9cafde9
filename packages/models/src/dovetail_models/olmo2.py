"""The OLMo 2 family: what attention and MLP give is normalised, and all query and all key heads (arXiv:2501.00656)."""

import dataclasses
from typing import Any

from dovetail_models.decoder import Block, Decoder, DecoderConfig
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.layers import GatedMLP, Rotary
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "OPTIONS", "Olmo2", "Olmo2Config", "block_after", "weight_map"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo2Config(DecoderConfig):
    """Sizes and options of an Olmo2; see `DecoderConfig` for the others.

    Attributes:
        attention_bias: biases in the attention's projections.
    """

    attention_bias: bool = False


class Olmo2(Decoder):
    """An Olmo2; see `Decoder`."""

    config: Olmo2Config

    @staticmethod
    def block(config: Olmo2Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        del index
        return block_after(config, config.rotary(), **weights)


def block_after(config: Olmo2Config, rotary: Rotary, *, window: int | None = None, **weights: Any) -> Block:
    """Return a block whose norms stand after attention and MLP, and over all heads of queries and keys.

    Args:
        config: sizes and options.
        rotary: turns queries and keys.
        window: how many last tokens a token sees; None for all.
        weights: see `Decoder.block`.
    """
    attention = config.attention(
        rotary=rotary,
        bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm="all",
        window=window,
        **weights,
    )
    mlp = GatedMLP(config.features, config.hidden, **weights)
    return Block(config, attention, mlp, before=False, after=True, dtype=weights["dtype"])


def weight_map(config: Olmo2Config) -> WeightMap:
    """Return the names and layouts of the tensors."""
    norms = {"attention_out_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
    return WeightMap(decoder_rules(config, norm="all", norms=norms))


OPTIONS = {
    "num_key_value_heads": ("kv_heads", int, None),
    "head_dim": ("head_dim", int, None),
    "max_position_embeddings": ("max_position", int, 2048),
    "rms_norm_eps": ("norm_eps", float, 1e-5),
    "tie_word_embeddings": ("tied", bool, False),
    "attention_bias": ("attention_bias", bool, False),
    "initializer_range": ("init_std", float, 0.02),
}
"""See `ConfigMap`."""

FAMILY = Family(
    Olmo2,
    ConfigMap(
        "Olmo2ForCausalLM",
        "olmo2",
        Olmo2Config,
        options=OPTIONS,
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
    ),
    weight_map,
)
