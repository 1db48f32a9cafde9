"""What all functions of a linear layer's output check and prepare in the same way."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from dovetail_kernels.operation import Call
from dovetail_protocols import LowRankArray, QuantizedArray, as_array

__all__ = ["check_head", "check_rows", "check_static", "dense", "only", "weighted", "whole_vocabulary"]


def check_head(hidden: Any, weight: Any, bias: Any, softcap: float | None, vocab_axis: str | None = None) -> None:
    """Check hidden states against the layer they go through."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[0] or not weight.shape[1]:
        raise ValueError(
            f"hidden {hidden.shape}, weight {weight.shape}; "
            "expected [tokens, features] and [features, vocab] with vocab > 0"
        )
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"hidden has dtype {hidden.dtype}; expected a float")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"bias has shape {bias.shape}; expected {weight.shape[1:]}")
    check_static("softcap", softcap)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; expected a positive number or None")
    if vocab_axis is None:
        return
    varying = frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(weight)))
    if vocab_axis not in varying:
        raise ValueError(
            f"vocab_axis={vocab_axis!r}, but weight varies over {sorted(varying)}; "
            "expected a call inside jax.shard_map (check_vma=True, its default) with weight sharded over that axis"
        )


def check_static(name: str, value: Any) -> None:
    """Check that a number is known while the call is traced."""
    if isinstance(value, Tracer):
        raise TypeError(f"{name} is traced; expected a Python number: make it inside the jitted function")


def check_rows(hidden: Any, *, tokens: Any = None, targets: Any = None, loss_weights: Any = None) -> None:
    """Check what there is per row, by name."""
    for name, array in (("targets", targets), ("tokens", tokens)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} have dtype {array.dtype}; expected integers")
    for name, array in (("targets", targets), ("tokens", tokens), ("loss_weights", loss_weights)):
        if array is not None and array.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {array.shape}; expected {hidden.shape[:1]}")


def dense(weight: Any) -> jax.Array:
    """Return a weight as an array; a quantized one has no gradient, but its adapter has."""
    if isinstance(weight, LowRankArray):
        return dataclasses.replace(weight, base=dense(weight.base)).dense()
    return jax.lax.stop_gradient(as_array(weight)) if isinstance(weight, QuantizedArray) else weight


def only(live: jax.Array, tree: Any) -> Any:
    """Replace what the other rows hold, so that not even NaN spreads from them."""

    def keep(x: jax.Array) -> jax.Array:
        return jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))

    return jax.tree.map(keep, tree)


def weighted(numbers: jax.Array, weights: jax.Array | None) -> jax.Array:
    """Return what rows count; a row of weight 0 counts nothing, even where its number is infinite."""
    return numbers if weights is None else jnp.where(weights != 0, numbers * weights, jnp.zeros((), numbers.dtype))


def whole_vocabulary(call: Call) -> Literal[True] | str:
    """Tell whether a call has the vocabulary on one device."""
    options = call.arguments.get("options")
    axis = call.arguments.get("vocab_axis") if options is None else options.vocab_axis
    return True if axis is None else f"needs the whole vocabulary, not parts over {axis!r}"
