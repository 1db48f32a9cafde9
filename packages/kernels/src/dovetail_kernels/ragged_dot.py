"""Grouped matrix product: consecutive groups of rows, each times a matrix of its own.

``reference`` multiplies every row with every matrix: every derivative. ``blocked`` multiplies a row with its own matrix
only, in blocks of at least 8 rows per group, so that its work does not grow with the number of groups while these
have that many rows; first-order reverse-mode gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from dovetail_kernels import _ragged
from dovetail_kernels._dtypes import exact, int32
from dovetail_kernels._low_rank import multiplied
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted
from dovetail_protocols import LowRankArray, QuantizedArray

__all__ = ["RAGGED_DOT", "ragged_dot"]


def ragged_dot(
    lhs: Float[Array, "rows k"],
    rhs: Float[Array, "groups k n"] | QuantizedArray | LowRankArray,
    group_sizes: Integer[Array, " groups"],
    precision: jax.lax.PrecisionLike = None,
    preferred_element_type: Any = None,
    *,
    implementation: Wanted = None,
) -> Float[Array, "rows n"]:
    """Multiply the first ``group_sizes[0]`` rows with ``rhs[0]``, the next ``group_sizes[1]`` with ``rhs[1]``, ...

    The first five parameters and the result are those of `jax.lax.ragged_dot`. Groups may be empty. Rows past the sum
    of the sizes are 0 and get no gradient, whatever they hold. Sums are float32 (float64 for float64).

    Args:
        lhs: rows, those of a group together.
        rhs: a matrix per group; a QuantizedArray is dequantized group by group as it is used and gets no gradient. A
            LowRankArray of a rank per group, in the dtype of `lhs`, adds two thin products to that of its base; one
            without a leading axis of groups is added up first.
        group_sizes: rows per group. What reaches past the rows is cut off, and a negative size counts as 0.
        precision: of the products, as for `jax.lax.dot`.
        preferred_element_type: dtype of the result; default that of `lhs`.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, an unknown implementation, or one that cannot run this (`UnsupportedError`).
        TypeError: operands or a result that are not floats, sizes that are not integers.

    >>> rows, matrices = jnp.ones((5, 2)), jnp.stack([jnp.eye(2), 3 * jnp.eye(2)])
    >>> ragged_dot(rows, matrices, jnp.array([1, 3]))[:, 0]
    Array([1., 3., 3., 3., 0.], dtype=float32)
    """
    dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    _check(lhs, rhs, group_sizes, dtype)
    if 0 in (*lhs.shape, *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    sizes = int32(group_sizes)

    def product(lhs: jax.Array, rhs: Any, dtype: Any) -> jax.Array:
        options = {"precision": precision, "preferred_element_type": dtype}
        return RAGGED_DOT(implementation, lhs=lhs, rhs=rhs, group_sizes=sizes, **options)

    return _adapted(product, lhs, rhs, sizes, dtype) if isinstance(rhs, LowRankArray) else product(lhs, rhs, dtype)


def _adapted(product: Any, lhs: jax.Array, rhs: LowRankArray, sizes: jax.Array, dtype: Any) -> jax.Array:
    """Return the product with the base, plus that with one thin matrix after the other."""
    if rhs.leading != 1:
        return product(lhs, rhs.dense(), dtype)
    base = rhs.base if isinstance(rhs.base, QuantizedArray) else rhs.base.astype(lhs.dtype)
    thin = product(lhs, rhs.a.astype(lhs.dtype), lhs.dtype) * rhs.scale
    out = product(lhs, base, dtype) + product(thin, rhs.b.astype(lhs.dtype), dtype)
    if rhs.magnitude is None:
        return out
    _, ends = _ragged.ranges(sizes, lhs.shape[0])
    group = jnp.searchsorted(ends, jnp.arange(lhs.shape[0], dtype=jnp.int32), side="right")
    return multiplied(out, "tn", jnp.take(rhs.gain(), group, axis=0, mode="clip"), "tn")


def _check(lhs: Any, rhs: Any, group_sizes: Any, dtype: Any) -> None:
    for name, found in (("lhs", lhs.dtype), ("rhs", rhs.dtype), ("preferred_element_type", dtype)):
        if not jnp.issubdtype(found, jnp.floating):
            raise TypeError(f"{name} has dtype {found}; expected a float")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"group_sizes have dtype {group_sizes.dtype}; expected integers")
    if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"lhs {lhs.shape}, rhs {rhs.shape}; expected [rows, k] and [groups, k, n]")
    if group_sizes.shape != rhs.shape[:1]:
        raise ValueError(f"group_sizes have shape {group_sizes.shape}; expected {rhs.shape[:1]}, one per matrix of rhs")


def _reference(
    *, lhs: jax.Array, rhs: Any, group_sizes: jax.Array, precision: Any, preferred_element_type: Any
) -> jax.Array:
    wide = max((exact(x) for x in (lhs.dtype, preferred_element_type)), key=lambda dtype: dtype.itemsize)
    if isinstance(rhs, QuantizedArray):
        rhs = jax.lax.stop_gradient(rhs).dequantize()
    begins, ends = _ragged.ranges(group_sizes, lhs.shape[0])
    row = jnp.arange(lhs.shape[0], dtype=jnp.int32)[:, None]
    mine = (row >= begins) & (row < ends)
    safe = jnp.where(row < ends[-1], lhs, jnp.zeros((), lhs.dtype)).astype(wide)
    every = jnp.einsum("mk,gkn->mgn", safe, rhs.astype(wide), precision=precision)
    return jnp.sum(jnp.where(mine[:, :, None], every, jnp.zeros((), wide)), axis=1).astype(preferred_element_type)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    lhs, rhs = call.arguments["lhs"], call.arguments["rhs"]
    exactly = {
        "dtype": str(lhs.dtype),
        "rhs": str(rhs.qvalue.dtype if isinstance(rhs, QuantizedArray) else rhs.dtype),
        "k": lhs.shape[1],
        "n": rhs.shape[2],
    }
    return exactly, {"rows": lhs.shape[0], "groups": rhs.shape[0]}


RAGGED_DOT = Operation(
    "ragged_dot",
    (
        Implementation("blocked", _ragged.ragged_dot, configs=_ragged.configs, gradient="first order, reverse mode"),
        Implementation("reference", _reference),
    ),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 1e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: PartitionSpec(axes["lhs"][0]),
)
