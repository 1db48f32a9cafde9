"""Triangle multiplication, an update of pair features (Jumper et al., doi:10.1038/s41586-021-03819-2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from dovetail_kernels.norm import layer_norm
from dovetail_kernels.operation import Implementation, Operation, Wanted

__all__ = ["TRIANGLE_MULTIPLICATION", "TriangleWeights", "triangle_multiplication"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TriangleWeights:
    """Parameters of one update.

    Attributes:
        norm_in: scale and bias ``[features]`` of the normalisation of the pairs.
        project_in: ``[features, 2, hidden]``, for the left and the right edges.
        gate_in: likewise, before a sigmoid.
        norm_out: scale and bias ``[hidden]`` of the normalisation of the products.
        project_out: ``[hidden, out]``.
        gate_out: ``[features, out]``, before a sigmoid.
    """

    norm_in: Any
    project_in: Any
    gate_in: Any
    norm_out: Any
    project_out: Any
    gate_out: Any


def triangle_multiplication(
    pairs: Float[Array, "n n features"],
    weights: TriangleWeights,
    mask: Bool[Array, "n n"] | None = None,
    *,
    outgoing: bool = True,
    eps: float = 1e-6,
    implementation: Wanted = None,
) -> Float[Array, "n n out"]:
    """Update every pair from the triangles that it is an edge of (supplementary algorithms 11 and 12).

    With left and right edges a and b of gated projections, pair (i, j) gets the normalised and projected sum over k of
    ``a[i, k] * b[j, k]`` (outgoing) or ``a[k, i] * b[k, j]`` (incoming), times a gate.

    Args:
        pairs: features of all pairs.
        weights: parameters, multiplied in the dtype of the pairs, in which the result is too.
        mask: pairs that take part as edges; default all.
        outgoing: which of the two updates.
        eps: of the normalisations.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: `pairs` are not floats, or the mask is not boolean.

    >>> ones = lambda *shape: jnp.ones(shape)
    >>> norms = (ones(4), ones(4))
    >>> weights = TriangleWeights(norms, ones(4, 2, 4), ones(4, 2, 4), norms, ones(4, 3), ones(4, 3))
    >>> triangle_multiplication(ones(5, 5, 4), weights).shape
    (5, 5, 3)
    """
    _check(pairs, weights, mask)
    if not pairs.size:
        return jnp.zeros((*pairs.shape[:2], weights.project_out.shape[1]), pairs.dtype)
    return TRIANGLE_MULTIPLICATION(implementation, pairs=pairs, weights=weights, mask=mask, outgoing=outgoing, eps=eps)


def _check(pairs: jax.Array, weights: TriangleWeights, mask: jax.Array | None) -> None:
    if not jnp.issubdtype(pairs.dtype, jnp.floating):
        raise TypeError(f"pairs have dtype {pairs.dtype}; expected a float")
    if pairs.ndim != 3 or pairs.shape[0] != pairs.shape[1]:
        raise ValueError(f"pairs have shape {pairs.shape}; expected [n, n, features]")
    features, (hidden, out) = pairs.shape[2], weights.project_out.shape
    for name, shape in {
        "norm_in": (features,),
        "project_in": (features, 2, hidden),
        "gate_in": (features, 2, hidden),
        "norm_out": (hidden,),
        "gate_out": (features, out),
    }.items():
        found = [x.shape for x in jax.tree.leaves(getattr(weights, name))]
        if set(found) != {shape}:
            raise ValueError(f"weights.{name} has shape {found}; expected {shape}")
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}; expected bool, true for pairs that take part")
    if mask is not None and mask.shape != pairs.shape[:2]:
        raise ValueError(f"mask has shape {mask.shape}; expected {pairs.shape[:2]}")


def _reference(
    *, pairs: jax.Array, weights: TriangleWeights, mask: jax.Array | None, outgoing: bool, eps: float
) -> jax.Array:
    n, features = pairs.shape[1:]
    products = weights.project_in, weights.gate_in, weights.project_out, weights.gate_out
    project_in, gate_in, project_out, gate_out = (x.astype(pairs.dtype) for x in products)
    flat = layer_norm(pairs.reshape(-1, features), *weights.norm_in, eps=eps)
    edges = flat @ project_in.reshape(features, -1) * jax.nn.sigmoid(flat @ gate_in.reshape(features, -1))
    if mask is not None:
        edges = jnp.where(mask.reshape(-1, 1), edges, jnp.zeros((), edges.dtype))
    left, right = edges.reshape(n, n, 2, -1).transpose(2, 3, 0, 1)
    sums = jnp.einsum("hik,hjk->ijh" if outgoing else "hki,hkj->ijh", left, right)
    mixed = layer_norm(sums.reshape(n * n, -1), *weights.norm_out, eps=eps) @ project_out
    return (mixed * jax.nn.sigmoid(flat @ gate_out)).reshape(n, n, -1)


TRIANGLE_MULTIPLICATION = Operation(
    "triangle_multiplication",
    (Implementation("reference", _reference),),
    accumulation="that of the products: float32 (float64 for float64)",
    error="1e-5 of the largest value in float32",
    outcome=lambda _, axes: PartitionSpec(*axes["pairs"][:2]),
)
