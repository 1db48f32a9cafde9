"""The Qwen3-Next family: gated delta nets and, every few layers, gated attention; experts and a shared one."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from dovetail_kernels import einsum
from dovetail_models.config_parts import PartlyTurnedConfig
from dovetail_models.decoder import Block, Decoder
from dovetail_models.delta_net import GatedDeltaNet
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.hf_rules import decoder_rules, expert_rules
from dovetail_models.layers import GatedMLP, GroupedAttention, exact, parameter
from dovetail_models.moe import BALANCE, sparse_mlp
from dovetail_models.qwen3_moe import QwenSparseConfig, read_dense_layers
from dovetail_weights import Reshape, Rule, Split, Transpose, WeightMap

__all__ = ["FAMILY", "Qwen3Next", "Qwen3NextConfig"]

FULL, LINEAR = "full_attention", "linear_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(QwenSparseConfig, PartlyTurnedConfig):
    """Sizes and options of a Qwen3Next; see `QwenSparseConfig` and `PartlyTurnedConfig` for the others.

    Attributes:
        linear: which layers are recurrent; None for all but every fourth.
        key_heads: heads of queries and keys in recurrent layers.
        value_heads: heads of values there, a multiple of `key_heads`.
        key_dim: features of a query or key there.
        value_dim: features of a value there.
        conv_width: tokens that a convolution there sees, the token itself included.
        shared_hidden: width of the shared expert.
    """

    shared_hidden: int
    linear: tuple[bool, ...] | None = None
    key_heads: int = 16
    value_heads: int = 32
    key_dim: int = 128
    value_dim: int = 128
    conv_width: int = 4
    renormalize: bool = True
    rotary_fraction: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_heads", "key_dim", "value_dim", "conv_width", "shared_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.value_heads < 1 or self.value_heads % self.key_heads:
            raise ValueError(f"value_heads={self.value_heads}; expected a multiple of key_heads={self.key_heads}")
        if self.linear is not None and len(self.linear) != self.layers:
            raise ValueError(f"linear={self.linear}; expected one for each of {self.layers} layers, or None")

    @property
    def norm_offset(self) -> float:
        """Weights of norms are stored less 1."""
        return 1.0

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """See `StackConfig.rearranged`."""
        return {**super().rearranged(order), "linear": tuple(self.is_linear(i) for i in order)}

    def is_linear(self, index: int) -> bool:
        """Tell whether a layer is recurrent."""
        return bool((index + 1) % 4) if self.linear is None else self.linear[index]


class _SharedMLP(GatedMLP):
    """An MLP for all tokens, each of which takes a share of it."""

    def __init__(self, features: int, hidden: int, *, init: Any, dtype: Any, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(features, hidden, init=init, dtype=dtype, rngs=rngs, **options)
        self.share = parameter(rngs, (features, 1), ("embed", None), init, dtype, 1)

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        share = einsum("td,do->to", x, self.share.get_value())
        return super().__call__(x) * jax.nn.sigmoid(share.astype(exact(x))).astype(x.dtype)


class Qwen3Next(Decoder):
    """A Qwen3-Next; see `Decoder`."""

    config: Qwen3NextConfig

    @staticmethod
    def block(config: Qwen3NextConfig, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = (_linear if config.is_linear(index) else _full)(config, **weights)
        if not config.is_sparse(index):
            mlp = GatedMLP(config.features, config.hidden, **weights)
            return Block(config, attention, mlp, dtype=weights["dtype"])
        shared = _SharedMLP(config.features, config.shared_hidden, **weights)
        mlp = sparse_mlp(config, config.expert_hidden, shared=shared, **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])


def _linear(config: Qwen3NextConfig, **weights: Any) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.features,
        key_heads=config.key_heads,
        value_heads=config.value_heads,
        key_dim=config.key_dim,
        value_dim=config.value_dim,
        width=config.conv_width,
        norm_eps=config.norm_eps,
        **weights,
    )


def _full(config: Qwen3NextConfig, **weights: Any) -> GroupedAttention:
    return config.attention(
        bias=config.attention_bias,
        out_bias=config.attention_bias,
        norm="head",
        gated=True,
        **weights,
    )


def _weight_map(config: Qwen3NextConfig) -> WeightMap:
    kinds = (_linear_rules if config.is_linear(i) else _gated_rules for i in range(config.layers))
    own = [rule for i, kind in enumerate(kinds) for rule in kind(config, f"layers/{i}/attention", f"model.layers.{i}")]
    ours, theirs = "layers/{i}/mlp/shared", "model.layers.{i}.mlp.shared_expert"
    shared = [Rule(f"{ours}/{n}", f"{theirs}.{n}_proj.weight", (Transpose(),)) for n in ("gate", "up", "down")]
    share = Rule(f"{ours}/share", f"{theirs}_gate.weight", (Transpose(),))
    return WeightMap([*own, *shared, share, *expert_rules(config.experts), *decoder_rules(config)])


def _gated_rules(config: Qwen3NextConfig, ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a layer's queries, each head with its gate."""
    d, e, h = config.features, config.dim, config.heads
    both, flat = Reshape((d, 2 * h * e), (d, h, 2 * e)), Reshape((2 * h * e,), (h, 2 * e))
    names, name = (f"{ours}/query", f"{ours}/gate"), f"{theirs}.self_attn.q_proj"
    return [
        Rule(names, f"{name}.weight", (Transpose(), both, Split((e, e), 2))),
        Rule(tuple(f"{address}_bias" for address in names), f"{name}.bias", (flat, Split((e, e), 1))),
    ]


