"""The Phi-3 family: a Llama with fused weights, partly rotated heads and LongRoPE (Abdin et al., arXiv:2404.14219).

Covers Phi-3, 3.5 and 4 of Hugging Face's ``Phi3ForCausalLM``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx

from dovetail_kernels import LongRopeScaling
from dovetail_models.config_parts import PartlyTurnedConfig, WindowConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.hf_rope import FIELDS, LONG_KINDS, ORIGINAL, from_hf
from dovetail_models.hf_rules import OURS, THEIRS, outer_rules
from dovetail_models.layers import GatedMLP, Rotary
from dovetail_models.stack import Stack
from dovetail_models.state import abstract, merge, split
from dovetail_weights import Reshape, Rule, Split, Transpose, WeightMap

__all__ = ["FAMILY", "Phi3", "Phi3Config"]

ORIGINAL_LENGTH = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phi3Config(WindowConfig, PartlyTurnedConfig):
    """Sizes and options of a Phi3; see `WindowConfig` and `PartlyTurnedConfig` for the others.

    Attributes:
        length: of the longest sequence that the model is used for, which chooses between the two sets of factors of a
            `LongRopeScaling`; None for one within its ``original_max_position``. It is no field of ``config.json``:
            transformers chooses anew in every forward, so that keys of a cache may be rotated by another set than the
            query. See `Phi3.for_length`.
    """

    length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length is not None and self.length < 1:
            raise ValueError(f"length={self.length}; expected at least 1, or None")

    def rotary(self) -> Rotary:
        """See `DecoderConfig.rotary`."""
        return dataclasses.replace(super().rotary(), length=self.length)


class Phi3(Decoder):
    """A Phi3; see `Decoder`."""

    config: Phi3Config

    @staticmethod
    def block(config: Phi3Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        del index
        attention = config.attention(window=config.window, **weights)
        mlp = GatedMLP(config.features, config.hidden, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])

    def for_length(self, length: int) -> "Phi3":
        """Return this model, with the same parameters, for sequences of up to a length; see `Phi3Config`.

        >>> scaling = LongRopeScaling((1.0, 1.5), (2.0, 4.0), original_max_position=4096, factor=32.0)
        >>> config = Phi3Config(vocab_size=9, features=8, hidden=8, layers=1, heads=2, rope_scaling=scaling)
        >>> Phi3(config, rngs=nnx.Rngs(0)).for_length(100_000).config.length
        100000
        """
        config = dataclasses.replace(self.config, length=length)
        options: dict[str, Any] = {"dtype": self.dtype, "output_dtype": self.output_dtype}
        options |= {"scan": isinstance(self.layers, Stack), "remat": self.remat}
        definition, _ = abstract(lambda: Phi3(config, rngs=nnx.Rngs(0), **options))
        return merge(definition, split(self)[1])


def _weight_map(config: Phi3Config) -> WeightMap:
    d, e, heads, groups = config.features, config.dim, config.heads, config.groups
    fused = heads + 2 * groups
    attention, mlp = f"{OURS}/attention", f"{OURS}/mlp"
    apart = Transpose(), Reshape((d, fused * e), (d, fused, e)), Split((heads, groups, groups), 1)
    names = tuple(f"{attention}/{name}" for name in ("query", "key", "value"))
    return WeightMap(
        [
            *outer_rules(),
            Rule(names, f"{THEIRS}.self_attn.qkv_proj.weight", apart),
            Rule(
                f"{attention}/out",
                f"{THEIRS}.self_attn.o_proj.weight",
                (Transpose(), Reshape((heads * e, d), (heads, e, d))),
            ),
            Rule(
                (f"{mlp}/gate", f"{mlp}/up"),
                f"{THEIRS}.mlp.gate_up_proj.weight",
                (Transpose(), Split((config.hidden, config.hidden), 1)),
            ),
            Rule(f"{mlp}/down", f"{THEIRS}.mlp.down_proj.weight", (Transpose(),)),
        ]
    )


class _ConfigMap(ConfigMap):
    """Rotary settings as Phi-3 has them: the original length and the rotated part stand beside the scaling."""

    def read_rope(self, values: Mapping[str, Any], max_position: int) -> dict[str, Any]:
        original = field(values, ORIGINAL, int, ORIGINAL_LENGTH)
        changed = {name: _usual(name, values[name], original) for name in FIELDS[1:] if values.get(name)}
        theta, scaling = from_hf({**values, **changed}, max_position, self.rope_theta, partial=True, kinds=LONG_KINDS)
        return {"rope_theta": theta, "rope_scaling": scaling}

    def write_rope(self, config: Phi3Config) -> dict[str, Any]:
        scaling = config.rope_scaling
        if scaling is not None and not isinstance(scaling, LongRopeScaling):
            raise ConfigError(f"rope_scaling={scaling}; transformers knows None and LongRopeScaling for this model")
        original = ORIGINAL_LENGTH if scaling is None else scaling.original_max_position
        return {**super().write_rope(config), ORIGINAL: original}


def _usual(name: str, given: Any, original: int) -> dict[str, Any]:
    """Return rotary settings as other families have them."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}={given!r}; expected an object")
    kind = given.get("rope_type", given.get("type", "default"))
    rest = {key: value for key, value in given.items() if key not in ("type", ORIGINAL)}
    if kind == "default":
        return {**rest, "rope_type": kind}
    return {**rest, "rope_type": "longrope" if kind in ("su", "yarn") else kind, ORIGINAL: original}


FAMILY = Family(
    Phi3,
    _ConfigMap(
        "Phi3ForCausalLM",
        "phi3",
        Phi3Config,
        options={
            "num_key_value_heads": ("kv_heads", int, None),
            "head_dim": ("head_dim", int, None),
            "max_position_embeddings": ("max_position", int, 4096),
            "rms_norm_eps": ("norm_eps", float, 1e-5),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "sliding_window": ("window", int, None),
        },
        fixed={"hidden_act": "silu", "attention_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        refused={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False}
        | {"interpolate_factor": 1, "full_attn_mod": 1},
        rotary_fraction=1.0,
        ignored=("auto_map", ORIGINAL),  # which stands beside the rotary settings, and is read with them
    ),
    _weight_map,
)
