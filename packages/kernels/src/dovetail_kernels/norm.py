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
        ValueError: `weight` has another shape than ``[features]``.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {weight.shape}; expected {x.shape[-1:]}, the last axis of x {x.shape}")
    wide = x.astype(exact(x.dtype))
    out = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(out.dtype)
    return out.astype(x.dtype)