def _linear_rules(config: Qwen3NextConfig, ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a recurrent layer."""
    theirs = f"{theirs}.linear_attn"
    d, heads, share = config.features, config.key_heads, config.value_heads // config.key_heads
    parts = (config.key_dim, config.key_dim, share * config.value_dim, share * config.value_dim)
    channels = tuple(heads * part for part in parts[:3])
    flat = Reshape((sum(channels), 1, config.conv_width), (sum(channels), config.conv_width))
    convs = tuple(f"{ours}/conv_{name}" for name in ("query", "key", "value"))

    def split(names: tuple[str, ...], name: str, sizes: tuple[int, ...]) -> Rule:
        per_head = Reshape((d, heads * sum(sizes)), (d, heads, sum(sizes)))
        addresses = tuple(f"{ours}/in_{part}" for part in names)
        return Rule(addresses, f"{theirs}.{name}.weight", (Transpose(), per_head, Split(sizes, 2)))

    return [
        split(("query", "key", "value", "gate"), "in_proj_qkvz", parts),
        split(("strength", "decay"), "in_proj_ba", (share, share)),
        Rule(convs, f"{theirs}.conv1d.weight", (flat, Split(channels))),
        Rule(f"{ours}/dt_bias", f"{theirs}.dt_bias"),
        Rule(f"{ours}/a_log", f"{theirs}.A_log"),
        Rule(f"{ours}/norm/weight", f"{theirs}.norm.weight"),
        Rule(f"{ours}/out", f"{theirs}.out_proj.weight", (Transpose(),)),
    ]


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    layers, every = fields["layers"], field(values, "full_attention_interval", int, 4)
    kinds = values.get("layer_types")
    if kinds is None:
        if every < 1:
            raise ConfigError(f"full_attention_interval={every}; expected at least 1")
        kinds = [LINEAR if (i + 1) % every else FULL for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {FULL, LINEAR}:
        raise ConfigError(f"layer_types={kinds!r}; expected a list of {layers} of {FULL!r} and {LINEAR!r}")
    return {"linear": tuple(kind == LINEAR for kind in kinds), "dense_layers": read_dense_layers(values)}


def _write(config: Qwen3NextConfig) -> Mapping[str, Any]:
    return {
        "layer_types": [LINEAR if config.is_linear(i) else FULL for i in range(config.layers)],
        "mlp_only_layers": list(config.dense_layers),
    }


FAMILY = Family(
    Qwen3Next,
    ConfigMap(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        Qwen3NextConfig,
        options={
            "num_key_value_heads": ("kv_heads", int, 2),
            "head_dim": ("head_dim", int, 256),
            "max_position_embeddings": ("max_position", int, 32768),
            "rms_norm_eps": ("norm_eps", float, 1e-6),
            "tie_word_embeddings": ("tied", bool, False),
            "initializer_range": ("init_std", float, 0.02),
            "attention_bias": ("attention_bias", bool, False),
            "linear_num_key_heads": ("key_heads", int, 16),
            "linear_num_value_heads": ("value_heads", int, 32),
            "linear_key_head_dim": ("key_dim", int, 128),
            "linear_value_head_dim": ("value_dim", int, 128),
            "linear_conv_kernel_dim": ("conv_width", int, 4),
            "num_experts": ("experts", int, 512),
            "num_experts_per_tok": ("top_k", int, 10),
            "moe_intermediate_size": ("expert_hidden", int, 512),
            "shared_expert_intermediate_size": ("shared_hidden", int, 512),
            "norm_topk_prob": ("renormalize", bool, True),
            "decoder_sparse_step": ("sparse_step", int, 1),
            **BALANCE,
        },
        rotary_fraction=0.25,
        fixed={"hidden_act": "silu", "attention_dropout": 0.0},
        others=(Fields(("layer_types", "full_attention_interval", "mlp_only_layers"), _read, _write),),
    ),
    _weight_map,
    ignored=("mtp.*",),
)
