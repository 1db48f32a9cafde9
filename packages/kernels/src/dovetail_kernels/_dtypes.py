"""Choices of dtype that hold under strict promotion too."""

from typing import Any

import jax.numpy as jnp

__all__ = ["exact"]


def exact(dtype: Any) -> Any:
    """Return the dtype that sums, logits and softmaxes of operands of this dtype are computed in."""
    return jnp.dtype("float64") if jnp.dtype(dtype) == jnp.dtype("float64") else jnp.dtype("float32")
