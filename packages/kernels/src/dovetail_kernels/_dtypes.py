"""Choices of dtype that hold under strict promotion too."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["exact", "int32"]


def exact(dtype: Any) -> Any:
    """Return the dtype that sums, logits and softmaxes of operands of this dtype are computed in."""
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.dtype("float64") else jnp.dtype("float32")


def int32(x: Any) -> jax.Array:
    """Return integers as int32; what does not fit becomes the nearest that does, never another valid one."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"dtype {x.dtype}; expected integers")
    own, wide = jnp.iinfo(x.dtype), jnp.iinfo(jnp.int32)
    if own.max > wide.max:
        x = x.clip(max(own.min, wide.min), wide.max)
    return jnp.asarray(x, jnp.int32)
