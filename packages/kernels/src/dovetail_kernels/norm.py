"""Normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact

__all__ = ["rms_norm"]


def rms_norm(
    x: Float[Array, "*batch features"], weight: Float[Array, " features"] | None = None, *, eps: float = 1e-6
) -> Float[Array, "*batch features"]:
    """Divide by the root mean square over the last axis, computed in float32 (Zhang & Sennrich, arXiv:1910.07467).

    Args:
        x: any leading axes.
        weight: factor per feature.
        eps: added to the mean square.

    Raises:
        ValueError: `x` is a scalar, or `weight` has another shape than ``[features]``.
        TypeError: `x` is not a float.

    >>> rms_norm(jnp.array([0.0, 8.0, 0.0, 0.0]), eps=0.0)
    Array([0., 2., 0., 0.], dtype=float32)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected a float")
    if not x.ndim:
        raise ValueError("x has shape (); expected [*batch, features]")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}; expected {x.shape[-1:]}, the last axis of x {x.shape}")
    wide = x.astype(exact(x.dtype))
    out = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(out.dtype)
    return out.astype(x.dtype)
