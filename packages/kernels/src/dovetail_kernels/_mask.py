"""Which keys a query may see, and which range of keys a range of queries needs at all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mask(NamedTuple):
    """The static part of a mask (segments are arrays and come separately)."""

    causal: bool
    window: int | None

    def keys(self, rows: tuple[int, int], source: int) -> tuple[int, int]:
        """Return the half-open range of keys that any of the query rows ``[start, stop)`` may see."""
        if not self.causal:
            return 0, source
        low = 0 if self.window is None else max(0, rows[0] - self.window + 1)
        return low, min(source, rows[1])


def allowed(
    mask: Mask, rows: tuple[int | jax.Array, int], keys: tuple[int, int], segment_ids: jax.Array | None
) -> jax.Array | None:
    """Return who may see whom, bool ``[batch or 1, rows, keys]``, or None where everybody sees everything.

    Args:
        mask: the static mask.
        rows: first query row (may be traced) and number of rows.
        keys: half-open static range of keys.
        segment_ids: ``[batch, time]`` or None.
    """
    start, count = rows
    low, high = keys
    keep: jax.Array | None = None
    if mask.causal:
        i = (start + jnp.arange(count, dtype=jnp.int32))[:, None]
        j = jnp.arange(low, high, dtype=jnp.int32)[None]
        keep = (j <= i)[None]
        if mask.window is not None:
            keep = keep & (j > i - mask.window)[None]
    if segment_ids is not None:
        mine = jax.lax.dynamic_slice_in_dim(segment_ids, start, count, axis=1)[:, :, None]
        same = (mine == segment_ids[:, None, low:high]) & (mine != 0)
        keep = same if keep is None else keep & same
    return keep
