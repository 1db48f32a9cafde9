"""Dropout whose bits depend only on a key and on where an element is, so that blocks can be dropped one by one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["Dropout", "kept"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Attention weights that are set to 0 at random; the others are divided by ``1 - rate``.

    Which ones depends on the key, the row of the batch, the head and the positions, as this call counts them. Inside
    ``jax.shard_map`` a key that is the same on every device gives every shard the same pattern: fold the index of the
    mesh axes over which batch or heads are spread into it, ``jax.random.fold_in(key, jax.lax.axis_index("data"))``.

    Attributes:
        key: a random key.
        rate: probability of 0, in ``[0, 1)``.
    """

    key: Any
    rate: float = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        """Check the rate."""
        if isinstance(self.rate, (int, float)) and not 0 <= self.rate < 1:
            raise ValueError(f"Dropout: rate={self.rate}; expected at least 0 and less than 1")


def kept(dropout: Dropout, shape: tuple[int, int], i: jax.Array, j: jax.Array) -> Float[Array, "batch heads rows cols"]:
    """Return the factor of each weight, 0 or ``1 / (1 - rate)``.

    Args:
        dropout: key and rate.
        shape: number of batch rows and of heads.
        i: positions of the rows, broadcastable to the result.
        j: positions of the columns.
    """
    data = jax.random.key_data(dropout.key) if jnp.issubdtype(dropout.key.dtype, jax.dtypes.prng_key) else dropout.key
    words = data.astype(jnp.uint32).reshape(-1)
    matrix = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32).reshape(*shape, 1, 1)
    bits = _mix(_mix(_mix(words[0] ^ matrix) ^ words[-1] ^ i.astype(jnp.uint32)) ^ j.astype(jnp.uint32))
    limit = jnp.uint32(min(round(dropout.rate * 2**32), 2**32 - 1))
    return jnp.where(bits >= limit, jnp.float32(1 / (1 - dropout.rate)), jnp.float32(0))


def _mix(x: jax.Array) -> jax.Array:
    """Spread every bit over the word (a 32-bit finalizer with multiply and shift, after Wellons' hash prospector)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
