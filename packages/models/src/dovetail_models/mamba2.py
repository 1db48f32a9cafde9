"""The Mamba-2 family: state-space layers and nothing else, without positions or MLPs (Dao and Gu, arXiv:2405.21060)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dovetail_models.decoder import Decoder, StackConfig
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.layers import Tables
from dovetail_models.stack import Stack
from dovetail_models.state_space import StateSpace
from dovetail_protocols import Auxiliary, LayerIndex
from dovetail_runtime import constrain
from dovetail_weights import Reshape, Rule, Split, Transpose, WeightMap

__all__ = ["FAMILY", "Mamba2", "Mamba2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(StackConfig):
    """Sizes and options of a Mamba2; see `StackConfig` for the others.

    Attributes:
        heads: of the recurrence.
        head_dim: features per head.
        state_size: numbers that a head keeps per feature.
        groups: see `StateSpace`.
        conv_width: tokens that a convolution sees, the token itself included.
        bias: biases in the projections.
        conv_bias: biases in the convolutions.
        residual_float32: the residual stream is float32, whatever the dtype of the activations.
        dt_limits: least and largest step.
        dt_init: ``(least, largest, floor)`` of the steps at the beginning.
    """

    heads: int
    head_dim: int = 64
    state_size: int = 128
    groups: int = 8
    conv_width: int = 4
    bias: bool = False
    conv_bias: bool = True
    residual_float32: bool = True
    dt_limits: tuple[float, float] = (0.0, math.inf)
    dt_init: tuple[float, float, float] = (0.001, 0.1, 1e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "head_dim", "state_size", "conv_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.groups < 1 or self.heads % self.groups:
            raise ValueError(f"groups={self.groups}; expected a divisor of heads={self.heads}")
        if not 0 <= self.dt_limits[0] < self.dt_limits[1]:
            raise ValueError(f"dt_limits={self.dt_limits}; expected two numbers of at least 0 that ascend")
        if not 0 < self.dt_init[0] < self.dt_init[1] < math.inf or self.dt_init[2] < 0:
            raise ValueError(f"dt_init={self.dt_init}; expected two positive numbers that ascend, and a floor")

    @property
    def max_position(self) -> int:
        """There are no positions: any length is possible."""
        return 2**31 - 1


class _Block(nnx.Module):
    """A state-space layer, added to the residual stream."""

    def __init__(self, config: Mamba2Config, attention: StateSpace, dtype: Any) -> None:
        self.attention_norm, self.attention = config.norm(dtype), attention
        self.residual: Any = jnp.float32 if config.residual_float32 else None
        self.inside: Any = jnp.float32

    def __call__(self, layer: LayerIndex, x: jax.Array, tables: Tables, mixer: Any) -> tuple[jax.Array, Auxiliary, Any]:
        """See `dovetail_models.decoder.Block`."""
        x = x if self.residual is None else x.astype(self.residual)
        mixed, mixer = self.attention(layer, self.attention_norm(x).astype(self.inside), tables, mixer)
        mixed = checkpoint_name(mixed, "attention_out")
        return constrain(x + mixed.astype(x.dtype), "residual", "embed"), {}, mixer


class Mamba2(Decoder):
    """A Mamba2; see `Decoder`."""

    config: Mamba2Config

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config, **options)
        for layer in self.layers.programs if isinstance(self.layers, Stack) else self.layers:
            layer.inside = self.dtype

    @staticmethod
    def block(config: Mamba2Config, index: int, **weights: Any) -> _Block:
        """See `Decoder.block`."""
        del index
        attention = StateSpace(
            config.features,
            heads=config.heads,
            head_dim=config.head_dim,
            state_size=config.state_size,
            groups=config.groups,
            width=config.conv_width,
            bias=config.bias,
            conv_bias=config.conv_bias,
            norm_eps=config.norm_eps,
            dt_limits=config.dt_limits,
            dt_init=config.dt_init,
            **weights,
        )
        return _Block(config, attention, weights["dtype"])

    def hidden(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        mixer: Any,
        *,
        embeds: Float[Array, "tokens features"] | None = None,
    ) -> tuple[Float[Array, "tokens features"], Auxiliary, Any]:
        """See `dovetail_protocols.LanguageModel.hidden`."""
        hidden, aux, mixer = super().hidden(tokens, positions, mixer, embeds=embeds)
        return hidden.astype(self.dtype), aux, mixer


def _weight_map(config: Mamba2Config) -> WeightMap:
    ours, theirs = "layers/{i}/attention", "backbone.layers.{i}.mixer"
    inner, shared = config.heads * config.head_dim, config.groups * config.state_size
    convolved, width = inner + 2 * shared, config.conv_width
    ins = tuple(f"{ours}/in_{name}" for name in ("gate", "x", "b", "c", "dt"))
    convs = tuple(f"{ours}/conv_{name}" for name in ("x", "b", "c"))
    split, parts = (inner, inner, shared, shared, config.heads), (inner, shared, shared)
    flat = Reshape((convolved, 1, width), (convolved, width))
    return WeightMap(
        [
            Rule("embedding", "backbone.embeddings.weight"),
            Rule("norm/weight", "backbone.norm_f.weight"),
            Rule("head", "lm_head.weight", (Transpose(),)),
            Rule("layers/{i}/attention_norm/weight", "backbone.layers.{i}.norm.weight"),
            Rule(ins, f"{theirs}.in_proj.weight", (Transpose(), Split(split, 1))),
            Rule(tuple(f"{name}_bias" for name in ins), f"{theirs}.in_proj.bias", (Split(split),)),
            Rule(convs, f"{theirs}.conv1d.weight", (flat, Split(parts))),
            Rule(tuple(f"{name}_bias" for name in convs), f"{theirs}.conv1d.bias", (Split(parts),)),
            Rule(f"{ours}/dt_bias", f"{theirs}.dt_bias"),
            Rule(f"{ours}/a_log", f"{theirs}.A_log"),
            Rule(f"{ours}/d", f"{theirs}.D"),
            Rule(f"{ours}/norm/weight", f"{theirs}.norm.weight"),
            Rule(f"{ours}/out", f"{theirs}.out_proj.weight", (Transpose(),)),
            Rule(f"{ours}/out_bias", f"{theirs}.out_proj.bias"),
        ]
    )


def _number(value: Any, name: str) -> float:
    """Return a number that may be infinite, as transformers 4 or 5 writes it."""
    value = value.get("__float__") if isinstance(value, Mapping) else value
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} has {value!r}; expected a number") from error


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    expand, inner = field(values, "expand", int, 2), fields["heads"] * fields["head_dim"]
    if expand * fields["features"] != inner:
        raise ConfigError(f"expand={expand} times hidden_size={fields['features']}; expected heads of {inner} in all")
    limits = (0.0, math.inf) if values.get("time_step_limit") is None else values["time_step_limit"]
    if not isinstance(limits, list | tuple) or len(limits) != 2:
        raise ConfigError(f"time_step_limit={limits!r}; expected two numbers")
    steps = {"time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 1e-4}
    return {
        "dt_limits": tuple(_number(limit, "time_step_limit") for limit in limits),
        "dt_init": tuple(field(values, name, float, default) for name, default in steps.items()),
    }


def _write(config: Mamba2Config) -> Mapping[str, Any]:
    inner = config.heads * config.head_dim
    if inner % config.features:
        raise ConfigError(f"heads of {inner} in all; transformers wants a multiple of features={config.features}")
    steps = zip(("time_step_min", "time_step_max", "time_step_floor"), config.dt_init, strict=True)
    return {"expand": inner // config.features, "time_step_limit": list(config.dt_limits), **dict(steps)}


FAMILY = Family(
    Mamba2,
    ConfigMap(
        "Mamba2ForCausalLM",
        "mamba2",
        Mamba2Config,
        sizes={"vocab_size": "vocab_size", "hidden_size": "features", "num_hidden_layers": "layers"},
        attends=False,
        options={
            "num_heads": ("heads", int, 128),
            "head_dim": ("head_dim", int, 64),
            "state_size": ("state_size", int, 128),
            "n_groups": ("groups", int, 8),
            "conv_kernel": ("conv_width", int, 4),
            "layer_norm_epsilon": ("norm_eps", float, 1e-5),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.1),
            "use_bias": ("bias", bool, False),
            "use_conv_bias": ("conv_bias", bool, True),
            "residual_in_fp32": ("residual_float32", bool, True),
        },
        fixed={"hidden_act": "silu"},
        refused={"rms_norm": True},
        ignored=("chunk_size", "time_step_rank", "rescale_prenorm_residual", "norm_before_gate"),
        others=(
            Fields(("expand", "time_step_limit", "time_step_min", "time_step_max", "time_step_floor"), _read, _write),
        ),
    ),
    _weight_map,
)
