"""GatedDeltaNet: linear attention by the gated delta rule behind short convolutions (Yang et al., arXiv:2412.06464)."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import (
    causal_conv1d,
    causal_conv1d_step,
    einsum,
    gated_delta_rule,
    gated_delta_step,
    gated_product,
)
from dovetail_models.layers import Initializer, RMSNorm, Tables, parameter
from dovetail_models.recurrent import TAPS, conv_state, convolved
from dovetail_protocols import RecurrentCache
from dovetail_runtime import constrain

__all__ = ["DeltaRecurrence", "GatedDeltaNet"]

LENGTH_EPS = 1e-6
"""Added to the squared lengths of queries and keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaRecurrence:
    """Convolutions and `dovetail_kernels.gated_delta_rule`; meets `dovetail_protocols.Recurrence`.

    It takes ``query[..., key_heads * key_dim]``, ``key`` likewise, ``value[..., heads * value_dim]``, and logits of
    decay and strength ``[..., heads]``, and gives ``[..., heads * value_dim]``.

    Attributes:
        conv: ``[channels, width]`` by name, of ``query``, ``key`` and ``value``.
        dt_bias: ``[heads]``, added to the logits of the decay before the softplus.
        a_log: ``[heads]``, logarithms of the rates.
        key_heads: heads of queries and keys, a divisor of the heads.
    """

    conv: dict[str, Any]
    dt_bias: Any
    a_log: Any
    key_heads: int = dataclasses.field(metadata={"static": True})

    def cache_spec(self) -> RecurrentCache:
        """See `dovetail_protocols.Recurrence`."""
        heads = len(self.a_log)
        rule = heads, len(self.conv["key"]) // self.key_heads, len(self.conv["value"]) // heads
        return RecurrentCache((*conv_state(self.conv).items(), ("rule", rule)))

    def chunk(
        self,
        state: Mapping[str, Any],
        inputs: tuple[Float[Array, "rows time _"], ...],
        segment_ids: Int[Array, "rows time"] | None,
    ) -> tuple[Float[Array, "rows time _"], Mapping[str, Any]]:
        """See `dovetail_protocols.Recurrence`."""
        forms = (functools.partial(form, segment_ids=segment_ids) for form in (causal_conv1d, gated_delta_rule))
        return self._run(state, inputs, *forms)

    def step(
        self, state: Mapping[str, Any], inputs: tuple[Float[Array, "rows _"], ...]
    ) -> tuple[Float[Array, "rows _"], Mapping[str, Any]]:
        """See `dovetail_protocols.Recurrence`."""
        return self._run(state, inputs, causal_conv1d_step, gated_delta_step)

    def _run(
        self, state: Mapping[str, Any], inputs: tuple[Any, ...], convolve: Callable[..., Any], rule: Callable[..., Any]
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        *mixed, decay, strength = inputs
        given: dict[str, Any] = dict(zip(("query", "key", "value"), mixed, strict=True))
        parts, after = convolved(convolve, state, given, self.conv, {})
        counts = {"query": self.key_heads, "key": self.key_heads, "value": len(self.a_log)}
        query, key, value = (parts[n].reshape(*parts[n].shape[:-1], count, -1) for n, count in counts.items())
        steps = jax.nn.softplus(decay.astype(jnp.float32) + self.dt_bias.astype(jnp.float32))
        log_decay = -jnp.exp(self.a_log.astype(jnp.float32)) * steps
        beta = jax.nn.sigmoid(strength.astype(jnp.float32))
        out, after["rule"] = rule(_unit(query), _unit(key), value, log_decay, beta, state=state["rule"])
        return out.reshape(given["value"].shape), after


def _unit(x: jax.Array) -> jax.Array:
    """Return vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + LENGTH_EPS)


class GatedDeltaNet(nnx.Module):
    """Projections around a `DeltaRecurrence`, with a norm of each head and a gate behind it; the mixer runs it.

    Args:
        features: width of the residual stream.
        key_heads: heads of queries and keys.
        value_heads: heads of values and of the state, a multiple of `key_heads`.
        key_dim: features of a query or key.
        value_dim: features of a value.
        width: tokens that a convolution sees.
        norm_eps: added to the mean squares.
        init: of the weights.
        out_init: of the output's.
        dtype: of the parameters.
        rngs: where the initial weights come from.
    """

    rotary = None

    def __init__(
        self,
        features: int,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        width: int,
        norm_eps: float,
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        share = value_heads // key_heads
        sizes = {"query": key_dim, "key": key_dim, "value": share * value_dim, "gate": share * value_dim}
        for name, size in (sizes | {"strength": share, "decay": share}).items():
            axes = "embed", "heads", None
            setattr(self, f"in_{name}", parameter(rngs, (features, key_heads, size), axes, init, dtype, 1))
            if name in ("query", "key", "value"):
                setattr(self, f"conv_{name}", parameter(rngs, (key_heads * size, width), ("heads", None), TAPS, dtype))
        self.dt_bias = nnx.Param(jnp.ones(value_heads, dtype), axes=("heads",))
        self.a_log = parameter(rngs, (value_heads,), ("heads",), _rates, dtype)
        self.norm = RMSNorm(value_dim, axes=(None,), eps=norm_eps, dtype=dtype)
        self.out = parameter(rngs, (value_heads * value_dim, features), ("heads", "embed"), out_init, dtype, 1)
        self.key_heads = key_heads

    def _in(self, name: str, x: jax.Array) -> jax.Array:
        y = einsum("td,dhk->thk", x, getattr(self, f"in_{name}").get_value())
        return constrain(y, "tokens", "heads", None).reshape(len(x), -1)

    def recurrence(self) -> DeltaRecurrence:
        """Return what the mixer runs."""
        conv = {name: getattr(self, f"conv_{name}").get_value() for name in ("query", "key", "value")}
        return DeltaRecurrence(conv, self.dt_bias.get_value(), self.a_log.get_value(), self.key_heads)

    def __call__(self, layer: int, x: Float[Array, "tokens features"], tables: Tables, mixer: Any) -> tuple[Any, Any]:
        """Return the output ``[tokens, features]`` and the mixer."""
        del tables
        inputs = tuple(self._in(name, x) for name in ("query", "key", "value", "decay", "strength"))
        mixed, mixer = mixer.recur(layer, self.recurrence(), inputs)
        normed = self.norm(mixed.reshape(len(x), -1, self.norm.weight.get_value().size)).reshape(mixed.shape)
        gated = constrain(gated_product(self._in("gate", x), normed), "tokens", "heads")
        return einsum("ti,id->td", gated, self.out.get_value()), mixer

    def cache_spec(self) -> RecurrentCache:
        """Return what the mixer must remember."""
        return self.recurrence().cache_spec()


def _rates(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return logarithms of rates between 0.01 and 16."""
    return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0)).astype(dtype)
