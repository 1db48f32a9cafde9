"""Normalisations, computed in float32 (float64 for float64), with an optional residual sum that XLA fuses."""

import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels._norm import How, normalize
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted

__all__ = ["LAYER_NORM", "RMS_NORM", "group_norm", "layer_norm", "rms_norm"]

Normed: TypeAlias = Any
"""The normalised array, or with a residual a pair of it and the residual sum."""


def rms_norm(
    x: Float[Array, "*shape"],
    weight: Float[Array, " features"] | None = None,
    *,
    bias: Float[Array, " features"] | None = None,
    residual: Float[Array, "*shape"] | None = None,
    axis: int = -1,
    weight_offset: float = 0.0,
    eps: float = 1e-6,
    implementation: Wanted = None,
) -> Normed:
    """Divide by the root mean square over an axis (Zhang & Sennrich, arXiv:1910.07467).

    Args:
        x: any other axes.
        weight: factor per feature.
        bias: added per feature.
        residual: added to `x` before; the result is then ``(normed, x + residual)``, the sum in the dtype of `x`.
        axis: which one the features are on.
        weight_offset: added to the weight, 1 in Gemma's models.
        eps: added to the mean square; the default is that of Llama's family.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, an axis that is not there, an unknown implementation.
        TypeError: `x` is not a float.

    >>> rms_norm(jnp.array([0.0, 8.0, 0.0, 0.0]), eps=0.0)
    Array([0., 2., 0., 0.], dtype=float32)
    """
    _check(x, axis, weight, bias, residual)
    options = {"axis": axis % x.ndim, "weight_offset": weight_offset, "eps": eps}
    out, total = RMS_NORM(implementation, x=x, weight=weight, bias=bias, residual=residual, **options)
    return out if residual is None else (out, total)


def layer_norm(
    x: Float[Array, "*shape"],
    weight: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    residual: Float[Array, "*shape"] | None = None,
    axis: int = -1,
    weight_offset: float = 0.0,
    eps: float = 1e-5,
    implementation: Wanted = None,
) -> Normed:
    """Take off the mean over an axis and divide by the standard deviation (Ba et al., arXiv:1607.06450).

    Args:
        x: any other axes.
        weight: factor per feature.
        bias: added per feature.
        residual: added to `x` before; the result is then ``(normed, x + residual)``, the sum in the dtype of `x`.
        axis: which one the features are on.
        weight_offset: added to the weight.
        eps: added to the variance; the default is PyTorch's (Flax has 1e-6).
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, an axis that is not there, an unknown implementation.
        TypeError: `x` is not a float.

    >>> layer_norm(jnp.array([1.0, 3.0]), eps=0.0)
    Array([-1.,  1.], dtype=float32)
    """
    _check(x, axis, weight, bias, residual)
    options = {"axis": axis % x.ndim, "weight_offset": weight_offset, "eps": eps}
    out, total = LAYER_NORM(implementation, x=x, weight=weight, bias=bias, residual=residual, **options)
    return out if residual is None else (out, total)


def group_norm(
    x: Float[Array, "batch *space features"],
    groups: int,
    weight: Float[Array, " features"] | None = None,
    bias: Float[Array, " features"] | None = None,
    *,
    eps: float = 1e-5,
) -> Float[Array, "batch *space features"]:
    """Normalise groups of neighbouring features over all places of an example (Wu & He, arXiv:1803.08494).

    Args:
        x: features last.
        groups: how many; 1 takes all features together.
        weight: factor per feature.
        bias: added per feature.
        eps: added to the variance; the default is PyTorch's (Flax has 1e-6).

    Raises:
        ValueError: `groups` does not divide the features, or shapes that do not fit.
        TypeError: `x` is not a float.

    >>> group_norm(jnp.array([[1.0, 3.0, 10.0, 10.0]]), 2, eps=0.0 + 1e-12)
    Array([[-1.,  1.,  0.,  0.]], dtype=float32)
    """
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}; expected [batch, *space, features]")
    features = x.shape[-1]
    if groups < 1 or features % groups:
        raise ValueError(f"groups={groups}; expected a divisor of the {features} features of x {x.shape}")
    _check(x, -1, weight, bias, None)
    if not x.size:
        return x
    wide = x.astype(exact(x.dtype)).reshape(x.shape[0], -1, groups, features // groups)
    out = _normalized(wide, (1, 3), eps, centred=True).reshape(x.shape)
    return _scaled(out, weight, bias, 0.0, -1).astype(x.dtype)


def _check(x: jax.Array, axis: int, weight: Any, bias: Any, residual: Any) -> None:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"x has shape {x.shape} and no axis {axis}")
    features = x.shape[axis]
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected a float")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (features,):
            raise ValueError(f"{name} has shape {parameter.shape}; expected {(features,)}, the features of x {x.shape}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {residual.shape}; expected {x.shape}, that of x")


def _reference(
    *,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    axis: int,
    weight_offset: float,
    eps: float,
    centred: bool,
) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(exact(x.dtype))
    if residual is not None:
        wide = wide + residual.astype(wide.dtype)
    out = _normalized(wide, (axis,), eps, centred=centred)
    return _scaled(out, weight, bias, weight_offset, axis).astype(x.dtype), wide.astype(x.dtype)


def _blocked(
    *,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    axis: int,
    weight_offset: float,
    eps: float,
    centred: bool,
) -> tuple[jax.Array, jax.Array]:
    how = How(axis, weight_offset, eps, centred)
    x, weight, bias, residual = alike(x, weight, bias, residual)
    if residual is None:
        return normalize(how, x, weight, bias), x
    wide = exact(x.dtype)
    total = x.astype(wide) + residual.astype(wide)
    return normalize(how, total, weight, bias).astype(x.dtype), total.astype(x.dtype)


def _on_cpus(call: Call) -> Literal[True] | str:
    return call.platform == "cpu" or "fusions of XLA are as fast there"


def _normalized(wide: jax.Array, axes: tuple[int, ...], eps: float, *, centred: bool) -> jax.Array:
    if centred:
        wide = wide - jnp.mean(wide, axes, keepdims=True)
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + eps)


def _scaled(out: jax.Array, weight: Any, bias: Any, offset: float, axis: int) -> jax.Array:
    along = [1] * out.ndim
    along[axis] = -1
    if weight is not None:
        out = out * (weight.astype(out.dtype) + offset).reshape(along)
    if bias is not None:
        out = out + bias.astype(out.dtype).reshape(along)
    return out


def _operation(name: str, *, centred: bool) -> Operation:
    return Operation(
        name,
        (
            Implementation(
                "blocked",
                functools.partial(_blocked, centred=centred),
                _on_cpus,
                platforms=("cpu",),
                gradient="any order, reverse mode",
            ),
            Implementation("reference", functools.partial(_reference, centred=centred)),
        ),
        accumulation="float32 (float64 for float64)",
        error="1e-6 of the largest value in float32, 1e-2 in bfloat16",
        outcome=lambda _, axes: (PartitionSpec(*axes["x"]),) * 2,
    )


LAYER_NORM = _operation("layer_norm", centred=True)
RMS_NORM = _operation("rms_norm", centred=False)
