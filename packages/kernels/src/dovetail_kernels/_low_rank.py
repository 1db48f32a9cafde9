"""Products with adapted weights by way of the thin arrays, so that neither the sum nor its gradient is ever made."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_protocols import LowRankArray

__all__ = ["low_rank_einsum", "low_rank_rows", "multiplied"]

Einsum = Callable[..., jax.Array]


class Terms(NamedTuple):
    """The axes of a product by letters."""

    x: str
    a: str
    b: str
    outputs: str
    """Leading axes of the weight and those of its outputs, which a magnitude has."""
    result: str

    @classmethod
    def of(cls, spec: str, w: LowRankArray) -> "Terms | None":
        """Return those of an einsum specification; None where a letter comes twice or an ellipsis stands for some."""
        operands, _, result = spec.replace(" ", "").partition("->")
        x, weight = operands.split(",")
        if "." in spec or any(len(set(term)) != len(term) for term in (x, weight, result)):
            return None
        leading, rest = weight[: w.leading], weight[w.leading :]
        inputs, outputs = rest[: w.inputs], rest[w.inputs :]
        rank = next(letter for letter in "rqpuvwyzRQPUVWYZ" if letter not in spec)
        return cls(x, leading + inputs + rank, leading + rank + outputs, leading + outputs, result)

    def order(self, w: LowRankArray) -> tuple[tuple[str, jax.Array], tuple[str, jax.Array]]:
        """Return the thin arrays in the order in which they multiply: first the one whose axes are summed over."""
        first, second = (self.a, w.a), (self.b, w.b)
        summed = set(self.x) - set(self.result)
        return (second, first) if summed & set(self.b) and not summed & set(self.a) else (first, second)


def low_rank_einsum(einsum: Einsum, spec: str, x: jax.Array, w: LowRankArray, dtype: Any) -> jax.Array:
    """Contract with the base and with the product, which is multiplied from the left; see `einsum`."""
    terms = Terms.of(spec, w)
    if terms is None:
        return einsum(spec, x, w.dense(), dtype=dtype)
    if w.magnitude is None:
        return _sum(einsum, spec, terms, x, w, dtype)
    if set(terms.outputs) <= set(terms.result):
        return multiplied(_sum(einsum, spec, terms, x, w, dtype), terms.result, w.gain(), terms.outputs)
    if set(terms.outputs) <= set(terms.x):
        return _sum(einsum, spec, terms, multiplied(x, terms.x, w.gain(), terms.outputs), w, dtype)
    return einsum(spec, x, w.dense(), dtype=dtype)


def _sum(einsum: Einsum, spec: str, terms: Terms, x: jax.Array, w: LowRankArray, dtype: Any) -> jax.Array:
    (first, one), (second, other) = terms.order(w)
    between = "".join(dict.fromkeys(axis for axis in terms.x + first if axis in second + terms.result))
    thin = jnp.einsum(f"{terms.x},{first}->{between}", x, one.astype(x.dtype)) * w.scale
    spec_out = f"{between},{second}->{terms.result}"
    change = jnp.einsum(spec_out, thin, other.astype(x.dtype), preferred_element_type=dtype)
    return einsum(spec, x, w.base, dtype=dtype) + change


def multiplied(y: jax.Array, axes: str, factors: jax.Array, named: str) -> jax.Array:
    """Return an array times factors that have some of its axes, computed in the factors' dtype."""
    order = [named.index(axis) for axis in axes if axis in named]
    shape = [factors.shape[named.index(axis)] if axis in named else 1 for axis in axes]
    wide = factors.transpose(order).reshape(shape)
    return (y.astype(wide.dtype) * wide).astype(y.dtype)


def low_rank_rows(take: Callable[..., jax.Array], w: LowRankArray, ids: jax.Array) -> jax.Array:
    """Look up rows of an adapted table; see `take`."""
    if w.leading:
        return take(w.dense(), ids)
    rows, thin = take(w.base, ids), take(w.a, ids)
    wide = jnp.promote_types(jnp.promote_types(thin.dtype, w.b.dtype), jnp.float32)
    change = jnp.tensordot(thin.astype(wide), w.b.astype(wide), axes=1)
    total = rows.astype(wide) + w.scale * change
    return (total if w.magnitude is None else total * w.gain().astype(wide)).astype(rows.dtype)
