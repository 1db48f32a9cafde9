"""Contrastive losses of pairs of embeddings, with the other pairs of the batch as negatives."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact
from dovetail_kernels.cross_entropy import CrossEntropyOptions, linear_cross_entropy
from dovetail_kernels.operation import Wanted

__all__ = ["contrastive_loss"]


def contrastive_loss(
    left: Float[Array, "pairs features"],
    right: Float[Array, "pairs features"],
    *,
    scale: float | Float[Array, ""] = 1.0,
    symmetric: bool = True,
    per_pair: bool = False,
    axis: str | None = None,
    implementation: Wanted = None,
) -> Any:
    r"""Return the summed InfoNCE loss of pairs (van den Oord et al., arXiv:1807.03748; CLIP, arXiv:2103.00020).

    With logits :math:`z_{ij} = s\, l_i \cdot r_j` it is the cross-entropy of finding each row's partner among the
    columns, :math:`\sum_i (\log \sum_j e^{z_{ij}} - z_{ii})`; where `symmetric`, the mean of that and of finding each
    column's partner among the rows. Embeddings are used as they are: normalise them before. No matrix of all pairs is
    held (`linear_cross_entropy` does the work). Gradients reach both sides and `scale`.

    Args:
        left: embeddings, such as of images; row i belongs to row i of `right`.
        right: embeddings, such as of texts.
        scale: inverse of the temperature; an array may be learned.
        symmetric: both directions, or only from left to right.
        per_pair: return the loss of every pair in place of the sum.
        axis: inside ``jax.shard_map``, the mesh axis over which the pairs are split. The others' embeddings are
            gathered, and the result is that of this device's pairs: add it up with ``jax.lax.psum``.
        implementation: of `linear_cross_entropy`.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: embeddings that are not floats.

    >>> round(float(contrastive_loss(jnp.eye(4), jnp.eye(4))) / 4, 4)  # log(e + 3) - 1
    0.7437
    """
    if left.ndim != 2 or left.shape != right.shape:
        raise ValueError(f"left {left.shape}, right {right.shape}; expected both [pairs, features]")
    for name, array in (("left", left), ("right", right)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; expected a float")
    if left.shape[0] == 0:
        return jnp.zeros((0,) if per_pair else (), exact(left.dtype))
    options = CrossEntropyOptions(per_token=per_pair)

    def find(one: jax.Array, others: jax.Array) -> jax.Array:
        targets = jnp.arange(one.shape[0], dtype=jnp.int32)
        if axis is not None:
            others = jax.lax.all_gather(others, axis, tiled=True)
            targets = targets + jax.lax.axis_index(axis).astype(jnp.int32) * one.shape[0]
        scaled = one * jnp.asarray(scale, one.dtype)
        return linear_cross_entropy(scaled, others.T, targets, options=options, implementation=implementation)

    return (find(left, right) + find(right, left)) / 2 if symmetric else find(left, right)
