"""More or fewer tokens: rows of embeddings and unembeddings are added, with sensible first values, or dropped."""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dovetail_models.layer_lists import checked_indices, checked_shapes, parameter_axes, with_part
from dovetail_models.lazy_model import LazyModel, surgery
from dovetail_models.lazy_parts import Array, finite, generator
from dovetail_weights import Concat, Lazy, Split

__all__ = ["resize_vocabulary"]

ROWS = 4096
"""Tokens whose weights are read at a time."""


@surgery
def resize_vocabulary(
    model: LazyModel,
    size: int,
    *,
    multiple_of: int = 1,
    like: Mapping[int, Sequence[int]] | None = None,
    spread: float = 0.0,
    seed: int = 0,
    shrink: bool = False,
) -> LazyModel:
    """Return a model with more tokens, or fewer.

    The weights of a new token, in embedding, unembedding and bias alike, are the mean of the old ones, so that it is
    about as likely as the average token and takes nothing from the others (Hewitt, "Initializing new word embeddings
    for pretrained language models", 2021). Those of the old tokens, and with them their logits, stay what they are.

    Args:
        model: or a directory, or a `LazyModel`, see `surgery`.
        size: tokens of the result.
        multiple_of: `size` is rounded up to a multiple, such as 128, with new tokens that nobody uses.
        like: for new tokens, the old ones whose mean they are, such as those that their text had before.
        spread: the other new tokens are drawn around the mean, with the covariance of the old ones times this;
            transformers takes 1e-9. 0 for the mean itself.
        seed: of these draws.
        shrink: allow a smaller size, which drops the last tokens.

    Raises:
        TypeError: `size` or `multiple_of` is no integer.
        ValueError: there is no vocabulary; a size, multiple or spread is out of range; `size` is smaller without
            `shrink`, or drops a token that ``token_ids`` names; `like` has tokens that are not new, or unlike ones.
        dovetail_weights.WeightsError: when values are read: old ones are not finite.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> model = Llama(LlamaConfig(vocab_size=10, features=8, hidden=16, layers=1, heads=2), rngs=nnx.Rngs(0))
    >>> wide = resize_vocabulary(model, 12, multiple_of=8, like={10: [3, 4]})
    >>> wide.head.get_value().shape
    (8, 16)
    """
    part = _part(model.config)
    old = functools.reduce(getattr, part, model.config).vocab_size
    new = _new_size(size, multiple_of)
    if not 0 <= spread < math.inf:
        raise ValueError(f"spread={spread}; expected a number of at least 0")
    means = _checked_like(like or {}, old, size)
    if new < old:
        _check_shrinks(model, old, new, allowed=shrink)
    recipe = _Recipe(new, means, spread, seed)
    tensors = dict(model.tensors)
    for address, axes in parameter_axes(model).items():
        if "vocab" in axes.names:
            tensors[address] = _resized(address, tensors[address], axes.names.index("vocab"), recipe)
    config = with_part(model.config, part, {"vocab_size": new})
    return checked_shapes(dataclasses.replace(model, config=config, tensors=tensors))


class _Recipe(NamedTuple):
    """Sizes and first values; see `resize_vocabulary`."""

    size: int
    like: Mapping[int, Sequence[int]]
    spread: float
    seed: int


def _part(config: Any) -> tuple[str, ...]:
    if hasattr(config, "vocab_size"):
        return ()
    parts = [field.name for field in dataclasses.fields(config)]
    found = [name for name in parts if hasattr(getattr(config, name), "vocab_size")]
    if not found:
        raise ValueError(f"{type(config).__name__} has no vocabulary; expected a model of tokens")
    return (found[0],)


def _new_size(size: int, multiple_of: int) -> int:
    size, multiple_of = operator.index(size), operator.index(multiple_of)
    if size < 1 or multiple_of < 1:
        raise ValueError(f"size={size}, multiple_of={multiple_of}; expected both at least 1")
    return math.ceil(size / multiple_of) * multiple_of


def _checked_like(like: Mapping[int, Sequence[int]], old: int, size: int) -> dict[int, list[int]]:
    wrong = [token for token in like if not old <= token < size]
    if wrong:
        raise ValueError(f"like: tokens {wrong}; expected new ones, from {old} to {size - 1}")
    return {token: checked_indices(f"like: tokens for {token}", given, old) for token, given in like.items()}


def _check_shrinks(model: LazyModel, old: int, new: int, *, allowed: bool) -> None:
    if not allowed:
        raise ValueError(f"size={new}, but there are {old} tokens; pass shrink=True to drop the last {old - new}")
    fields = {f.name: getattr(model.config, f.name) for f in dataclasses.fields(model.config) if f.name.endswith("_id")}
    named = {name: ids if isinstance(ids, list) else [ids] for name, ids in {**fields, **model.token_ids}.items()}
    lost = {name: ids for name, ids in named.items() if any(token in range(new, old) for token in ids)}
    if lost:
        raise ValueError(f"size={new} drops tokens that the model's settings name: {lost}; expected to keep them")


def _resized(address: str, tensor: Lazy, axis: int, recipe: _Recipe) -> Lazy:
    old = tensor.shape[axis]
    if recipe.size <= old:
        return Split((recipe.size, old - recipe.size), axis).apply([tensor])[0]

    @functools.cache
    def rows() -> Array:
        return np.moveaxis(_new_rows(address, tensor, axis, recipe), 0, axis).astype(tensor.dtype)

    shape = (*tensor.shape[:axis], recipe.size - old, *tensor.shape[axis + 1 :])
    added = Lazy(shape, tensor.dtype, lambda index: rows()[index])
    return Concat((old, recipe.size - old), axis).apply([tensor, added])[0]


def _new_rows(address: str, tensor: Lazy, axis: int, recipe: _Recipe) -> Array:
    """Return the weights of new tokens, tokens first."""
    old = tensor.shape[axis]

    def read(tokens: slice) -> Array:
        part = tensor.read((slice(None),) * axis + (tokens,))
        return np.moveaxis(finite(address, part), axis, 0).astype(np.float64)

    pieces = [slice(start, min(start + ROWS, old)) for start in range(0, old, ROWS)]
    mean = sum(read(piece).sum(axis=0) for piece in pieces) / old
    rows = np.broadcast_to(mean, (recipe.size - old, *np.shape(mean))).copy()
    if recipe.spread:  # sums of all old ones, weighted at random, have their covariance
        random = generator(recipe.seed, address)
        for piece in pieces:
            weights = random.standard_normal((piece.stop - piece.start, len(rows)))
            rows += np.tensordot(weights, read(piece) - mean, (0, 0)) * (recipe.spread / old) ** 0.5
    for token, given in recipe.like.items():
        rows[token - old] = np.mean([read(slice(i, i + 1))[0] for i in given], axis=0)
    return rows
