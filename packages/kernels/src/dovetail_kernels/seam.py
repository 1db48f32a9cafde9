"""The weights seam: every contraction or lookup of a parameter goes through `einsum` and `take`.

Both accept a plain array, a `QuantizedArray` or a `LowRankArray`, so that one model definition serves full-precision,
quantized, quantization-aware and adapted weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dovetail_kernels._dtypes import int32
from dovetail_kernels._low_rank import low_rank_einsum, low_rank_rows
from dovetail_kernels._manual import alike
from dovetail_kernels._programs import partitioned
from dovetail_kernels.quantized_matmul import quantized_matmul
from dovetail_protocols import LowRankArray, QuantizedArray, Weight, as_array

__all__ = ["einsum", "take"]


def einsum(spec: str, x: jax.Array, w: Weight, *, dtype: Any = None) -> jax.Array:
    """Contract activations with a weight.

    The weight is cast to the activations' dtype, so that parameters may be stored in another one. Products of
    16-bit operands are accumulated in float32 by the backend.

    Args:
        spec: an explicit einsum specification of two operands, such as ``"td,df->tf"``.
        x: activations.
        w: a weight, possibly quantized: then it is dequantized to the dtype of `x`, block by block where
            `quantized_matmul` can. With an adapter ``x a b`` is added to the product with the base: neither the sum of
            both nor a gradient of the base is made, unless a letter repeats, an ellipsis stands for axes, or a
            magnitude is of outputs that are neither all summed over nor all kept.
        dtype: of the result; None for that of `x`. A wider one keeps what the sums have.

    Raises:
        ValueError: `spec` does not name two operands and a result, or the shapes do not fit it.
        TypeError: `x` is not a float.

    >>> einsum("td,df->tf", jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected a float")
    _check(spec, x.shape, w.shape)
    if isinstance(w, QuantizedArray) and _is_matmul(spec, x, w):
        return quantized_matmul(x, w).astype(x.dtype if dtype is None else dtype)
    if isinstance(w, LowRankArray):
        return low_rank_einsum(einsum, spec, x, w, dtype)
    return jnp.einsum(spec, x, as_array(w).astype(x.dtype), preferred_element_type=dtype)


def _is_matmul(spec: str, x: jax.Array, w: QuantizedArray) -> bool:
    """Whether this is ``x @ w`` in float32, of operands that no mesh axis divides explicitly."""
    operands, _, result = spec.replace(" ", "").partition("->")
    left, right = operands.split(",")
    if len(right) != 2 or left[-1:] != right[0] or result != left[:-1] + right[1] or len(set(result)) != len(result):
        return False
    whole = all(not any(jax.typeof(part).sharding.spec) for part in (x, w.qvalue, w.scale))
    return whole and right[0] not in result and x.dtype == w.dtype == jnp.float32


def _check(spec: str, *shapes: tuple[int, ...]) -> None:
    operands, arrow, result = spec.replace(" ", "").partition("->")
    terms = operands.split(",")
    if not arrow or len(terms) != 2:
        raise ValueError(f"spec {spec!r}; expected two operands and an explicit result, such as 'td,df->tf'")
    sizes = dict[str, int]()
    for name, term, shape in zip("xw", terms, shapes, strict=True):
        if "..." in term:
            continue
        if len(term) != len(shape):
            raise ValueError(f"{name} has shape {shape}; {term!r} in {spec!r} expects rank {len(term)}")
        for axis, size in zip(term, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"axis {axis!r} of {spec!r} has two lengths in x {shapes[0]} and w {shapes[1]}")
    if unknown := set(result) - set(operands):
        raise ValueError(f"the result of {spec!r} has the axes {sorted(unknown)}, which no operand has")


def take(w: Weight, ids: jax.Array) -> jax.Array:
    """Look up rows of a table ``[rows, ...]``; the result has shape ``ids.shape + w.shape[1:]``.

    Ids outside ``[0, rows)`` give rows of NaN rather than another token's row, and no gradient. The gradient of a table
    of 16 bits is added up in float32.

    Args:
        w: the table, possibly quantized (then only the rows that are looked up are dequantized) or adapted (then rows
            of both are looked up, and the base has no gradient of its own; one with leading axes is added up first).
        ids: integers of any shape.

    Raises:
        TypeError: `ids` are not integers.
        ValueError: `w` is a scalar.

    >>> take(jnp.array([[1.0], [2.0]]), jnp.array([1, 5]))
    Array([[ 2.],
           [nan]], dtype=float32)
    """
    if not w.ndim:
        raise ValueError("w has shape (); expected a table [rows, ...]")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids have dtype {ids.dtype}; expected integers")
    if not w.shape[0]:
        w, ids = jnp.zeros((1, *w.shape[1:]), w.dtype), jnp.ones_like(ids)
    if isinstance(w, LowRankArray):
        return low_rank_rows(take, w, ids)
    return partitioned(_taken, {"w": w, "ids": int32(ids)}, _taken_axes)


def _taken_axes(_: Any, axes: Any) -> PartitionSpec:
    return PartitionSpec(*axes["ids"], *(axis if axis not in axes["ids"] else None for axis in axes["w"][1:]))


def _taken(w: jax.Array | QuantizedArray, ids: jax.Array) -> jax.Array:
    if isinstance(w, QuantizedArray):
        return _take_quantized(w, ids)
    ids = jnp.where(ids < 0, w.shape[0], ids)
    if jnp.issubdtype(w.dtype, jnp.floating) and w.dtype.itemsize < 4:
        return _take_short(*alike(w, ids))
    return jnp.take(w, ids, axis=0, mode="fill")


@jax.custom_vjp
def _take_short(w: jax.Array, ids: jax.Array) -> jax.Array:
    """Look up rows of 16 bits; their gradients add up in float32, or tokens that come often would lose most of it."""
    return jnp.take(w, ids, axis=0, mode="fill")


def _take_short_forward(w: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _take_short(w, ids), (w, ids)


def _take_short_backward(saved: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    w, ids = saved
    total = jnp.zeros_like(w, dtype=jnp.float32).at[ids].add(cotangent.astype(jnp.float32), mode="drop")
    return total.astype(w.dtype), None


_take_short.defvjp(_take_short_forward, _take_short_backward)


def _take_quantized(w: QuantizedArray, ids: jax.Array) -> jax.Array:
    flat = ids.reshape(-1)

    def rows(part: Any) -> Any:
        if part is None:
            return None
        if part.shape[0] == 1:
            return part
        return jnp.take(part, flat // (w.shape[0] // part.shape[0]), axis=0, mode="clip")

    picked = QuantizedArray(rows(w.qvalue), rows(w.scale), rows(w.zero_point), w.dtype)
    out = picked.dequantize()
    inside = (flat >= 0) & (flat < w.shape[0])
    out = jnp.where(inside.reshape(-1, *(1,) * (out.ndim - 1)), out, jnp.asarray(jnp.nan, out.dtype))
    return out.reshape(*ids.shape, *w.shape[1:])
