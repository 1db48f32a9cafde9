"""The weights seam: every contraction or lookup of a parameter goes through `einsum` and `take`.

Both accept a plain array or a `QuantizedArray`, so that one model definition serves full-precision, quantized and
quantization-aware weights.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dovetail_protocols import QuantizedArray

__all__ = ["einsum", "take"]


def einsum(spec: str, x: jax.Array, w: jax.Array | QuantizedArray) -> jax.Array:
    """Contract activations with a weight; the result has the dtype of `x`.

    The weight is cast to the activations' dtype, so that parameters may be stored in another one. Products of
    16-bit operands are accumulated in float32 by the backend.

    Args:
        spec: an explicit einsum specification of two operands, such as ``"td,df->tf"``.
        x: activations.
        w: a weight, possibly quantized (then it is dequantized to the dtype of `x`).

    Raises:
        ValueError: `spec` does not name two operands and a result, or the shapes do not fit it.

    >>> einsum("td,df->tf", jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    if spec.count(",") != 1 or "->" not in spec:
        raise ValueError(f"spec {spec!r}; expected two operands and an explicit result, such as 'td,df->tf'")
    operands = spec.split("->", maxsplit=1)[0].split(",")
    for name, term, operand in (("x", operands[0], x), ("w", operands[1], w)):
        if "..." not in term and len(term.replace(" ", "")) != operand.ndim:
            raise ValueError(f"{name} has shape {operand.shape}; {term!r} in {spec!r} expects rank {len(term)}")
    return jnp.einsum(spec, x, _plain(w).astype(x.dtype))


def take(w: jax.Array | QuantizedArray, ids: jax.Array) -> jax.Array:
    """Look up rows of a table ``[rows, ...]``; the result has shape ``ids.shape + w.shape[1:]``.

    Out-of-range ids give rows of NaN (jax's ``fill`` mode) rather than another token's row.

    Args:
        w: the table, possibly quantized (then only the rows that are looked up are dequantized).
        ids: integers of any shape.

    Raises:
        TypeError: `ids` are not integers.
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids have dtype {ids.dtype}; expected integers")
    if isinstance(w, QuantizedArray):
        return _take_quantized(w, ids)
    return jnp.take(w, ids, axis=0, mode="fill")


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


def _plain(w: jax.Array | QuantizedArray) -> jax.Array:
    return w.dequantize() if isinstance(w, QuantizedArray) else w
