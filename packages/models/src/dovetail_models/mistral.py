"""The Mistral family: a Llama whose tokens may see a window only (Jiang et al., arXiv:2310.06825)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_models.config_parts import WindowConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import field
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.layers import GatedMLP
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Mistral", "MistralConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MistralConfig(WindowConfig):
    """Sizes and options of a Mistral; see `WindowConfig` for the others."""


class Mistral(Decoder):
    """A Mistral; see `Decoder`."""

    config: MistralConfig

    @staticmethod
    def block(config: MistralConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        del index
        attention = config.attention(window=config.window, **weights)
        mlp = GatedMLP(config.features, config.hidden, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: MistralConfig) -> WeightMap:
    return WeightMap(decoder_rules(config))


def _read_window(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    given = {"sliding_window": 4096} | dict(values)  # null is another value than none
    return {"window": field(given, "sliding_window", int, None)}


def _write_window(config: MistralConfig) -> Mapping[str, Any]:
    return {"sliding_window": config.window}


FAMILY = Family(
    Mistral,
    ConfigMap(
        "MistralForCausalLM",
        "mistral",
        MistralConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, 8),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 131072),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
        others=(Fields(("sliding_window",), _read_window, _write_window),),
    ),
    _weight_map,
)
