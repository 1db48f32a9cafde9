"""Layers that families share. Activations are tokens-major, ``[tokens, features]``; weights are ``[in, ..., out]``.

Inside `dovetail_runtime.use` activations are constrained by the names ``tokens``, ``embed``, ``heads``, ``kv_heads``,
``mlp`` and ``vocab``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dovetail_kernels import RopeTable, einsum, rms_norm, rope
from dovetail_runtime import constrain

__all__ = ["GatedMLP", "GroupedAttention", "Initializer", "RMSNorm", "parameter"]

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


def parameter(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer, dtype: Any
) -> Any:
    """Make a parameter with one logical axis name per dimension."""
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


class RMSNorm(nnx.Module):
    """`dovetail_kernels.rms_norm` with a weight."""

    def __init__(self, features: int, *, eps: float, dtype: Any = jnp.float32) -> None:
        self.weight = nnx.Param(jnp.ones((features,), dtype), axes=("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        """Normalise each token."""
        return rms_norm(x, self.weight.get_value(), eps=self.eps)


class GroupedAttention(nnx.Module):
    """Rotary attention with grouped key-value heads; the mixer does the mixing."""

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
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
        ):
            setattr(self, name, parameter(rngs, (features, count, head_dim), ("embed", axis, None), init, dtype))
            if bias:
                setattr(self, f"{name}_bias", parameter(rngs, (count, head_dim), (axis, None), zeros, dtype))
        self.out = parameter(rngs, (heads, head_dim, features), ("heads", None, "embed"), out_init, dtype)
        if bias:
            self.out_bias = parameter(rngs, (features,), ("embed",), zeros, dtype)
        self.bias = bias
        self.scale = head_dim**-0.5

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        y = einsum("td,dhk->thk", x, getattr(self, name).get_value())
        y = y + getattr(self, f"{name}_bias").get_value().astype(y.dtype) if self.bias else y
        return constrain(y, "tokens", "heads" if name == "query" else "kv_heads", None)

    def __call__(self, layer: int, x: Float[Array, "tokens features"], table: RopeTable, mixer: Any) -> tuple[Any, Any]:
        """Return the attention output ``[tokens, features]`` and the mixer."""
        query, key = rope(self._project("query", x), table), rope(self._project("key", x), table)
        mixed, mixer = mixer.attend(layer, query, key, self._project("value", x), scale=self.scale)
        y = einsum("thk,hkd->td", constrain(mixed, "tokens", "heads", None), self.out.get_value())
        return (y + self.out_bias.get_value().astype(y.dtype) if self.bias else y), mixer


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv:2002.05202)."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        bias: bool,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        zeros = nnx.initializers.zeros
        self.gate = parameter(rngs, (features, hidden), ("embed", "mlp"), init, dtype)
        self.up = parameter(rngs, (features, hidden), ("embed", "mlp"), init, dtype)
        self.down = parameter(rngs, (hidden, features), ("mlp", "embed"), out_init, dtype)
        if bias:
            self.gate_bias = parameter(rngs, (hidden,), ("mlp",), zeros, dtype)
            self.up_bias = parameter(rngs, (hidden,), ("mlp",), zeros, dtype)
            self.down_bias = parameter(rngs, (features,), ("embed",), zeros, dtype)
        self.bias = bias

    def _linear(self, name: str, spec: str, x: jax.Array) -> jax.Array:
        y = einsum(spec, x, getattr(self, name).get_value())
        return y + getattr(self, f"{name}_bias").get_value().astype(y.dtype) if self.bias else y

    def __call__(self, x: Float[Array, "tokens features"]) -> Float[Array, "tokens features"]:
        """Transform each token."""
        h = jax.nn.silu(self._linear("gate", "td,df->tf", x)) * self._linear("up", "td,df->tf", x)
        return self._linear("down", "tf,fd->td", constrain(h, "tokens", "mlp"))
