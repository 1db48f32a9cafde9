"""Gated linear units (Shazeer, arXiv:2002.05202).

The plain form is the only one: XLA makes one loop of everything between the products. On 2 CPU cores a unit of 512
tokens, 1024 features and 2816 hidden ones (float32) takes the time of its products alone, 1.07 times that of all
products with gradients. Another form could only make the products faster. The backward pass computes activations again:
a loop over layers would keep every array on the way to the result, some of them in float32, and not just both factors.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact
from dovetail_kernels.operation import Implementation, Operation, Wanted
from dovetail_kernels.seam import einsum
from dovetail_protocols import LowRankArray, QuantizedArray

__all__ = ["GATED_LINEAR_UNIT", "Activation", "Clamped", "gated_linear_unit", "gated_product"]


@dataclasses.dataclass(frozen=True)
class Clamped:
    """The unit of gpt-oss: ``gate * sigmoid(alpha * gate) * (up + 1)`` of clamped factors.

    Attributes:
        alpha: slope of the sigmoid.
        limit: the gate is at most that, the other factor within it.
    """

    alpha: float = 1.702
    limit: float = 7.0

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """Return the product."""
        gate = jnp.minimum(gate, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (jnp.clip(up, -self.limit, self.limit) + 1)


Activation: TypeAlias = (
    Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "clamped"] | Clamped
)
"""What is applied to the gate; "gelu" is the exact one. "clamped" is `Clamped` with gpt-oss' numbers."""

_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda gate: jnp.square(jax.nn.relu(gate)),
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda gate: gate,
}


def gated_linear_unit(
    x: Float[Array, "*tokens features"],
    gate: Float[Array, "features hidden"] | Float[Array, "features 2 hidden"] | QuantizedArray | LowRankArray,
    up: Float[Array, "features hidden"] | QuantizedArray | LowRankArray | None = None,
    *,
    activation: Activation = "silu",
    gate_bias: Float[Array, " hidden"] | Float[Array, "2 hidden"] | None = None,
    up_bias: Float[Array, " hidden"] | None = None,
    implementation: Wanted = None,
) -> Float[Array, "*tokens hidden"]:
    """Return ``activation(x gate + gate_bias) * (x up + up_bias)``.

    The products are taken tokens-major, as matrices, which keeps weight gradients free of transposes. The activation
    and the product are computed in float32 (float64 for float64).

    Args:
        x: any leading axes.
        gate: its weight, or without `up` both as ``[features, 2, hidden]``, the gate's first.
        up: weight of the other factor.
        activation: see `Activation`.
        gate_bias: of the gate, or without `up` both as ``[2, hidden]``.
        up_bias: of the other factor.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or implementation.
        TypeError: `x` is not a float.

    >>> x, gate, up = jnp.array([[1.0, 2.0]]), jnp.array([[3.0], [-1.0]]), jnp.array([[0.5], [2.0]])
    >>> gated_linear_unit(x, gate, up, activation="relu2")
    Array([[4.5]], dtype=float32)
    """
    _check(x, gate, up, activation, gate_bias, up_bias)
    tokens = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
    out = GATED_LINEAR_UNIT(
        implementation, x=flat, gate=gate, up=up, activation=activation, gate_bias=gate_bias, up_bias=up_bias
    )
    return out.reshape(*tokens, out.shape[-1])


