"""Norms whose gradients are products with vectors, which on CPUs need no array as large as the input.

With ``g`` the cotangent, ``w`` the weight, ``c`` the centred input and ``r`` the reciprocal root of its mean square,
the gradient of the input is ``r (g w - mean(g w) - c r^2 mean(g c w))``: means over features are products with ``w``,
and the sums over tokens that make the gradient of the weight are products with ``r``.
"""

import functools
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_kernels._dtypes import exact

__all__ = ["normalize"]


class How(NamedTuple):
    """The static part of a call."""

    axis: int
    offset: float
    eps: float
    centred: bool


class Saved(NamedTuple):
    """What the backward pass needs: the operands, and statistics with an axis of 1 for the features."""

    x: Any
    weight: Any
    bias: Any
    mean: Any
    inverse: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalize(how: How, x: jax.Array, weight: Any, bias: Any) -> jax.Array:
    """Return the normalised `x` in its dtype."""
    return _forward(how, x, weight, bias)[0]


def _forward(how: How, x: jax.Array, weight: Any, bias: Any) -> tuple[jax.Array, Saved]:
    wide = x.astype(exact(x.dtype))
    mean = jnp.mean(wide, how.axis, keepdims=True) if how.centred else None
    wide = wide if mean is None else wide - mean
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, how.axis, keepdims=True) + how.eps)
    out = wide * inverse
    if weight is not None:
        out = out * _along(_factor(how, weight, wide), how, x.ndim)
    if bias is not None:
        out = out + _along(bias.astype(wide.dtype), how, x.ndim)
    return out.astype(x.dtype), Saved(x, weight, bias, mean, inverse)


def _backward(how: How, saved: Saved, cotangent: jax.Array) -> tuple[Any, Any, Any]:
    x, weight, bias, mean, inverse = saved
    features = x.shape[how.axis]
    g = cotangent.astype(inverse.dtype)
    wide = x.astype(g.dtype)
    centred = wide if mean is None else wide - mean
    factor = jnp.ones_like(g, shape=(features,)) if weight is None else _factor(how, weight, g)
    both = g * centred

    def over_features(y: jax.Array) -> jax.Array:
        return jnp.expand_dims(_product(how, y, factor, features=True), how.axis) / max(features, 1)

    dx = g * _along(factor, how, x.ndim) - centred * (inverse * inverse * over_features(both))
    if mean is not None:
        dx = dx - over_features(g)
    flat = jnp.squeeze(inverse, how.axis)
    d_weight = None if weight is None else _product(how, both, flat, features=False).astype(weight.dtype)
    d_bias = None if bias is None else _product(how, g, jnp.ones_like(flat), features=False).astype(bias.dtype)
    return (inverse * dx).astype(x.dtype), d_weight, d_bias


def _product(how: How, x: jax.Array, vector: jax.Array, *, features: bool) -> jax.Array:
    """Sum over the features with a weight for each, or over everything else."""
    every = string.ascii_lowercase[: x.ndim]
    feature, others = every[how.axis], every.replace(every[how.axis], "")
    spec = f"{every},{feature}->{others}" if features else f"{every},{others}->{feature}"
    return jnp.einsum(spec, x, vector, precision=jax.lax.Precision.HIGHEST)


def _factor(how: How, weight: jax.Array, like: jax.Array) -> jax.Array:
    return weight.astype(like.dtype) + how.offset


def _along(vector: jax.Array, how: How, ndim: int) -> jax.Array:
    """Give a vector of features the axes of the input."""
    return vector.reshape([-1 if axis == how.axis else 1 for axis in range(ndim)])


normalize.defvjp(_forward, _backward)
