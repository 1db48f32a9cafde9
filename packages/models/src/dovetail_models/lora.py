"""LoRA, DoRA and rsLoRA: parameters with adapters, chosen by pattern (arXiv:2106.09685, 2402.09353, 2312.03732).

An adapted parameter is a `dovetail_protocols.LowRankArray` in the place of a plain or quantized one: any model takes
it, and its thin arrays have addresses of their own, ``layers/0/attention/query/a``. The base stays what it is, so that
taking the adapter off gives it back bit by bit.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from dovetail_models.layers import leading_axes
from dovetail_models.lazy_parts import computing_dtype
from dovetail_models.state import nested, replaced, variables
from dovetail_protocols import LowRankArray, paths

M = TypeVar("M", bound=nnx.Module)

__all__ = ["LORA", "adapted", "add_lora", "check_finite", "check_in_memory", "division", "remove_lora"]

LORA = "**/{a,b,magnitude}"
"""The pattern of what trains of an adapted model; no other parameter of this package has such a name."""


def add_lora(
    model: M,
    patterns: str | Iterable[str],
    *,
    rank: int,
    rngs: nnx.Rngs,
    alpha: float | None = None,
    rslora: bool = False,
    dora: bool = False,
    dtype: Any = None,
) -> M:
    """Return the model with adapters that change nothing yet: one of their two arrays is 0.

    Args:
        model: its parameters may be quantized.
        patterns: of addresses of weights that products or lookups take, see `dovetail_protocols.paths.select`; those of
            layers, experts and the embedding alike. In a `Stack` the layers of a cycle have one address.
        rank: of the adapters, for every layer and expert.
        rngs: where the initial values come from: uniform as those of a linear layer, normal for embeddings, whose other
            array is the one that is 0, so that rows which are never looked up never change.
        alpha: the product is scaled by ``alpha / rank``; None for `rank`.
        rslora: it is scaled by ``alpha / sqrt(rank)``.
        dora: every output has a magnitude, at first its norm.
        dtype: of the adapters; None for float32 (float64 for float64), whatever that of the weights is.

    Raises:
        PatternError: a pattern matches nothing.
        TypeError: `model` is a directory or a `LazyModel`.
        ValueError: a parameter that is neither multiplied nor looked up (a norm, a bias), has an adapter already or
            holds NaN; a rank below 1, an alpha that is no positive number, or a dtype that is no float.

    >>> from dovetail_models import Llama, LlamaConfig, split
    >>> model = Llama(LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2), rngs=nnx.Rngs(0))
    >>> model = add_lora(model, "layers/*/attention/{query,value}", rank=4, rngs=nnx.Rngs(1))
    >>> split(model)[1]["layers"][0]["attention"]["query"].a.shape
    (8, 4)
    """
    check_in_memory(model)
    known = variables(model)
    chosen = paths.select(nested(dict.fromkeys(known, 0)), patterns)
    alpha = float(rank if alpha is None else alpha)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank!r}; expected an integer of at least 1")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}; expected a positive number")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={dtype}; expected a floating-point dtype")
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    made: dict[str, Any] = {}
    for address in chosen:
        leading, inputs = division(address, known[address])
        base = known[address].get_value()
        check_finite(address, base)
        kind = computing_dtype(base) if dtype is None else jnp.dtype(dtype)
        a, b = _initial(base.shape, leading, inputs, rank, known[address].get_metadata()["table"], rngs, kind)
        weight = LowRankArray(base, a, b, None, scale)
        made[address] = LowRankArray(base, a, b, weight.norm().astype(kind), scale) if dora else weight
    return replaced(model, made)


def _initial(
    shape: tuple[int, ...], leading: int, inputs: int, rank: int, table: bool, rngs: nnx.Rngs, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    end = leading + inputs
    one, other = (*shape[:end], rank), (*shape[:leading], rank, *shape[end:])
    if table:
        return jnp.zeros(one, dtype), jax.random.normal(rngs.params(), other, dtype)
    bound = math.prod(shape[leading:end]) ** -0.5
    return jax.random.uniform(rngs.params(), one, dtype, -bound, bound), jnp.zeros(other, dtype)


def division(address: str, variable: Any) -> tuple[int, int]:
    """Return how many leading axes a parameter has, and how many after them a product sums over.

    Raises:
        ValueError: it has an adapter already, or is neither multiplied nor looked up.
    """
    metadata, value = variable.get_metadata(), variable.get_value()
    if isinstance(value, LowRankArray):
        raise ValueError(f"{address}: has an adapter already; merge_lora or remove_lora takes it off")
    inputs = 1 if metadata.get("table") else metadata.get("inputs", 0)
    if not inputs:
        raise ValueError(
            f"{address}: a parameter {tuple(value.shape)} that is neither multiplied nor looked up, such as a norm or "
            "a bias, has no adapter; expected patterns of weights"
        )
    return leading_axes(tuple(metadata["axes"]), inputs), inputs


def adapted(model: nnx.Module) -> dict[str, LowRankArray]:
    """Return the adapted parameters by address.

    Raises:
        TypeError: it is no model in memory.
        ValueError: there are none.
    """
    check_in_memory(model)
    found = {address: variable.get_value() for address, variable in variables(model).items()}
    found = {address: value for address, value in found.items() if isinstance(value, LowRankArray)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters; add_lora or with_lora adds some")
    return found


def remove_lora(model: M) -> M:
    """Return the model without its adapters: every weight is bit by bit what it was before, the same array.

    Raises:
        ValueError: there are no adapters.

    >>> from dovetail_models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2), rngs=nnx.Rngs(0))
    >>> adapted = add_lora(model, "embedding", rank=4, rngs=nnx.Rngs(1))
    >>> remove_lora(adapted).embedding.get_value() is model.embedding.get_value()
    True
    """
    return replaced(model, {address: weight.base for address, weight in adapted(model).items()})


def check_in_memory(model: Any) -> None:
    """Check that a model is one in memory.

    Raises:
        TypeError: it is a directory, a `LazyModel`, or something else.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"the model is {type(model).__name__}; expected a model in memory, such as from_pretrained(path) or "
            "LazyModel.build() (merge_lora and save_lora take a directory or a LazyModel, too, together with adapter=)"
        )


def check_finite(address: str, value: Any) -> None:
    """Check the numbers of an array or of the parts of one, where they are known.

    Raises:
        ValueError: some are not finite.
    """
    for leaf in jax.tree.leaves(value):
        known = not isinstance(leaf, Tracer | jax.ShapeDtypeStruct)
        if known and jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"{address}: holds NaN or infinity; expected finite numbers")