def gated_product(
    gate: Float[Array, "*tokens hidden"], up: Float[Array, "*tokens hidden"], *, activation: Activation = "silu"
) -> Float[Array, "*tokens hidden"]:
    """Return ``activation(gate) * up`` of factors that are there already, as those of experts.

    It is computed in float32 (float64 for float64); the result has the dtype of `gate`.

    Raises:
        ValueError: an unknown activation, or factors of different shapes.

    >>> gated_product(jnp.array([2.0, -1.0]), jnp.array([3.0, 5.0]), activation="relu")
    Array([6., 0.], dtype=float32)
    """
    _check_activation(activation)
    if gate.shape != up.shape:
        raise ValueError(f"gate {gate.shape}, up {up.shape}; expected equal shapes")
    unit = Clamped() if activation == "clamped" else activation

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(gate: jax.Array, up: jax.Array) -> jax.Array:
        wide = exact(gate.dtype)
        a, b = gate.astype(wide), up.astype(wide)
        return (unit(a, b) if isinstance(unit, Clamped) else _FUNCTIONS[unit](a) * b).astype(gate.dtype)

    return product(gate, up)


def _check_activation(activation: Any) -> None:
    if not isinstance(activation, Clamped) and activation != "clamped" and activation not in _FUNCTIONS:
        raise ValueError(f"activation={activation!r}; expected one of {[*_FUNCTIONS, 'clamped']} or Clamped")


def _check(x: Any, gate: Any, up: Any, activation: Activation, gate_bias: Any, up_bias: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected a float")
    _check_activation(activation)
    if not x.ndim:
        raise ValueError("x has shape (); expected [*tokens, features]")
    features, hidden = x.shape[-1], gate.shape[-1] if gate.ndim else 0
    expected = (features, 2, hidden) if up is None else (features, hidden)
    form = "both weights as [features, 2, hidden]" if up is None else "[features, hidden] each"
    if gate.shape != expected or (up is not None and up.shape != expected):
        other = "" if up is None else f", up {up.shape}"
        raise ValueError(f"gate {gate.shape}{other}; x {x.shape} needs {expected}, {form}")
    if up is None and up_bias is not None:
        raise ValueError("up_bias without up; expected gate_bias of shape [2, hidden] for both")
    for name, bias, shape in (("gate_bias", gate_bias, expected[1:]), ("up_bias", up_bias, expected[1:])):
        if bias is not None and bias.shape != shape:
            raise ValueError(f"{name} has shape {bias.shape}; expected {shape}")


def _reference(
    *, x: jax.Array, gate: Any, up: Any, activation: Activation, gate_bias: jax.Array | None, up_bias: jax.Array | None
) -> jax.Array:
    if up is None:
        a, b = _both(x, gate, gate_bias)
    else:
        a, b = _plus(einsum("td,df->tf", x, gate), gate_bias), _plus(einsum("td,df->tf", x, up), up_bias)
    return gated_product(a, b, activation=activation)


def _both(x: jax.Array, weight: Any, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return the products with both halves of a weight ``[features, 2, hidden]``."""
    if isinstance(weight, QuantizedArray | LowRankArray):
        both = _plus(einsum("td,dgf->tgf", x, weight), bias)
        return both[:, 0], both[:, 1]
    # With several devices the hidden axis may be sharded; as a matrix it would not stay so.
    return _as_matrix(x, weight, bias) if jax.device_count() == 1 else _as_halves(x, weight, bias)


@jax.custom_jvp
def _as_matrix(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Take one product, of which nothing is copied; derivatives of any kind are those of two, for the same reason."""
    features, _, hidden = weight.shape
    whole = None if bias is None else bias.reshape(-1)
    both = _plus(einsum("td,df->tf", x, weight.reshape(features, 2 * hidden)), whole)
    return both[:, :hidden], both[:, hidden:]


@_as_matrix.defjvp
def _derivative(primals: Any, tangents: Any) -> Any:
    return jax.jvp(_as_halves, primals, tangents)


def _as_halves(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    a, b = (_plus(einsum("td,df->tf", x, weight[:, i]), None if bias is None else bias[i]) for i in range(2))
    return a, b


def _plus(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype)


GATED_LINEAR_UNIT = Operation(
    "gated_linear_unit",
    (Implementation("reference", _reference),),
    accumulation="float32 (float64 for float64)",
    error="that of the products; 1e-6 of the largest value in float32, 1e-2 in bfloat16",
)
