"""Choices of dtype that hold under strict promotion too."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["exact", "narrow"]


def exact(dtype: Any) -> Any:
    """Return the dtype that sums, logits and softmaxes of operands of this dtype are computed in."""
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.dtype("float64") else jnp.dtype("float32")


def narrow(ids: jax.Array) -> jax.Array:
    """Return ids as int32; one that int32 cannot hold becomes -1, not another id."""
    most = jnp.iinfo(jnp.int32).max
    if jnp.iinfo(ids.dtype).max <= most:
        return ids.astype(jnp.int32)
    fits = (ids >= 0) & (ids <= jnp.asarray(most, ids.dtype))
    return jnp.where(fits, ids.astype(jnp.int32), jnp.int32(-1))
