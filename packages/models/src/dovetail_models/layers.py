"""Layers that families share. Activations are tokens-major, ``[tokens, features]``; weights are ``[in, ..., out]``.

Inside `dovetail_runtime.use` activations are constrained by the names ``tokens``, ``embed``, ``heads``, ``kv_heads``,
``mlp`` and ``vocab``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dovetail_kernels import (
    Activation,
    RopeScaling,
    RopeTable,
    einsum,
    gated_linear_unit,
    layer_norm,
    rms_norm,
    rope,
    rope_frequencies,
    rope_table,
)
from dovetail_protocols import CacheSpec, FullCache, LayerIndex, WindowCache
from dovetail_runtime import constrain

__all__ = [
    "ACTIVATION_FUNCTIONS",
    "MLP",
    "GatedMLP",
    "GroupedAttention",
    "Initializer",
    "LayerNorm",
    "PlainActivation",
    "RMSNorm",
    "Rotary",
    "Tables",
    "exact",
    "leading_axes",
    "logits_dtype",
    "parameter",
    "without_values",
]

PlainActivation: TypeAlias = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
"""What is applied to hidden features; "gelu" is the exact one."""

ACTIVATION_FUNCTIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def exact(x: Any) -> Any:
    """Return the dtype of logits, gates and routers of activations: float32, or float64 for float64."""
    return jnp.dtype("float64" if x.dtype == jnp.dtype("float64") else "float32")


def logits_dtype(dtype: Any) -> Any:
    """Return the dtype of logits that was asked for.

    Raises:
        ValueError: it is no floating-point dtype.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"output_dtype={dtype}; expected a floating-point dtype")
    return jnp.dtype(dtype)


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Initializer,
    dtype: Any,
    inputs: int = 0,
    *,
    table: bool = False,
) -> Any:
    """Make a parameter.

    Args:
        rngs: where the initial values come from.
        shape: lengths of its axes.
        axes: their logical names.
        init: of the values.
        dtype: of the values.
        inputs: so many axes, the first ones or those after ``experts``, are what a product sums over; 0 for what is
            looked up, added, or multiplied elementwise. See `dovetail_models.maximal_update`.
        table: its rows are looked up, with `dovetail_kernels.take` alone.
    """
    value = jnp.zeros(shape, dtype) if isinstance(rngs, _NoValues) else init(rngs.params(), shape, dtype)
    return nnx.Param(value, axes=axes, inputs=inputs, table=table)


class _NoValues(nnx.Rngs):
    """Random numbers that nobody draws: tracing initial values takes longer than all else of an abstract model."""


def without_values(model: Callable[..., Any], config: Any, **options: Any) -> Any:
    """Return ``model(config, **options)`` with ``jax.ShapeDtypeStruct`` parameters; nothing is computed."""
    return nnx.eval_shape(lambda: model(config, rngs=_NoValues(0), **options))


