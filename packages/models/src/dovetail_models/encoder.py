"""What families of encoders share: layers that see a whole row, around embeddings of tokens or of patches.

Rows go in and out as ``[batch, time, features]``, which is what users of an encoder hold; inside, activations are
tokens-major as in decoders, so that both use the same layers. An encoder keeps no cache: its mixer is `Bidirectional`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float

from dovetail_kernels import attention, einsum, segments
from dovetail_models.layers import (
    ACTIVATION_FUNCTIONS,
    MLP,
    GroupedAttention,
    Initializer,
    LayerNorm,
    PlainActivation,
    parameter,
)
from dovetail_protocols import LayerIndex
from dovetail_runtime import constrain

__all__ = ["Bidirectional", "EncoderBlock", "EncoderConfig", "Linear", "encode"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes and options that families of encoders share.

    Attributes:
        features: width of the residual stream.
        hidden: width of the MLP.
        layers: blocks.
        heads: of the attention, a divisor of `features`.
        activation: of the MLP.
        norm_eps: added to the variance in the norms.
        init_std: standard deviation of the initial weights.
    """

    features: int
    hidden: int
    layers: int
    heads: int
    activation: PlainActivation = "gelu"
    norm_eps: float = 1e-12
    init_std: float = 0.02
    divided: ClassVar[bool] = True
    """Heads share the features."""

    def __post_init__(self) -> None:
        for name in ("features", "hidden", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("norm_eps", "init_std"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number of at least 0")
        if self.divided and self.features % self.heads:
            raise ValueError(f"features={self.features} is no multiple of heads={self.heads}")
        if self.activation not in ACTIVATION_FUNCTIONS:
            raise ValueError(f"activation={self.activation!r}; expected one of {list(ACTIVATION_FUNCTIONS)}")

    @property
    def dim(self) -> int:
        """Features per head."""
        return self.features // self.heads

    @property
    def init(self) -> Initializer:
        """How weights begin."""
        return nnx.initializers.normal(self.init_std)

    def rearranged(self, order: Sequence[int]) -> dict[str, Any]:
        """Return the fields that change where these layers, in this order, become the layers; see `repeat_layers`."""
        return {"layers": len(order)}

    def norm(self, dtype: Any) -> "LayerNorm":
        """Return a norm of the residual stream."""
        return LayerNorm(self.features, eps=self.norm_eps, dtype=dtype)

    def block(self, *, before: bool, bias: bool = True, **weights: Any) -> "EncoderBlock":
        """Return a layer with norms before or after, and biases of queries, keys and values or none."""
        attention = GroupedAttention(
            self.features,
            heads=self.heads,
            kv_heads=self.heads,
            head_dim=self.dim,
            rotary=None,
            bias=bias,
            out_bias=True,
            out_init=weights["init"],
            **weights,
        )
        mlp = MLP(self.features, self.hidden, activation=self.activation, **weights)
        norms = self.norm(weights["dtype"]), self.norm(weights["dtype"])
        return EncoderBlock(attention, mlp, norms, before=before)


class Linear(nnx.Module):
    """``x weight + bias``, of axes that have the given logical names, in the dtype of `x` or the one that is given."""

    def __init__(
        self, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, init: Any, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.weight = parameter(rngs, (inputs, outputs), axes, init, dtype, 1)
        self.bias = parameter(rngs, (outputs,), axes[1:], nnx.initializers.zeros, dtype)

    def __call__(self, x: Float[Array, "tokens inputs"], dtype: Any = None) -> Float[Array, "tokens outputs"]:
        """Transform each token."""
        y = einsum("td,df->tf", x, self.weight.get_value(), dtype=dtype)
        return y + self.bias.get_value().astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """Attention between all tokens of a row (and segment) of a ``[batch, time]`` batch.

    Attributes:
        segment_ids: int ``[batch, time]``, 0 for padding, or None where every row is one segment.
        bias: of the logits, ``[1, heads, time, time]``, or None.
        batch: rows.
        time: tokens per row.
    """

    segment_ids: Any
    bias: Any
    batch: int = dataclasses.field(metadata={"static": True})
    time: int = dataclasses.field(metadata={"static": True})
    per_layer: ClassVar[bool] = False

    def attend(
        self,
        layer: LayerIndex,
        query: Float[Array, "tokens heads key_dim"],
        key: Float[Array, "tokens kv_heads key_dim"],
        value: Float[Array, "tokens kv_heads value_dim"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "Bidirectional"]:
        """Attend within rows; `layer` does not matter.

        Raises:
            ValueError: `window` is not None: windows look back only.
        """
        del layer
        if window is not None:
            raise ValueError(f"window={window}; expected None, since all tokens of a row see each other")
        q, k, v = (x.reshape(self.batch, self.time, *x.shape[1:]) for x in (query, key, value))
        mask = None if self.segment_ids is None else segments(self.segment_ids)
        out = attention(q, k, v, mask, bias=self.bias, sinks=sinks, softcap=softcap, scale=scale)
        return out.reshape(-1, *out.shape[2:]), self


class EncoderBlock(nnx.Module):
    """Attention and MLP, each added to the residual stream, with a norm before each or after each sum.

    Args:
        attention: see `GroupedAttention`.
        mlp: a module of ``[tokens, features]``.
        norms: that of the attention and that of the MLP.
        before: what goes into attention and MLP is normalised; else the sums are.
    """

    def __init__(self, attention: Any, mlp: Any, norms: tuple[Any, Any], *, before: bool) -> None:
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = norms
        self.before = before

    def __call__(
        self, layer: LayerIndex, x: Float[Array, "tokens features"], mixer: Any
    ) -> Float[Array, "tokens features"]:
        """Return the residual stream after the block."""
        mixed, _ = self.attention(layer, self.attention_norm(x) if self.before else x, {}, mixer)
        x = constrain(x + mixed, "residual", "embed")
        x = x if self.before else self.attention_norm(x)
        x = constrain(x + self.mlp(self.mlp_norm(x) if self.before else x), "residual", "embed")
        return x if self.before else self.mlp_norm(x)


def encode(
    layers: Any, x: Float[Array, "batch time features"], segment_ids: Any = None, bias: Any = None
) -> Float[Array, "batch time features"]:
    """Return the rows after all layers; `segment_ids` and `bias` are those of `Bidirectional`.

    Raises:
        ValueError: `segment_ids` are not ``[batch, time]``.
    """
    batch, time, features = x.shape
    if segment_ids is not None and segment_ids.shape != (batch, time):
        raise ValueError(f"segment_ids have shape {segment_ids.shape}; expected {(batch, time)}")
    mixer, flat = Bidirectional(segment_ids, bias, batch, time), x.reshape(-1, features)
    for i, layer in enumerate(layers):
        flat = layer(i, flat, mixer)
    return flat.reshape(batch, time, features)
