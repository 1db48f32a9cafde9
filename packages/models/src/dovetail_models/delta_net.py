"""GatedDeltaNet: linear attention by the gated delta rule behind short convolutions (Yang et al., arXiv:2412.06464)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dovetail_kernels import einsum, gated_delta_rule, gated_delta_step, gated_product
from dovetail_models.layers import Initializer, RMSNorm, parameter
from dovetail_models.recurrent import TAPS, ConvolvedRecurrence, RecurrentLayer, conv_state, convolved
from dovetail_protocols import RecurrentCache
from dovetail_runtime import constrain

__all__ = ["DeltaRecurrence", "GatedDeltaNet"]

LENGTH_EPS = 1e-6
"""Added to the squared lengths of queries and keys."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaRecurrence(ConvolvedRecurrence):
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
    forms: ClassVar[Any] = gated_delta_rule, gated_delta_step

    def cache_spec(self) -> RecurrentCache:
        """See `dovetail_protocols.Recurrence`."""
        heads = len(self.a_log)
        rule = heads, len(self.conv["key"]) // self.key_heads, len(self.conv["value"]) // heads
        return RecurrentCache((*conv_state(self.conv).items(), ("rule", rule)))

    def run(
        self, state: Mapping[str, Any], inputs: tuple[Any, ...], convolve: Callable[..., Any], form: Callable[..., Any]
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """See `ConvolvedRecurrence`."""
        *mixed, decay, strength = inputs
        given: dict[str, Any] = dict(zip(("query", "key", "value"), mixed, strict=True))
        parts, after = convolved(convolve, state, given, self.conv, {})
        counts = {"query": self.key_heads, "key": self.key_heads, "value": len(self.a_log)}
        query, key, value = (parts[n].reshape(*parts[n].shape[:-1], count, -1) for n, count in counts.items())
        steps = jax.nn.softplus(decay.astype(jnp.float32) + self.dt_bias.astype(jnp.float32))
        log_decay = -jnp.exp(self.a_log.astype(jnp.float32)) * steps
        beta = jax.nn.sigmoid(strength.astype(jnp.float32))
        out, after["rule"] = form(_unit(query), _unit(key), value, log_decay, beta, state=state["rule"])
        return out.reshape(given["value"].shape), after


def _unit(x: jax.Array) -> jax.Array:
    """Return vectors of length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + LENGTH_EPS)


class GatedDeltaNet(RecurrentLayer):
    """Projections around a `DeltaRecurrence`, with a norm of each head and a gate behind it; see `RecurrentLayer`.

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

    inputs: ClassVar[Any] = {"query": "query", "key": "key", "value": "value", "decay": None, "strength": None}

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

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        y = einsum("td,dhk->thk", x, getattr(self, f"in_{name}").get_value())
        return constrain(y, "tokens", "heads", None).reshape(len(x), -1)

    def recurrence(self) -> DeltaRecurrence:
        """Return what the mixer runs."""
        conv = {name: getattr(self, f"conv_{name}").get_value() for name in ("query", "key", "value")}
        return DeltaRecurrence(conv, self.dt_bias.get_value(), self.a_log.get_value(), self.key_heads)

    def gate(self, mixed: jax.Array, gate: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        heads = mixed.reshape(len(mixed), -1, self.norm.weight.get_value().size)
        return gated_product(gate, self.norm(heads).reshape(mixed.shape))


def _rates(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return logarithms of rates between 0.01 and 16."""
    return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0)).astype(dtype)
