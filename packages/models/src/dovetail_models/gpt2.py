"""The GPT-2 family: learned positions, layer norms, biases everywhere (Radford et al., 2019).

See https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf. There is no
dropout.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import take
from dovetail_models.decoder import Block, Decoder, StackConfig
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.layers import MLP, GroupedAttention, LayerNorm, parameter
from dovetail_weights import Reshape, Rule, Transpose, Unstack, WeightMap

__all__ = ["FAMILY", "Gpt2", "Gpt2Config"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(StackConfig):
    """Sizes and options of a Gpt2; see `StackConfig` for the others.

    Attributes:
        heads: of queries, keys and values alike, a divisor of `features`.
        hidden: width of the MLP; None for four times `features`.
        max_position: positions that are learned; a token at another one makes its row NaN.
        scaled: logits of attention are divided by the root of the features per head.
        scaled_by_layer: and by the number of the layer, from 1.
    """

    heads: int
    hidden: int | None = None
    max_position: int = 1024
    scaled: bool = True
    scaled_by_layer: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "hidden", "max_position"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if self.features % self.heads:
            raise ValueError(f"features={self.features}; expected a multiple of heads={self.heads}")

    @property
    def dim(self) -> int:
        """Features per head."""
        return self.features // self.heads

    @property
    def inner(self) -> int:
        """Width of the MLP."""
        return 4 * self.features if self.hidden is None else self.hidden

    def scale(self, index: int) -> float:
        """Return what the logits of attention of a layer are multiplied with."""
        return (self.dim**-0.5 if self.scaled else 1.0) / (index + 1 if self.scaled_by_layer else 1)

    def norm(self, dtype: Any) -> LayerNorm:
        """See `StackConfig.norm`."""
        return LayerNorm(self.features, eps=self.norm_eps, dtype=dtype)


class Gpt2(Decoder):
    """A Gpt2; see `Decoder`."""

    config: Gpt2Config

    def __init__(self, config: Any, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, **options: Any) -> None:
        super().__init__(config, rngs=rngs, param_dtype=param_dtype, **options)
        shape = (config.max_position, config.features)
        self.positions = parameter(rngs, shape, (None, "embed"), config.init, param_dtype, table=True)

    @staticmethod
    def block(config: Gpt2Config, index: int, **weights: Any) -> Block:
        """See `Decoder.block`."""
        attention = GroupedAttention(
            config.features,
            heads=config.heads,
            kv_heads=config.heads,
            head_dim=config.dim,
            rotary=None,
            bias=True,
            out_bias=True,
            scale=config.scale(index),
            **weights,
        )
        mlp = MLP(config.features, config.inner, activation="gelu_tanh", **weights)
        return Block(config, attention, mlp, dtype=weights["dtype"])

    def placed(
        self, x: Float[Array, "tokens features"], positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens features"]:
        """See `Decoder.placed`."""
        return x + take(self.positions.get_value(), positions).astype(x.dtype)


def _weight_map(config: Gpt2Config) -> WeightMap:
    d, h, e = config.features, config.heads, config.dim
    ours, theirs = "layers/{i}", "transformer.h.{i}"
    parts = tuple(f"{ours}/attention/{name}" for name in ("query", "key", "value"))
    norms = {
        "norm": "transformer.ln_f",
        f"{ours}/attention_norm": f"{theirs}.ln_1",
        f"{ours}/mlp_norm": f"{theirs}.ln_2",
    }
    return WeightMap(
        [
            Rule("embedding", "transformer.wte.weight"),
            Rule("positions", "transformer.wpe.weight"),
            Rule("head", "lm_head.weight", (Transpose(),)),
            *(Rule(f"{mine}/{part}", f"{name}.{part}") for mine, name in norms.items() for part in ("weight", "bias")),
            Rule(parts, f"{theirs}.attn.c_attn.weight", (Reshape((d, 3 * d), (d, 3, h, e)), Unstack(3, 1))),
            Rule(
                tuple(f"{name}_bias" for name in parts),
                f"{theirs}.attn.c_attn.bias",
                (Reshape((3 * d,), (3, h, e)), Unstack(3)),
            ),
            Rule(f"{ours}/attention/out", f"{theirs}.attn.c_proj.weight", (Reshape((d, d), (h, e, d)),)),
            Rule(f"{ours}/attention/out_bias", f"{theirs}.attn.c_proj.bias"),
            Rule(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc.weight"),
            Rule(f"{ours}/mlp/up_bias", f"{theirs}.mlp.c_fc.bias"),
            Rule(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj.weight"),
            Rule(f"{ours}/mlp/down_bias", f"{theirs}.mlp.c_proj.bias"),
        ]
    )


DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def _no_fields(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    del values, fields
    return {}


def _no_dropout(config: Gpt2Config) -> Mapping[str, Any]:
    del config
    return dict.fromkeys(DROPOUTS, 0.0)


FAMILY = Family(
    Gpt2,
    ConfigMap(
        "GPT2LMHeadModel",
        "gpt2",
        Gpt2Config,
        sizes={"vocab_size": "vocab_size", "n_embd": "features", "n_layer": "layers", "n_head": "heads"},
        attends=False,
        options={
            "n_inner": ("hidden", int, None),
            "n_positions": ("max_position", int, 1024),
            "layer_norm_epsilon": ("norm_eps", float, 1e-5),
            "tie_word_embeddings": ("tied", bool, True),
            "scale_attn_weights": ("scaled", bool, True),
            "scale_attn_by_inverse_layer_idx": ("scaled_by_layer", bool, False),
            "initializer_range": ("init_std", float, 0.02),
        },
        fixed={"activation_function": "gelu_new"},
        refused={"add_cross_attention": False},
        ignored=(
            *("n_ctx", "reorder_and_upcast_attn"),  # attention's softmax is in float32 here
            *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
            "summary_first_dropout",
        ),
        others=(Fields(DROPOUTS, _no_fields, _no_dropout),),
    ),
    _weight_map,
    ignored=("*.attn.bias", "*.attn.masked_bias"),  # masks
    spellings=((("transformer.{rest}", "{rest}"),),),
)
