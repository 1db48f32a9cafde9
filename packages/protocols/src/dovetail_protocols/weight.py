"""Weight: every type that `kernels.einsum` and `kernels.take` accept as one."""

from typing import Any, TypeAlias

import jax

from dovetail_protocols.low_rank import LowRankArray
from dovetail_protocols.quantized import QuantizedArray

__all__ = ["Weight", "as_array"]

Weight: TypeAlias = jax.Array | QuantizedArray | LowRankArray
"""A plain array, a quantized one, or either with an adapter."""


def as_array(weight: Any) -> Any:
    """Return a weight as a plain array of its logical dtype; a plain one as it is.

    >>> import jax.numpy as jnp
    >>> as_array(QuantizedArray(jnp.full((2, 2), 3, jnp.int8), jnp.full((1, 1), 0.5)))[0, 0]
    Array(1.5, dtype=float32)
    """
    if isinstance(weight, LowRankArray):
        return weight.dense()
    return weight.dequantize() if isinstance(weight, QuantizedArray) else weight
