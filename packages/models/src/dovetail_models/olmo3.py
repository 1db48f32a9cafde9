"""The OLMo 3 family: an OLMo 2 in which most layers see a window, and the others alone have rotary scaling.

Olmo Team, arXiv:2512.13961.
"""

import dataclasses
from typing import Any

from dovetail_models.config_parts import LayerWindowsConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_windows import periodic_windows
from dovetail_models.layers import Rotary
from dovetail_models.olmo2 import OPTIONS, Olmo2Config, block_after, weight_map

__all__ = ["FAMILY", "Olmo3", "Olmo3Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Olmo3Config(Olmo2Config, LayerWindowsConfig):
    """Sizes and options of an Olmo3; see `Olmo2Config` and `LayerWindowsConfig` for the others.

    Attributes:
        local_theta: base of the rotary wavelengths in layers with a window, which have no scaling; transformers 4 knows
            models alone in which it is `rope_theta`.
    """

    rope_theta: float = 500000.0
    local_theta: float = 500000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.local_rotary()

    def local_rotary(self) -> Rotary:
        """Return the rotary embeddings of layers with a window."""
        return Rotary(self.dim, self.local_theta)


class Olmo3(Decoder):
    """An Olmo3; see `Decoder`."""

    config: Olmo3Config

    @staticmethod
    def block(config: Olmo3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        window = config.window_of(index)
        rotary = config.rotary() if window is None else config.local_rotary()
        return block_after(config, rotary, window=window, **weights)


FAMILY = Family(
    Olmo3,
    ConfigMap(
        "Olmo3ForCausalLM",
        "olmo3",
        Olmo3Config,
        options=OPTIONS,
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        refused={"partial_rotary_factor": 1.0},
        others=(periodic_windows(4096, 4),),
        rope_theta=500000.0,
        local_theta=("rope_theta", 500000.0),
    ),
    weight_map,
)
