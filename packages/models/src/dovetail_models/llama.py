"""The Llama family: pre-norm blocks of grouped rotary attention and a gated MLP (Touvron et al., arXiv:2302.13971).

Covers Llama 2 and 3.x and every checkpoint of Hugging Face's ``LlamaForCausalLM``.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import RopeScaling, RopeTable, einsum, rope_frequencies, rope_table, take
from dovetail_models.layers import GatedMLP, GroupedAttention, RMSNorm, parameter
from dovetail_protocols import Auxiliary, FullCache
from dovetail_runtime import constrain

__all__ = ["Llama", "LlamaConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and options of a Llama.

    Attributes:
        vocab_size: tokens.
        features: width of the residual stream.
        hidden: width of the MLP.
        layers: blocks.
        heads: query heads.
        kv_heads: key-value heads, a divisor of `heads`; None for `heads`.
        head_dim: features per head; None for ``features // heads``.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how a longer context is reached.
        max_position: the context length the model is meant for (written to config.json, not enforced).
        norm_eps: added to the mean square in the norms.
        tied: the unembedding is the embedding.
        attention_bias: biases in the attention's projections.
        mlp_bias: biases in the MLP.
        init_std: standard deviation of the initial weights.
    """

    vocab_size: int
    features: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 2048
    norm_eps: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "features", "hidden", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.max_position < 1:
            raise ValueError(f"max_position={self.max_position}; expected at least 1")
        for name in ("norm_eps", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number of at least 0")
        if self.head_dim is None and self.features % self.heads:
            raise ValueError(f"features={self.features} is no multiple of heads={self.heads}; set head_dim")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads}; expected a divisor of heads={self.heads}")
        rope_frequencies(self.dim, self.rope_theta, self.rope_scaling)

    @property
    def dim(self) -> int:
        """Features per head."""
        return self.features // self.heads if self.head_dim is None else self.head_dim

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads


class LlamaBlock(nnx.Module):
    """Attention and MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype: Any, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(config.init_std)
        out_init = nnx.initializers.normal(config.init_std / (2 * config.layers) ** 0.5)
        self.attention_norm = RMSNorm(config.features, eps=config.norm_eps, dtype=dtype)
        self.attention = GroupedAttention(
            config.features,
            heads=config.heads,
            kv_heads=config.groups,
            head_dim=config.dim,
            bias=config.attention_bias,
            init=init,
            out_init=out_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(config.features, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(
            config.features, config.hidden, bias=config.mlp_bias, init=init, out_init=out_init, dtype=dtype, rngs=rngs
        )

    def __call__(self, layer: int, x: jax.Array, table: RopeTable, mixer: Any) -> tuple[jax.Array, Any]:
        """Return the residual stream ``[tokens, features]`` after the block, and the mixer."""
        mixed, mixer = self.attention(layer, self.attention_norm(x), table, mixer)
        x = constrain(x + mixed, "tokens", "embed")
        return constrain(x + self.mlp(self.mlp_norm(x)), "tokens", "embed"), mixer


class Llama(nnx.Module):
    """A Llama; meets `dovetail_protocols.LanguageModel`.

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
    """

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        init = nnx.initializers.normal(config.init_std)
        shape = (config.vocab_size, config.features)
        self.embedding = parameter(rngs, shape, ("vocab", "embed"), init, param_dtype)
        self.layers = nnx.List([LlamaBlock(config, dtype=param_dtype, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config.features, eps=config.norm_eps, dtype=param_dtype)
        if not config.tied:
            self.head = parameter(rngs, shape[::-1], ("embed", "vocab"), init, param_dtype)

    def hidden(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        mixer: Any,
        *,
        embeds: Float[Array, "tokens features"] | None = None,
    ) -> tuple[Float[Array, "tokens features"], Auxiliary, Any]:
        """See `dovetail_protocols.LanguageModel.hidden`."""
        x = (take(self.embedding.get_value(), tokens) if embeds is None else embeds).astype(self.dtype)
        x = constrain(x, "tokens", "embed")
        frequencies, factor = rope_frequencies(self.config.dim, self.config.rope_theta, self.config.rope_scaling)
        table = rope_table(positions, frequencies, factor=factor)
        for i, layer in enumerate(self.layers):
            x, mixer = layer(i, x, table, mixer)
        return self.norm(x), {}, mixer

    def unembedding(self) -> tuple[Any, None, None]:
        """Return ``(W[features, vocab], None, None)``."""
        if not self.config.tied:
            return self.head.get_value(), None, None
        return jax.tree.map(jnp.transpose, self.embedding.get_value()), None, None

    def unembed(self, hidden: Float[Array, "tokens features"]) -> Float[Array, "tokens vocab"]:
        """Return the logits in float32."""
        weight, _, _ = self.unembedding()
        return constrain(einsum("td,dv->tv", hidden, weight).astype(jnp.float32), "tokens", "vocab")

    def cache_specs(self) -> tuple[FullCache, ...]:
        """Every layer attends to all earlier tokens."""
        config = self.config
        return (FullCache(config.groups, config.dim, config.dim),) * config.layers
