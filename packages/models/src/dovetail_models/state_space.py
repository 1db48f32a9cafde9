"""StateSpace: the layer of Mamba-2, a selective state-space recurrence behind short convolutions (arXiv:2405.21060)."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from dovetail_kernels import einsum, rms_norm, ssd, ssd_step
from dovetail_models.layers import Initializer, RMSNorm, parameter
from dovetail_models.recurrent import TAPS, ConvolvedRecurrence, RecurrentLayer, conv_state, convolved
from dovetail_protocols import RecurrentCache
from dovetail_runtime import constrain

__all__ = ["StateSpace", "StateSpaceRecurrence"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateSpaceRecurrence(ConvolvedRecurrence):
    """Convolutions and `dovetail_kernels.ssd`; meets `dovetail_protocols.Recurrence`.

    It takes ``x[..., heads * dim]``, ``b[..., groups * size]``, ``c`` likewise and ``dt[..., heads]``, and gives
    ``[..., heads * dim]``.

    Attributes:
        conv: ``[channels, width]`` by name, of ``x``, ``b`` and ``c``.
        conv_bias: ``[channels]`` by name; empty without.
        dt_bias: ``[heads]``, added to `dt` before the softplus.
        a_log: ``[heads]``, logarithms of the rates.
        d: ``[heads]``, weights of the input in the output.
        groups: of `b` and `c`.
        dt_limits: least and largest step.
    """

    conv: dict[str, Any]
    conv_bias: dict[str, Any]
    dt_bias: Any
    a_log: Any
    d: Any
    groups: int = dataclasses.field(metadata={"static": True})
    dt_limits: tuple[float, float] = dataclasses.field(default=(0.0, math.inf), metadata={"static": True})
    forms: ClassVar[Any] = ssd, ssd_step

    def cache_spec(self) -> RecurrentCache:
        """See `dovetail_protocols.Recurrence`."""
        heads = len(self.d)
        scan = heads, len(self.conv["x"]) // heads, len(self.conv["b"]) // self.groups
        return RecurrentCache((*conv_state(self.conv).items(), ("scan", scan)))

    def run(
        self, state: Mapping[str, Any], inputs: tuple[Any, ...], convolve: Callable[..., Any], form: Callable[..., Any]
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """See `ConvolvedRecurrence`."""
        given: dict[str, Any] = dict(zip(("x", "b", "c"), inputs, strict=False))
        parts, after = convolved(convolve, state, given, self.conv, self.conv_bias)
        x, b, c = (
            parts[name].reshape(*parts[name].shape[:-1], count, -1)
            for name, count in (("x", len(self.d)), ("b", self.groups), ("c", self.groups))
        )
        wide = inputs[3].astype(jnp.float32) + self.dt_bias.astype(jnp.float32)
        dt = jnp.clip(jax.nn.softplus(wide), *self.dt_limits)
        rates = -jnp.exp(self.a_log.astype(jnp.float32))
        out, after["scan"] = form(x, dt, rates, b, c, d=self.d, state=state["scan"])
        return out.reshape(inputs[0].shape), after


class StateSpace(RecurrentLayer):
    """Projections around a `StateSpaceRecurrence`, with a gate and a norm behind it; see `RecurrentLayer`.

    Args:
        features: width of the residual stream.
        heads: of the recurrence.
        head_dim: features per head.
        state_size: numbers that a head keeps per feature.
        groups: heads of a group share what is written and read, a divisor of `heads`; each has a norm of its own.
        width: tokens that a convolution sees.
        bias: of the projections.
        conv_bias: of the convolutions.
        norm_eps: added to the mean squares.
        dt_limits: least and largest step.
        dt_init: ``(least, largest, floor)`` of the steps at the beginning.
        init: of the weights.
        out_init: of the output's.
        dtype: of the parameters.
        rngs: where the initial weights come from.
    """

    inputs: ClassVar[Any] = {"x": "value", "b": "key", "c": "query", "dt": None}

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_dim: int,
        state_size: int,
        groups: int,
        width: int,
        bias: bool,
        conv_bias: bool,
        norm_eps: float,
        dt_limits: tuple[float, float],
        dt_init: tuple[float, float, float],
        init: Initializer,
        out_init: Initializer,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        zeros, inner = nnx.initializers.zeros, heads * head_dim
        sizes = {"gate": inner, "x": inner, "b": groups * state_size, "c": groups * state_size, "dt": heads}
        for name, size in sizes.items():
            axis = None if name in ("b", "c") else "heads"
            setattr(self, f"in_{name}", parameter(rngs, (features, size), ("embed", axis), init, dtype, 1))
            if bias:
                setattr(self, f"in_{name}_bias", parameter(rngs, (size,), (axis,), zeros, dtype))
            if name in ("x", "b", "c"):
                weight = parameter(rngs, (size, width), (axis, None), TAPS, dtype)
                setattr(self, f"conv_{name}", weight)
                if conv_bias:
                    setattr(self, f"conv_{name}_bias", parameter(rngs, (size,), (axis,), zeros, dtype))
        self.dt_bias = parameter(rngs, (heads,), ("heads",), functools.partial(_steps, dt_init), dtype)
        self.a_log = nnx.Param(jnp.log(jnp.arange(1, heads + 1, dtype=jnp.float32)).astype(dtype), axes=("heads",))
        self.d = nnx.Param(jnp.ones(heads, dtype), axes=("heads",))
        self.norm = RMSNorm(inner, axes=("heads",), eps=norm_eps, dtype=dtype)
        self.out = parameter(rngs, (inner, features), ("heads", "embed"), out_init, dtype, 1)
        if bias:
            self.out_bias = parameter(rngs, (features,), ("embed",), zeros, dtype)
        self.bias, self.conv_bias, self.groups, self.dt_limits = bias, conv_bias, groups, dt_limits

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        y = einsum("td,di->ti", x, getattr(self, f"in_{name}").get_value())
        y = y + getattr(self, f"in_{name}_bias").get_value().astype(y.dtype) if self.bias else y
        return constrain(y, "tokens", None if name in ("b", "c") else "heads")

    def recurrence(self) -> StateSpaceRecurrence:
        """Return what the mixer runs."""
        names = ("x", "b", "c")
        biased = names if self.conv_bias else ()
        return StateSpaceRecurrence(
            {name: getattr(self, f"conv_{name}").get_value() for name in names},
            {name: getattr(self, f"conv_{name}_bias").get_value() for name in biased},
            self.dt_bias.get_value(),
            self.a_log.get_value(),
            self.d.get_value(),
            self.groups,
            self.dt_limits,
        )

    def gate(self, mixed: jax.Array, gate: jax.Array) -> jax.Array:
        """See `RecurrentLayer`."""
        wide = mixed.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        normed = rms_norm(wide.reshape(len(mixed), self.groups, -1), eps=self.norm.eps).reshape(mixed.shape)
        return (normed * self.norm.weight.get_value().astype(jnp.float32)).astype(mixed.dtype)


def _steps(limits: tuple[float, float, float], key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return biases whose softplus is uniform in the logarithm."""
    least, largest, floor = limits
    steps = jnp.exp(jax.random.uniform(key, shape, minval=math.log(least), maxval=math.log(largest)))
    steps = jnp.maximum(steps, floor)
    return (steps + jnp.log(-jnp.expm1(-steps))).astype(dtype)
