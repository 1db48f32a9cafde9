"""The Gemma 3 family, text alone: five layers of six see a window and have their own rotary base (arXiv:2503.19786).

Queries and keys are normalised, each head by itself, in place of Gemma 2's soft cap of attention.
"""

import dataclasses
from typing import Any

from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.gemma2 import GemmaConfig, weight_map
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_windows import periodic_windows
from dovetail_models.layers import GatedMLP, Rotary

__all__ = ["FAMILY", "Gemma3", "Gemma3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(GemmaConfig):
    """Sizes and options of a Gemma3; see `GemmaConfig` for the others.

    Attributes:
        local_theta: base of the rotary wavelengths in layers with a window, which have no scaling.
    """

    rope_theta: float = 1000000.0
    local_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.local_rotary()

    def local_rotary(self) -> Rotary:
        """Return the rotary embeddings of layers with a window."""
        return Rotary(self.dim, self.local_theta)


class Gemma3(Decoder):
    """A Gemma3; see `Decoder`."""

    config: Gemma3Config

    @staticmethod
    def block(config: Gemma3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        window = config.window_of(index)
        attention = config.attention(
            rotary=config.rotary() if window is None else config.local_rotary(),
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            norm="head",
            window=window,
            scale=config.query_dim**-0.5,
            **weights,
        )
        mlp = GatedMLP(config.features, config.hidden, activation="gelu_tanh", **weights)
        return Block(config, attention, mlp, after=True, dtype=weights["dtype"])


FAMILY = Family(
    Gemma3,
    ConfigMap(
        "Gemma3ForCausalLM",
        "gemma3_text",
        Gemma3Config,
        options={
            "num_key_value_heads": ("kv_heads", int, 4),
            "head_dim": ("head_dim", int, 256),
            "max_position_embeddings": ("max_position", int, 131072),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, True),
            "attention_bias": ("attention_bias", bool, False),
            "query_pre_attn_scalar": ("query_dim", int, 256),
            "final_logit_softcapping": ("final_softcap", float, None),
            "initializer_range": ("init_std", float, 0.02),
        },
        divides=True,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_dropout": 0.0},
        refused={
            "hidden_act": "gelu_pytorch_tanh",
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            "cache_implementation": None,
            "partial_rotary_factor": 1.0,
        },
        ignored=("_sliding_window_pattern",),  # of files that have layer_types
        others=(periodic_windows(4096, 6, "sliding_window_pattern"),),
        rope_theta=1000000.0,
        local_theta=("rope_local_base_freq", 10000.0),
    ),
    weight_map,
)
