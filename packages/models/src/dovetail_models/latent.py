"""Multi-head latent attention and what its families share (DeepSeek-V2, arXiv:2405.04434)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dovetail_kernels import YarnScaling, einsum, rope
from dovetail_models.decoder import Block
from dovetail_models.hf_config import Fields
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.hf_rules import OURS, THEIRS, decoder_rules
from dovetail_models.layers import Initializer, RMSNorm, Tables, parameter
from dovetail_models.shared_experts import SharedExpertsConfig, shared_block, shared_rules
from dovetail_protocols import LatentCache, LayerIndex
from dovetail_runtime import constrain
from dovetail_weights import Reshape, Rule, Split, Transpose

__all__ = ["OPTIONS", "LatentAttention", "LatentConfig", "latent_block", "latent_fields", "latent_rules"]

NORM_EPS = 1e-6  # of the norms inside attention, whatever that of the others is


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentConfig(SharedExpertsConfig):
    """What families with latent attention share; see `SharedExpertsConfig` for the others.

    Attributes:
        query_rank: size of the latent that queries are made of; None for none.
        latent_dim: size of the latent that keys and values are made of.
        nope_dim: features of a query's and key's head that know no position.
        rope_dim: features that do, of which all heads share the key's.
        value_dim: features of a value's head.
        attention_bias: biases of the projections to latents and of the output.
    """

    query_rank: int | None
    latent_dim: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    attention_bias: bool = False
    divided: ClassVar[bool] = False

    def __post_init__(self) -> None:
        sizes = ("latent_dim", "nope_dim", "rope_dim", "value_dim")
        for name in (*sizes, *(["query_rank"] if self.query_rank is not None else [])):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.kv_heads not in (None, self.heads) or self.head_dim is not None:
            raise ValueError(f"kv_heads={self.kv_heads}, head_dim={self.head_dim}; latent attention has neither")
        super().__post_init__()

    @property
    def dim(self) -> int:
        """Rotated features per head."""
        return self.rope_dim

    @property
    def attention_scale(self) -> float:
        """Factor of the logits of attention."""
        scaling = self.rope_scaling
        factor = scaling.logit_factor if isinstance(scaling, YarnScaling) else 1.0
        return (self.nope_dim + self.rope_dim) ** -0.5 * factor


class LatentAttention(nnx.Module):
    """Attention whose keys and values are expansions of one small vector per token; the mixer does the mixing.

    Args:
        config: sizes and options.
        interleaved: rotates neighbouring features, see `dovetail_kernels.rope`.
        init: of the weights.
        out_init: of the output's.
        dtype: of the parameters.
        rngs: where the initial weights come from.
    """

    query: Any
    key: Any
    value: Any

    def __init__(
        self,
        config: LatentConfig,
        *,
        interleaved: bool = True,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        features, heads, rank = config.features, config.heads, config.query_rank
        shapes: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
            "latent": ((features, config.latent_dim), ("embed", None)),
            "rope_key": ((features, config.rope_dim), ("embed", None)),
            "key": ((config.latent_dim, heads, config.nope_dim), (None, "heads", None)),
            "value": ((config.latent_dim, heads, config.value_dim), (None, "heads", None)),
        }
        query = (heads, config.nope_dim + config.rope_dim)
        if rank is None:
            shapes["query"] = ((features, *query), ("embed", "heads", None))
        else:
            shapes["query_latent"] = ((features, rank), ("embed", None))
            shapes["query"] = ((rank, *query), (None, "heads", None))
            self.query_norm = RMSNorm(rank, axes=(None,), eps=NORM_EPS, dtype=dtype)
        for name, (shape, axes) in shapes.items():
            setattr(self, name, parameter(rngs, shape, axes, init, dtype, 1))
        self.latent_norm = RMSNorm(config.latent_dim, axes=(None,), eps=NORM_EPS, dtype=dtype)
        self.out = parameter(rngs, (heads, config.value_dim, features), ("heads", None, "embed"), out_init, dtype, 2)
        if config.attention_bias:
            zeros = nnx.initializers.zeros
            for name in ("query_latent", "latent", "rope_key"):
                if name in shapes:
                    setattr(self, f"{name}_bias", parameter(rngs, shapes[name][0][1:], (None,), zeros, dtype))
            self.out_bias = parameter(rngs, (features,), ("embed",), zeros, dtype)
        self.bias, self.has_query_latent, self.interleaved = config.attention_bias, rank is not None, interleaved
        self.rotary, self.nope_dim, self.scale = config.rotary(), config.nope_dim, config.attention_scale
        self.spec = LatentCache(config.latent_dim, config.rope_dim)

    def __call__(
        self, layer: LayerIndex, x: Float[Array, "tokens features"], tables: Tables, mixer: Any
    ) -> tuple[Any, Any]:
        """Return the attention output ``[tokens, features]`` and the mixer."""
        query = checkpoint_name(self._query(x, tables), "query")
        latent = checkpoint_name(self.latent_norm(self._down("latent", x)), "value")
        rope_key = checkpoint_name(self._rotated(self._down("rope_key", x)[:, None], tables)[:, 0], "key")
        expand = self.key.get_value(), self.value.get_value()
        mixed, mixer = mixer.attend_latent(layer, query, latent, rope_key, expand, scale=self.scale)
        mixed = checkpoint_name(constrain(mixed, "tokens", "heads", None), "attention")
        y = einsum("thk,hkd->td", mixed, self.out.get_value())
        return (y + self.out_bias.get_value().astype(y.dtype) if self.bias else y), mixer

    def _down(self, name: str, x: jax.Array) -> jax.Array:
        y = einsum("td,dl->tl", x, getattr(self, name).get_value())
        return y + getattr(self, f"{name}_bias").get_value().astype(y.dtype) if self.bias else y

    def _query(self, x: jax.Array, tables: Tables) -> jax.Array:
        x = self.query_norm(self._down("query_latent", x)) if self.has_query_latent else x
        query = constrain(einsum("td,dhk->thk", x, self.query.get_value()), "tokens", "heads", None)
        rotated = self._rotated(query[..., self.nope_dim :], tables)
        return jnp.concatenate([query[..., : self.nope_dim], rotated], axis=-1)

    def _rotated(self, x: jax.Array, tables: Tables) -> jax.Array:
        return rope(x, tables[self.rotary], interleaved=self.interleaved)

    def cache_spec(self) -> LatentCache:
        """Return what the mixer must remember."""
        return self.spec


def latent_block(config: Any, index: int, *, interleaved: bool = True, mlp_bias: bool = False, **weights: Any) -> Block:
    """Return a layer: latent attention, then a dense MLP or experts.

    Args:
        config: sizes and options.
        index: of the layer.
        interleaved: see `LatentAttention`.
        mlp_bias: biases of dense MLPs, the shared one included.
        weights: see `Decoder.block`.
    """
    attention = LatentAttention(config, interleaved=interleaved, **weights)
    return shared_block(config, index, attention, mlp_bias=mlp_bias, **weights)


def latent_rules(config: Any) -> list[Rule]:
    """Return the rules of a decoder of such layers."""
    return [*_attention(config), *decoder_rules(config), *shared_rules(config)]


def _attention(config: Any) -> list[Rule]:
    ours, theirs = f"{OURS}/attention", f"{THEIRS}.self_attn"
    d, h, latent, rank = config.features, config.heads, config.latent_dim, config.query_rank
    query, value = config.nope_dim + config.rope_dim, config.value_dim
    parts, expanded = (latent, config.rope_dim), (config.nope_dim, value)
    into = d if rank is None else rank
    down = f"{ours}/latent", f"{ours}/rope_key"
    up = Transpose(), Reshape((latent, h * sum(expanded)), (latent, h, sum(expanded))), Split(expanded, 2)
    return [
        Rule(f"{ours}/query_latent", f"{theirs}.q_a_proj.weight", (Transpose(),)),
        Rule(f"{ours}/query_latent_bias", f"{theirs}.q_a_proj.bias"),
        Rule(f"{ours}/query_norm/weight", f"{theirs}.q_a_layernorm.weight"),
        Rule(
            f"{ours}/query",
            f"{theirs}.{'q_proj' if rank is None else 'q_b_proj'}.weight",
            (Transpose(), Reshape((into, h * query), (into, h, query))),
        ),
        Rule(down, f"{theirs}.kv_a_proj_with_mqa.weight", (Transpose(), Split(parts, 1))),
        Rule(tuple(f"{name}_bias" for name in down), f"{theirs}.kv_a_proj_with_mqa.bias", (Split(parts, 0),)),
        Rule(f"{ours}/latent_norm/weight", f"{theirs}.kv_a_layernorm.weight"),
        Rule((f"{ours}/key", f"{ours}/value"), f"{theirs}.kv_b_proj.weight", up),
        Rule(f"{ours}/out", f"{theirs}.o_proj.weight", (Transpose(), Reshape((h * value, d), (h, value, d)))),
    ]


OPTIONS = {
    "rms_norm_eps": ("norm_eps", float, 1e-6),
    "tie_word_embeddings": ("tied", bool, False),
    "initializer_range": ("init_std", float, 0.02),
    "attention_bias": ("attention_bias", bool, False),
    "kv_lora_rank": ("latent_dim", int, 512),
    "qk_nope_head_dim": ("nope_dim", int, 128),
    "qk_rope_head_dim": ("rope_dim", int, 64),
    "v_head_dim": ("value_dim", int, 128),
    "output_router_logits": ("balanced", bool, False),
    "aux_loss_alpha": ("balance_coef", float, 0.001),
}
"""Their fields with the same meaning and default in all such families."""


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = field(values, "num_key_value_heads", int, fields["heads"])
    if heads != fields["heads"]:
        raise ConfigError(f"num_key_value_heads={heads}; expected {fields['heads']}, that of all heads")
    given = {"q_lora_rank": 1536} | dict(values)  # null is another value than none
    return {"query_rank": field(given, "q_lora_rank", int, None)}


def _write(config: LatentConfig) -> Mapping[str, Any]:
    return {"q_lora_rank": config.query_rank}


latent_fields = Fields(("num_key_value_heads", "q_lora_rank"), _read, _write)
