"""Decoder: what families of decoders share, from the embedding to the logits around the layers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dovetail_kernels import RopeScaling, einsum, take
from dovetail_models.layers import (
    GroupedAttention,
    Initializer,
    LayerNorm,
    RMSNorm,
    Rotary,
    Tables,
    exact,
    logits_dtype,
    parameter,
)
from dovetail_models.remat import Remat, remat_policy
from dovetail_models.stack import Stack, run_layers
from dovetail_protocols import Auxiliary, CacheSpec, LayerIndex
from dovetail_runtime import constrain

__all__ = ["Block", "Decoder", "DecoderConfig", "StackConfig"]

Norm: TypeAlias = RMSNorm | LayerNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Sizes and options of any stack of layers between an embedding and logits.

    Attributes:
        vocab_size: tokens.
        features: width of the residual stream.
        layers: blocks.
        norm_eps: added to the mean square in the norms.
        tied: the unembedding is the embedding.
        init_std: standard deviation of the initial weights; that of the last product of a block is smaller by the root
            of twice the number of layers.
    """

    vocab_size: int
    features: int
    layers: int
    norm_eps: float = 1e-5
    tied: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "features", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("norm_eps", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number of at least 0")

    @property
    def init(self) -> Initializer:
        """How weights begin."""
        return nnx.initializers.normal(self.init_std)

    @property
    def out_init(self) -> Initializer:
        """How the last weights of attention and MLP begin."""
        return nnx.initializers.normal(self.init_std / (2 * self.layers) ** 0.5)

    @property
    def norm_offset(self) -> float:
        """See `RMSNorm`."""
        return 0.0

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied with."""
        return 1.0

    @property
    def logit_softcap(self) -> float | None:
        """Logits become ``cap * tanh(logits / cap)``."""
        return None

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """Return the fields that change where these layers, in this order, become the layers; see `repeat_layers`.

        A family that tells its layers apart adds the fields that do.
        """
        return {"layers": len(order)}

    def norm(self, dtype: Any) -> Norm:
        """Return a norm of the residual stream."""
        return RMSNorm(self.features, eps=self.norm_eps, offset=self.norm_offset, dtype=dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """Sizes and options that families of decoders with attention share; see `StackConfig` for the others.

    Attributes:
        hidden: width of the MLP.
        heads: query heads.
        kv_heads: key-value heads, a divisor of `heads`; None for `heads`.
        head_dim: features per head; None for ``features // heads``.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: how a longer context is reached.
        max_position: the context length the model is meant for (written to config.json, not enforced).
    """

    hidden: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 2048
    divided: ClassVar[bool] = True
    """Heads share the features where they have no size of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "heads", "max_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.divided and self.head_dim is None and self.features % self.heads:
            raise ValueError(f"features={self.features} is no multiple of heads={self.heads}; set head_dim")
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads}; expected a divisor of heads={self.heads}")
        self.rotary()

    @property
    def dim(self) -> int:
        """Features per head."""
        return self.features // self.heads if self.head_dim is None else self.head_dim

    @property
    def groups(self) -> int:
        """Key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    def rotary(self) -> Rotary:
        """Return the rotary embeddings of most layers."""
        return Rotary(self.dim, self.rope_theta, self.rope_scaling)

    def attention(self, **options: Any) -> GroupedAttention:
        """Return a layer's attention: of these sizes, with these rotary embeddings, its norms as those of the stream.

        Args:
            options: of `GroupedAttention`, and what `Decoder.block` is given.
        """
        sizes = {"heads": self.heads, "kv_heads": self.groups, "head_dim": self.dim}
        usual: dict[str, Any] = {"rotary": self.rotary(), "norm_eps": self.norm_eps, "norm_offset": self.norm_offset}
        return GroupedAttention(self.features, **sizes, **usual | options)


class Block(nnx.Module):
    """Attention and MLP, each added to the residual stream.

    Auxiliary values are a dict ``{name: (sum, weight)}`` of scalars: those of all layers add up by name.

    Args:
        config: sizes and options.
        attention: see `GroupedAttention`.
        mlp: see `GatedMLP`; one with ``routes = True`` is called as `dovetail_models.SparseMLP` is.
        before: each takes a normalised copy of the residual stream.
        after: what each gives is normalised.
        dtype: of the norms' weights.
    """

    attention_norm: Norm
    attention_out_norm: Norm
    mlp_norm: Norm
    mlp_out_norm: Norm

    def __init__(
        self,
        config: StackConfig,
        attention: Any,
        mlp: Any,
        *,
        before: bool = True,
        after: bool = False,
        dtype: Any,
    ) -> None:
        self.attention, self.mlp = attention, mlp
        self.before, self.after = before, after
        for name in ("attention", "mlp"):
            if before:
                setattr(self, f"{name}_norm", config.norm(dtype))
            if after:
                setattr(self, f"{name}_out_norm", config.norm(dtype))

    def __call__(self, layer: LayerIndex, x: jax.Array, tables: Tables, mixer: Any) -> tuple[jax.Array, Auxiliary, Any]:
        """Return the residual stream ``[tokens, features]`` after the block, its auxiliary values, and the mixer."""
        mixed, mixer = self.attention(layer, self.attention_norm(x) if self.before else x, tables, mixer)
        mixed = checkpoint_name(mixed, "attention_out")
        x = constrain(x + (self.attention_out_norm(mixed) if self.after else mixed), "residual", "embed")
        y, aux, mixer = self.transform(layer, self.mlp_norm(x) if self.before else x, mixer)
        y = checkpoint_name(y, "mlp_out")
        return constrain(x + (self.mlp_out_norm(y) if self.after else y), "residual", "embed"), aux, mixer

    def transform(self, layer: LayerIndex, x: jax.Array, mixer: Any) -> tuple[jax.Array, Auxiliary, Any]:
        """Return what the MLP makes of each token, its auxiliary values, none if it is a plain one, and the mixer."""
        return self.mlp(layer, x, mixer) if getattr(self.mlp, "routes", False) else (self.mlp(x), {}, mixer)


class Decoder(nnx.Module):
    """An embedding, layers, a norm and the logits; meets `dovetail_protocols.LanguageModel`. A family has its `block`.

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
        output_dtype: dtype of the logits that `unembed` returns; they are computed in float32 (float64 for float64).
        scan: layers that repeat each other are a `Stack`: compiled once, with stacked parameters.
        remat: what the backward pass keeps of each layer: a `Remat` or the name of one, see `POLICIES`; None for all.

    Raises:
        ValueError: `scan` without layers that repeat, an unknown `remat`, or an `output_dtype` that is no float.
    """

    config: Any

    def __init__(
        self,
        config: Any,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
        output_dtype: Any = jnp.float32,
        scan: bool = False,
        remat: str | Remat | None = None,
    ) -> None:
        self.config, self.remat = config, remat_policy(remat)
        self.vocab_size = config.vocab_size
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        self.output_dtype = logits_dtype(output_dtype)
        shape = (config.vocab_size, config.features)
        self.embedding = parameter(rngs, shape, ("vocab", "embed"), config.init, param_dtype, table=True)
        weights = {"init": config.init, "out_init": config.out_init, "dtype": param_dtype, "rngs": rngs}
        layers = [self.block(config, i, **weights) for i in range(config.layers)]
        self.layers = Stack(layers) if scan else nnx.List(layers)
        self.norm = config.norm(param_dtype)
        if not config.tied:
            self.head = parameter(rngs, shape[::-1], ("embed", "vocab"), config.init, param_dtype, 1)

    @staticmethod
    def block(config: Any, index: int, **weights: Any) -> Any:
        """Return the layer of an index: a module with ``attention``, called as `Block` is.

        Args:
            config: sizes and options.
            index: of the layer.
            weights: `init`, `out_init`, `dtype` and `rngs`, as the layers take them.
        """
        raise NotImplementedError

    def hidden(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        mixer: Any,
        *,
        embeds: Float[Array, "tokens features"] | None = None,
    ) -> tuple[Float[Array, "tokens features"], Auxiliary, Any]:
        """See `dovetail_protocols.LanguageModel.hidden`."""
        x = self.embed(tokens) if embeds is None else embeds.astype(self.dtype)
        x = constrain(self.placed(x, positions), "residual", "embed")
        kinds = dict.fromkeys(layer.attention.rotary for layer in self.layers)
        tables = {rotary: rotary.table(positions) for rotary in kinds if rotary is not None}
        x, total, mixer = run_layers(self.layers, x, tables, mixer, self.remat)
        return self.norm(x), total, mixer

    def placed(
        self, x: Float[Array, "tokens features"], positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens features"]:
        """Return what the layers begin with; a family whose embeddings tell positions adds them here."""
        del positions
        return x

    def embed(self, tokens: Int[Array, " tokens"]) -> Float[Array, "tokens features"]:
        """Return the embeddings of tokens, scaled: the `embeds` that `hidden` takes where it is given none."""
        x, scale = take(self.embedding.get_value(), tokens).astype(self.dtype), self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, self.dtype)

    def unembedding(self) -> tuple[Any, None, float | None]:
        """Return ``(W[features, vocab], None, soft cap or None)``."""
        if not self.config.tied:
            return self.head.get_value(), None, self.config.logit_softcap
        return self.embedding.get_value().T, None, self.config.logit_softcap

    def unembed(self, hidden: Float[Array, "tokens features"]) -> Float[Array, "tokens vocab"]:
        """Return the logits, of the dtype that was asked for."""
        weight, _, cap = self.unembedding()
        logits = einsum("td,dv->tv", hidden, weight, dtype=exact(hidden))
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return constrain(logits.astype(self.output_dtype), "tokens", "vocab")

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Return what each layer's attention must remember."""
        return tuple(layer.attention.cache_spec() for layer in self.layers)
