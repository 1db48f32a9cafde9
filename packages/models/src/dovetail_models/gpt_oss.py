"""The gpt-oss family: experts with clamped units, attention with sinks, windows in some layers (arXiv:2508.10925).

Checkpoints with MXFP4 weights must be stored in bfloat16 first.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_kernels import Clamped, RopeScaling, YarnScaling
from dovetail_models.config_parts import LayerWindowsConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.hf_rules import OURS, THEIRS, decoder_rules
from dovetail_models.hf_windows import FULL, WINDOW, one_width, read_types
from dovetail_models.moe import BALANCE, SparseConfig, sparse_mlp
from dovetail_models.router import Selection
from dovetail_weights import Reshape, Rule, Transpose, Unstack, WeightMap

__all__ = ["FAMILY", "GptOss", "GptOssConfig"]

SCALING = YarnScaling(32.0, 4096, truncate=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(SparseConfig, LayerWindowsConfig):
    """Sizes and options of a GptOss; see `SparseConfig` and `LayerWindowsConfig` for the others.

    `hidden` is the width of each expert.

    Attributes:
        attention_bias: biases in the attention's projections.
        alpha: see `dovetail_kernels.Clamped`.
        limit: see `dovetail_kernels.Clamped`.
    """

    experts: int = 128
    top_k: int = 4
    attention_bias: bool = True
    alpha: float = 1.702
    limit: float = 7.0
    rope_theta: float = 150000.0
    rope_scaling: RopeScaling | None = SCALING

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit}; expected a number above 0")

    @property
    def select(self) -> Selection:
        """See `SparseConfig.select`."""
        return dataclasses.replace(super().select, bias=True)


class GptOss(Decoder):
    """A gpt-oss; see `Decoder`."""

    config: GptOssConfig

    @staticmethod
    def block(config: GptOssConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = config.attention(
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            window=config.window_of(index),
            sinks=True,
            **weights,
        )
        unit = Clamped(config.alpha, config.limit)
        mlp = sparse_mlp(config, config.hidden, activation=unit, bias=True, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: GptOssConfig) -> WeightMap:
    ours, theirs = f"{OURS}/mlp", f"{THEIRS}.mlp"
    count, into, out = config.experts, config.features, config.hidden
    both = f"{ours}/experts/gate", f"{ours}/experts/up"
    apart = Reshape((count, into, 2 * out), (count, into, out, 2)), Unstack(2, 3)  # they alternate
    biases = Reshape((count, 2 * out), (count, out, 2)), Unstack(2, 2)
    return WeightMap(
        [
            *decoder_rules(config),
            Rule(f"{ours}/router/weight", f"{theirs}.router.weight", (Transpose(),)),
            Rule(f"{ours}/router/bias", f"{theirs}.router.bias"),
            Rule(both, f"{theirs}.experts.gate_up_proj", apart),
            Rule(tuple(f"{name}_bias" for name in both), f"{theirs}.experts.gate_up_proj_bias", biases),
            Rule(f"{ours}/experts/down", f"{theirs}.experts.down_proj"),
            Rule(f"{ours}/experts/down_bias", f"{theirs}.experts.down_proj_bias"),
        ]
    )


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    named = field(values, "experts_per_token", int, fields["top_k"])
    if named != fields["top_k"]:
        raise ConfigError(f"experts_per_token={named}, num_experts_per_tok={fields['top_k']}; expected one number")
    given = {"sliding_window": 128} | dict(values)  # null is another value than none
    width = field(given, "sliding_window", int, None)
    types = read_types(values, fields["layers"], lambda i: FULL if i % 2 else WINDOW)
    return {
        "windows": tuple(width if kind == WINDOW else None for kind in types) if width and WINDOW in types else None
    }


def _write(config: GptOssConfig) -> Mapping[str, Any]:
    windows = config.windows or (None,) * config.layers
    return {
        "sliding_window": one_width(windows) or 128,  # transformers wants one even where no layer has a window
        "layer_types": [FULL if window is None else WINDOW for window in windows],
    }


FAMILY = Family(
    GptOss,
    ConfigMap(
        "GptOssForCausalLM",
        "gpt_oss",
        GptOssConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, 8),
            "head_dim": ("head_dim", int, 64),
            "max_position_embeddings": ("max_position", int, 131072),
            "rms_norm_eps": ("norm_eps", float, 1e-5),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "attention_bias": ("attention_bias", bool, True),
            "num_local_experts": ("experts", int, 128),
            "num_experts_per_tok": ("top_k", int, 4),
            "swiglu_alpha": ("alpha", float, 1.702),
            "swiglu_limit": ("limit", float, 7.0),
            **BALANCE,
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
        ignored=("initial_context_length",),
        others=(Fields(("sliding_window", "layer_types", "experts_per_token"), _read, _write),),
        rope_theta=150000.0,
        rope_scaling=SCALING,
    ),
    _weight_map,
)
