"""The SmolLM3 family: a Llama with layers that do not know positions (Kazemnejad et al., arXiv:2305.19466)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail_models.config_parts import LayerWindowsConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.hf_rules import decoder_rules
from dovetail_models.hf_windows import FULL, WINDOW, one_width, read_types
from dovetail_models.layers import GatedMLP
from dovetail_weights import WeightMap

__all__ = ["FAMILY", "SmolLM3", "SmolLM3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolLM3Config(LayerWindowsConfig):
    """Sizes and options of a SmolLM3; see `LayerWindowsConfig` for the others.

    Attributes:
        rotated: which layers have rotary embeddings; None for all but every fourth.
        attention_bias: biases in the attention's projections.
        mlp_bias: biases in the MLP.
    """

    rotated: tuple[bool, ...] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 2000000.0
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotated is not None and len(self.rotated) != self.layers:
            raise ValueError(f"rotated={self.rotated}; expected one for each of {self.layers} layers, or None")

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """See `StackConfig.rearranged`."""
        return {**super().rearranged(order), "rotated": tuple(self.has_rotary(i) for i in order)}

    def has_rotary(self, index: int) -> bool:
        """Tell whether a layer has rotary embeddings."""
        return bool((index + 1) % 4) if self.rotated is None else self.rotated[index]


class SmolLM3(Decoder):
    """A SmolLM3; see `Decoder`."""

    config: SmolLM3Config

    @staticmethod
    def block(config: SmolLM3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = config.attention(
            rotary=config.rotary() if config.has_rotary(index) else None,
            bias=config.attention_bias,
            out_bias=config.attention_bias,
            window=config.window_of(index),
            **weights,
        )
        mlp = GatedMLP(config.features, config.hidden, bias=config.mlp_bias, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _weight_map(config: SmolLM3Config) -> WeightMap:
    return WeightMap(decoder_rules(config))


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    layers = fields["layers"]
    every = field(values, "no_rope_layer_interval", int, 4)
    marks = values.get("no_rope_layers")
    if marks is None:
        marks = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(marks, list) or len(marks) < layers or any(mark not in (0, 1) for mark in marks):
        raise ConfigError(f"no_rope_layers={marks!r}; expected 0 or 1 for each of {layers} layers")
    rotated = tuple(bool(mark) for mark in marks[:layers])
    width = field(values, "sliding_window", int, None) if field(values, "use_sliding_window", bool, False) else None
    types = read_types(values, layers, lambda i: FULL if width is None or rotated[i] else WINDOW)
    windows = tuple(width if kind == WINDOW else None for kind in types) if width and WINDOW in types else None
    return {"rotated": rotated, "windows": windows}


def _write(config: SmolLM3Config) -> Mapping[str, Any]:
    windows = config.windows or (None,) * config.layers
    return {
        "no_rope_layers": [int(config.has_rotary(i)) for i in range(config.layers)],
        "use_sliding_window": config.windows is not None,
        "sliding_window": one_width(windows),
        "layer_types": [FULL if window is None else WINDOW for window in windows],
    }


FAMILY = Family(
    SmolLM3,
    ConfigMap(
        "SmolLM3ForCausalLM",
        "smollm3",
        SmolLM3Config,
        options={
            "num_key_value_heads": ("kv_heads", int, 4),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 32768),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, True),
            "attention_bias": ("attention_bias", bool, False),
            "mlp_bias": ("mlp_bias", bool, False),
            "initializer_range": ("init_std", float, 0.02),
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0, "pretraining_tp": 1},
        ignored=("max_window_layers",),
        others=(
            Fields(
                (
                    *("no_rope_layers", "no_rope_layer_interval"),
                    *("use_sliding_window", "sliding_window", "layer_types"),
                ),
                _read,
                _write,
            ),
        ),
        rope_theta=2000000.0,
    ),
    _weight_map,
)
