"""The Gemma 2 family: norms before and after, soft caps, every second layer sees a window (arXiv:2408.00118)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_models.config_parts import LayerWindowsConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import field
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.hf_windows import FULL, WINDOW, one_width, read_types
from dovetail_models.layers import GatedMLP
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "Gemma2", "Gemma2Config", "GemmaConfig", "weight_map"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GemmaConfig(LayerWindowsConfig):
    """Sizes and options that the Gemmas share; see `LayerWindowsConfig` for the others.

    Attributes:
        query_dim: logits of attention are divided by its root.
        final_softcap: of the logits of tokens; None for none.
        attention_bias: biases in the attention's projections.
    """

    query_dim: int = 256
    final_softcap: float | None = None
    attention_bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_dim < 1:
            raise ValueError(f"query_dim={self.query_dim}; expected at least 1")
        _check_cap("final_softcap", self.final_softcap)

    @property
    def norm_offset(self) -> float:
        """Weights of norms are stored less 1."""
        return 1.0

    @property
    def embedding_scale(self) -> float:
        """The root of the features."""
        return self.features**0.5

    @property
    def logit_softcap(self) -> float | None:
        """See `final_softcap`."""
        return self.final_softcap


def _check_cap(name: str, cap: float | None) -> None:
    if cap is not None and not cap > 0:
        raise ValueError(f"{name}={cap}; expected a number above 0, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config(GemmaConfig):
    """Sizes and options of a Gemma2; see `GemmaConfig` for the others.

    Attributes:
        attention_softcap: of the logits of attention; None for none.
    """

    attention_softcap: float | None = 50.0
    final_softcap: float | None = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_cap("attention_softcap", self.attention_softcap)


class Gemma2(Decoder):
    """A Gemma2; see `Decoder`."""

    config: Gemma2Config

    @staticmethod
    def block(config: Gemma2Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = config.attention(
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            window=config.window_of(index),
            softcap=config.attention_softcap,
            scale=config.query_dim**-0.5,
            **weights,
        )
        mlp = GatedMLP(config.features, config.hidden, activation="gelu_tanh", **weights)
        return Block(config, attention, mlp, after=True, dtype=weights["dtype"])


def weight_map(config: GemmaConfig) -> WeightMap:
    """Return the names and layouts of the tensors."""
    norms = {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    }
    return WeightMap(decoder_rules(config, norms=norms))


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    absent = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    given = absent | dict(values)  # null is another value than none
    width = field(given, "sliding_window", int, None)
    types = read_types(values, fields["layers"], lambda i: FULL if i % 2 else WINDOW)
    return {
        "windows": tuple(width if kind == WINDOW else None for kind in types) if width and WINDOW in types else None,
        "attention_softcap": field(given, "attn_logit_softcapping", float, None),
        "final_softcap": field(given, "final_logit_softcapping", float, None),
    }


def _write(config: Gemma2Config) -> Mapping[str, Any]:
    windows = config.windows or (None,) * config.layers
    return {
        "sliding_window": one_width(windows) or 4096,  # transformers wants one even where no layer has a window
        "layer_types": [FULL if window is None else WINDOW for window in windows],
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.final_softcap,
    }


FAMILY = Family(
    Gemma2,
    ConfigMap(
        "Gemma2ForCausalLM",
        "gemma2",
        Gemma2Config,
        options={
            "num_key_value_heads": ("kv_heads", int, 4),
            "head_dim": ("head_dim", int, 256),
            "max_position_embeddings": ("max_position", int, 8192),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, True),
            "attention_bias": ("attention_bias", bool, False),
            "query_pre_attn_scalar": ("query_dim", int, 256),
            "initializer_range": ("init_std", float, 0.02),
        },
        divides=True,
        fixed={"hidden_activation": "gelu_pytorch_tanh", "attention_dropout": 0.0},
        refused={"hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": False, "cache_implementation": None},
        others=(
            Fields(
                ("sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping"), _read, _write
            ),
        ),
    ),
    weight_map,
)