def leading_axes(axes: tuple[str | None, ...], inputs: int) -> int:
    """Return how many first axes of a parameter are those of layers and experts, which nothing sums over."""
    return sum(name in ("layers", "experts") for name in axes[: len(axes) - inputs]) if inputs else 0


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary embeddings; layers with equal ones share a table.

    Attributes:
        dim: features per head that are rotated, the first ones; even.
        theta: base of the wavelengths.
        scaling: how a longer context is reached.
        length: of the longest sequence, which some scalings depend on; see `dovetail_kernels.rope_frequencies`.
    """

    dim: int
    theta: float = 10000.0
    scaling: RopeScaling | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        self._frequencies()

    def _frequencies(self) -> tuple[Any, float]:
        return rope_frequencies(self.dim, self.theta, self.scaling, length=self.length)

    def table(self, positions: Int[Array, " tokens"]) -> RopeTable:
        """Return cosines and sines of the positions."""
        frequencies, factor = self._frequencies()
        return rope_table(positions, frequencies, factor=factor)


Tables: TypeAlias = Mapping[Rotary, RopeTable]


class RMSNorm(nnx.Module):
    """`dovetail_kernels.rms_norm` with a weight, over the last axis or, with a weight of several, over as many.

    Args:
        shape: of the weight.
        axes: logical names of its axes.
        eps: added to the mean square.
        offset: what the weight is stored less of; 1 in Gemma's models, whose weights begin at 0.
        dtype: of the weight.
    """

    def __init__(
        self,
        *shape: int,
        axes: tuple[str | None, ...] = ("embed",),
        eps: float,
        offset: float = 0.0,
        dtype: Any = jnp.float32,
    ) -> None:
        self.weight = nnx.Param(jnp.full(shape, 1 - offset, dtype), axes=axes)
        self.eps, self.offset = eps, offset

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        """Normalise each token."""
        weight = self.weight.get_value()
        flat = x.reshape(*x.shape[: x.ndim - weight.ndim], weight.size)
        return rms_norm(flat, weight.reshape(-1), weight_offset=self.offset, eps=self.eps).reshape(x.shape)


class LayerNorm(nnx.Module):
    """`dovetail_kernels.layer_norm` with a weight and a bias, over the last axis.

    Args:
        features: length of the axis.
        eps: added to the variance.
        dtype: of weight and bias.
    """

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones(features, dtype), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros(features, dtype), axes=("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "*tokens features"]) -> Float[Array, "*tokens features"]:
        """Normalise each token."""
        return layer_norm(x, self.weight.get_value(), self.bias.get_value(), eps=self.eps)


class GroupedAttention(nnx.Module):
    """Attention with grouped key-value heads; the mixer does the mixing.

    Args:
        features: width of the residual stream.
        heads: query heads.
        kv_heads: key-value heads, a divisor of `heads`.
        head_dim: features per head.
        rotary: turns queries and keys, or as many of their first features; None leaves positions to the mask.
        bias: of queries, keys and values.
        out_bias: of the output.
        norm: root mean squares of queries and keys: of each head, or of all heads together; None for none.
        norm_eps: added to them.
        norm_offset: see `RMSNorm`.
        window: how many last tokens a token sees; None for all.
        softcap: of the logits, see `dovetail_kernels.attention`.
        sinks: each head has a logit that takes part in the softmax only.
        gated: what each head gives is multiplied by the sigmoid of a projection of the token.
        scale: of the logits; None for ``head_dim ** -0.5``.
        init: of the weights.
        out_init: of the output's.
        dtype: of the parameters.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rotary: Rotary | None,
        bias: bool = False,
        out_bias: bool = False,
        norm: Literal["head", "all"] | None = None,
        norm_eps: float = 1e-6,
        norm_offset: float = 0.0,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        gated: bool = False,
        scale: float | None = None,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        zeros = nnx.initializers.zeros
        for name, count, axis in (
            ("query", heads, "heads"),
            ("key", kv_heads, "kv_heads"),
            ("value", kv_heads, "kv_heads"),
            *((("gate", heads, "heads"),) if gated else ()),
        ):
            setattr(self, name, parameter(rngs, (features, count, head_dim), ("embed", axis, None), init, dtype, 1))
            if bias:
                setattr(self, f"{name}_bias", parameter(rngs, (count, head_dim), (axis, None), zeros, dtype))
            if norm is not None and name in ("query", "key"):
                shape, axes = ((head_dim,), (None,)) if norm == "head" else ((count, head_dim), (axis, None))
                made = RMSNorm(*shape, axes=axes, eps=norm_eps, offset=norm_offset, dtype=dtype)
                setattr(self, f"{name}_norm", made)
        self.out = parameter(rngs, (heads, head_dim, features), ("heads", None, "embed"), out_init, dtype, 2)
        if out_bias:
            self.out_bias = parameter(rngs, (features,), ("embed",), zeros, dtype)
        if sinks:
            self.sinks = parameter(rngs, (heads,), ("heads",), init, dtype)
        self.has_sinks, self.gated = sinks, gated
        self.bias, self.has_out_bias, self.normed = bias, out_bias, norm is not None
        self.rotary, self.window, self.softcap = rotary, window, softcap
        self.scale = head_dim**-0.5 if scale is None else scale
        self.kv_heads, self.head_dim = kv_heads, head_dim

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        y = einsum("td,dhk->thk", x, getattr(self, name).get_value())
        y = y + getattr(self, f"{name}_bias").get_value().astype(y.dtype) if self.bias else y
        return constrain(y, "tokens", "heads" if name in ("query", "gate") else "kv_heads", None)

    def _placed(self, name: str, x: jax.Array, tables: Tables) -> jax.Array:
        y = self._project(name, x)
        y = getattr(self, f"{name}_norm")(y) if self.normed else y
        return y if self.rotary is None else rope(y, tables[self.rotary], rotated=self.rotary.dim)

    def __call__(
        self, layer: LayerIndex, x: Float[Array, "tokens features"], tables: Tables, mixer: Any
    ) -> tuple[Any, Any]:
        """Return the attention output ``[tokens, features]`` and the mixer."""
        query, key = (checkpoint_name(self._placed(name, x, tables), name) for name in ("query", "key"))
        value = checkpoint_name(self._project("value", x), "value")
        sinks = self.sinks.get_value() if self.has_sinks else None
        mixed, mixer = mixer.attend(
            layer, query, key, value, scale=self.scale, window=self.window, softcap=self.softcap, sinks=sinks
        )
        if self.gated:
            mixed = mixed * jax.nn.sigmoid(self._project("gate", x).astype(exact(x))).astype(mixed.dtype)
        mixed = checkpoint_name(constrain(mixed, "tokens", "heads", None), "attention")
        y = einsum("thk,hkd->td", mixed, self.out.get_value())
        return (y + self.out_bias.get_value().astype(y.dtype) if self.has_out_bias else y), mixer

    def cache_spec(self) -> CacheSpec:
        """Return what the mixer must remember."""
        sizes = self.kv_heads, self.head_dim, self.head_dim
        return FullCache(*sizes) if self.window is None else WindowCache(*sizes, self.window)


class GatedMLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))`` (Shazeer, arXiv:2002.05202); see `dovetail_kernels.gated_linear_unit`."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: Activation = "silu",
        bias: bool = False,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        zeros = nnx.initializers.zeros
        self.gate = parameter(rngs, (features, hidden), ("embed", "mlp"), init, dtype, 1)
        self.up = parameter(rngs, (features, hidden), ("embed", "mlp"), init, dtype, 1)
        self.down = parameter(rngs, (hidden, features), ("mlp", "embed"), out_init, dtype, 1)
        if bias:
            self.gate_bias = parameter(rngs, (hidden,), ("mlp",), zeros, dtype)
            self.up_bias = parameter(rngs, (hidden,), ("mlp",), zeros, dtype)
            self.down_bias = parameter(rngs, (features,), ("embed",), zeros, dtype)
        self.activation: Activation = activation
        self.bias = bias

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        """Transform each token."""
        biases = (self.gate_bias.get_value(), self.up_bias.get_value()) if self.bias else (None, None)
        h = gated_linear_unit(
            x, self.gate.get_value(), self.up.get_value(), activation=self.activation,
            gate_bias=biases[0], up_bias=biases[1],
        )  # fmt: skip
        h = checkpoint_name(constrain(h, "tokens", "mlp"), "mlp")
        y = einsum("tf,fd->td", h, self.down.get_value())
        return y + self.down_bias.get_value().astype(y.dtype) if self.bias else y


class MLP(nnx.Module):
    """``down(activation(up(x)))``.

    Args:
        features: width of the residual stream.
        hidden: width inside.
        activation: of the hidden units; "gelu" is the exact one.
        bias: of both products.
        init: of the weights.
        out_init: of the last one's; None for `init`.
        dtype: of the parameters.
        rngs: where the initial weights come from.
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        activation: PlainActivation,
        bias: bool = True,
        init: Initializer,
        out_init: Initializer | None = None,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.up = parameter(rngs, (features, hidden), ("embed", "mlp"), init, dtype, 1)
        self.down = parameter(rngs, (hidden, features), ("mlp", "embed"), out_init or init, dtype, 1)
        if bias:
            self.up_bias = parameter(rngs, (hidden,), ("mlp",), nnx.initializers.zeros, dtype)
            self.down_bias = parameter(rngs, (features,), ("embed",), nnx.initializers.zeros, dtype)
        self.activation, self.bias = activation, bias

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        """Transform each token."""
        h = einsum("td,df->tf", x, self.up.get_value())
        h = h + self.up_bias.get_value().astype(h.dtype) if self.bias else h
        h = checkpoint_name(ACTIVATION_FUNCTIONS[self.activation](constrain(h, "tokens", "mlp")), "mlp")
        y = einsum("tf,fd->td", h, self.down.get_value())
        return y + self.down_bias.get_value().astype(y.dtype) if self.bias else y
