"""Mixture of experts: which experts a token goes to, and the way there and back.

The parts compose around any expert network, such as two grouped products::

    routing = route(x @ router, top_k=2)
    dispatch = sort_by_expert(routing.experts, experts)
    rows = permute(x, dispatch)
    rows = ragged_dot(silu(ragged_dot(rows, up, dispatch.group_sizes)), down, dispatch.group_sizes)
    y = combine(rows, routing.weights, dispatch)

Sorting counts, and moving rows there and back only gathers, in the backward pass too.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from dovetail_kernels._dtypes import exact, int32
from dovetail_kernels._manual import alike

__all__ = [
    "Dispatch",
    "ExpertGroups",
    "Routing",
    "combine",
    "permute",
    "route",
    "sort_by_expert",
]

BLOCK = 32


@dataclasses.dataclass(frozen=True)
class ExpertGroups:
    """Selection in two steps: a token first chooses groups of experts, then experts of these.

    Attributes:
        count: number of groups of consecutive experts.
        keep: groups that a token chooses.
        best: a group is worth the sum of its `best` highest scores: 2 in DeepSeek-V3, 1 in DeepSeek-V2.
    """

    count: int
    keep: int
    best: int = 2


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        experts: of each token, the best first.
        weights: of the experts' outputs, float32 (float64 for float64 logits).
        scores: of all experts, in the same dtype.
    """

    experts: Int[Array, "tokens k"]
    weights: Float[Array, "tokens k"]
    scores: Float[Array, "tokens experts"]


def route(
    logits: Float[Array, "tokens experts"],
    top_k: int,
    *,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    bias: Float[Array, " experts"] | None = None,
    groups: ExpertGroups | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    experts: Integer[Array, "tokens k"] | None = None,
) -> Routing:
    """Choose the `top_k` experts of each token and the weights of their outputs.

    The gradient reaches the logits through the weights and scores; the choice has none. Of equal scores the lower
    expert wins.

    Args:
        logits: of the router.
        top_k: experts per token.
        scoring: how logits become scores: over all experts, or each alone.
        bias: added to the scores for the choice only, to balance experts without a loss (arXiv:2408.15664).
        groups: choose groups first (DeepSeek-V2, arXiv:2405.04434; V3, arXiv:2412.19437); None chooses among all.
        renormalize: divide the weights by their sum. With softmax that is the softmax over the chosen logits.
        scale: factor of the weights.
        experts: of tokens that chose before, as when a sampler's choices are trained on; -1 for those that choose now.

    Raises:
        ValueError: `top_k` or `groups` do not fit the number of experts, an unknown scoring, a bias or earlier choices
            of a wrong shape.
        TypeError: logits that are not floats.

    >>> route(jnp.array([[0.0, 2.0, 1.0]]), 2).experts
    Array([[1, 2]], dtype=int32)
    """
    _check_route(logits, top_k, scoring, bias, groups)
    if experts is not None and experts.shape != (logits.shape[0], top_k):
        raise ValueError(
            f"experts have shape {experts.shape}; expected {(logits.shape[0], top_k)}, those of each token"
        )
    logits = logits.astype(exact(logits.dtype))
    scores = jax.nn.softmax(logits, axis=1) if scoring == "softmax" else jax.nn.sigmoid(logits)
    choice = jax.lax.stop_gradient(scores)
    if bias is not None:
        choice = choice + jax.lax.stop_gradient(bias).astype(choice.dtype)
    if groups is not None:
        choice = _within(choice, groups)
    best = jax.lax.top_k(choice, top_k)[1]
    experts = best if experts is None else jnp.where(experts < 0, best, int32(experts))
    weights = jnp.take_along_axis(scores, experts, axis=1)
    if renormalize:
        total = jnp.sum(weights, axis=1, keepdims=True)
        weights = weights / _positive(total)
    return Routing(experts, weights * scale if scale != 1 else weights, scores)


def _check_route(logits: Any, top_k: int, scoring: str, bias: Any, groups: ExpertGroups | None) -> None:
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits have dtype {logits.dtype}; expected a float")
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}; expected [tokens, experts]")
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring={scoring!r}; expected 'softmax' or 'sigmoid'")
    experts = available = logits.shape[1]
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {bias.shape}; expected ({experts},), one per expert")
    if groups is not None:
        if not (groups.count > 0 and experts % groups.count == 0 and 0 < groups.keep <= groups.count):
            raise ValueError(f"{groups}; expected a count that divides {experts} experts, and to keep 1 to count")
        size = experts // groups.count
        if not 0 < groups.best <= size:
            raise ValueError(f"{groups}; groups have {size} experts, expected best between 1 and that")
        available = groups.keep * size
    if not 0 < top_k <= available:
        raise ValueError(f"top_k={top_k}; expected between 1 and the {available} experts to choose from")


def _positive(total: jax.Array) -> jax.Array:
    """Return sums of scores to divide by; all scores of a sigmoid may underflow to 0."""
    return jnp.maximum(total, jnp.finfo(total.dtype).tiny)


def _within(choice: jax.Array, groups: ExpertGroups) -> jax.Array:
    """Put the scores of experts in other than a token's best groups below all others."""
    split = choice.reshape(choice.shape[0], groups.count, -1)
    worth = jnp.sum(jax.lax.top_k(split, groups.best)[0], axis=2)
    kept = jax.lax.top_k(worth, groups.keep)[1]
    inside = jnp.any(kept[:, :, None] == jnp.arange(groups.count, dtype=kept.dtype), axis=1)
    return jnp.where(inside[:, :, None], split, -jnp.inf).reshape(choice.shape)


class Dispatch(NamedTuple):
    """Where every choice of a token goes among rows that are sorted by expert.

    Attributes:
        source: the choice in a row, numbered token by token; ``tokens * k`` in a row that is empty.
        places: the row of each choice; the number of rows where it was dropped.
        group_sizes: rows of each expert that are used.
    """

    source: Int[Array, " rows"]
    places: Int[Array, "tokens k"]
    group_sizes: Int[Array, " experts"]

    @property
    def dropped(self) -> Bool[Array, "tokens k"]:
        """Tell which choices have no row."""
        return self.places == self.source.shape[0]


def sort_by_expert(
    experts: Integer[Array, "tokens k"],
    num_experts: int,
    *,
    capacity: int | None = None,
    where: Bool[Array, " tokens"] | None = None,
) -> Dispatch:
    """Give every choice of a token a row, those of an expert together and in the order of tokens.

    Without a capacity there are ``tokens * k`` rows and nothing is dropped: expert e's follow those of e - 1, as
    `ragged_dot` takes them. With one there are ``num_experts * capacity`` rows: expert e's begin at ``e * capacity``,
    what exceeds them is dropped from the last token on, and ``permute(x, dispatch).reshape(num_experts, capacity, -1)``
    is a batch per expert (GShard, arXiv:2006.16668).

    Args:
        experts: of each token; one outside ``[0, num_experts)`` is no choice, and dropped.
        num_experts: number of experts.
        capacity: rows of each expert.
        where: tokens that take part, default all; the choices of others are dropped.

    Raises:
        ValueError: shapes that do not fit, or no expert or capacity.
        TypeError: experts that are not integers.

    >>> sort_by_expert(jnp.array([[1], [0], [1]]), 2)
    Dispatch(source=Array([1, 0, 2], dtype=int32), places=Array([[1],
           [0],
           [2]], dtype=int32), group_sizes=Array([1, 2], dtype=int32))
    >>> sort_by_expert(jnp.array([[1], [0], [1]]), 2, capacity=1).dropped[:, 0]
    Array([False, False,  True], dtype=bool)
    """
    _check_sort(experts, num_experts, capacity, where)
    experts, count = int32(experts), experts.size
    live = (experts >= 0) & (experts < num_experts)
    live = live if where is None else live & where[:, None]
    keys = jnp.where(live, experts, num_experts).reshape(-1)
    ranks, sizes = _ranks(keys, num_experts)
    if capacity is None:
        rows, begins = count, jnp.cumsum(sizes) - sizes
    else:
        rows, begins = num_experts * capacity, capacity * jnp.arange(num_experts, dtype=jnp.int32)
        live = live & (ranks < capacity).reshape(live.shape)
        sizes = jnp.minimum(sizes, capacity)
    places = jnp.where(live.reshape(-1), ranks + jnp.take(begins, keys, mode="clip"), rows)
    source = jnp.full_like(places, count, shape=(rows,))
    source = source.at[places].set(jnp.arange(count, dtype=jnp.int32), mode="drop")
    return Dispatch(source, places.reshape(experts.shape), sizes)


def _check_sort(experts: Any, num_experts: int, capacity: int | None, where: Any) -> None:
    if not jnp.issubdtype(experts.dtype, jnp.integer):
        raise TypeError(f"experts have dtype {experts.dtype}; expected integers")
    if experts.ndim != 2:
        raise ValueError(f"experts have shape {experts.shape}; expected [tokens, k]")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}; expected at least 1")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity={capacity}; expected at least 1, or None to drop nothing")
    if where is not None and where.shape != experts.shape[:1]:
        raise ValueError(f"where has shape {where.shape}; expected {experts.shape[:1]}, one per token")


def _ranks(keys: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Return how many equal keys precede each, and how often each expert occurs; by blocks, in linear time."""
    count = keys.shape[0]
    if not count:
        return keys, jnp.zeros_like(keys, shape=(num_experts,))
    blocks = jnp.pad(keys, (0, -count % BLOCK), constant_values=num_experts).reshape(-1, BLOCK)
    earlier = jnp.tril(jnp.ones((BLOCK, BLOCK), bool), -1)
    within = jnp.sum((blocks[:, :, None] == blocks[:, None, :]) & earlier, axis=2, dtype=jnp.int32)
    counts = jnp.sum(blocks[:, :, None] == jnp.arange(num_experts, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    upto = jnp.cumsum(counts, axis=0)
    before = jnp.take_along_axis(upto - counts, blocks, axis=1, mode="clip")
    return (within + before).reshape(-1)[:count], upto[-1]


def permute(x: Float[Array, "tokens features"], dispatch: Dispatch) -> Float[Array, "rows features"]:
    """Copy tokens to the rows of the experts they chose; empty rows are 0.

    The gradient (reverse mode, any order) is a gather as well.

    Raises:
        ValueError: the dispatch is of another number of tokens.

    >>> permute(jnp.array([[1.0], [2.0], [3.0]]), sort_by_expert(jnp.array([[1], [0], [1]]), 2))[:, 0]
    Array([2., 1., 3.], dtype=float32)
    """
    _check_rows("x", x, dispatch.places.shape[0], "one per token")
    x, source, places = alike(x, dispatch.source, dispatch.places)
    return _spread(x, source, places)


def combine(
    y: Float[Array, "rows features"], weights: Float[Array, "tokens k"], dispatch: Dispatch
) -> Float[Array, "tokens features"]:
    """Return the weighted sums of the rows that each token's choices went to; what was dropped adds nothing.

    Sums are float32 (float64 for float64), the result has the dtype of `y`. The gradient (reverse mode, first order)
    only gathers.

    Raises:
        ValueError: rows or weights do not fit the dispatch.

    >>> dispatch = sort_by_expert(jnp.array([[1, 0]]), 2)
    >>> combine(jnp.array([[10.0], [20.0]]), jnp.array([[0.25, 0.75]]), dispatch)
    Array([[12.5]], dtype=float32)
    """
    _check_rows("y", y, dispatch.source.shape[0], "one per row of the dispatch")
    if weights.shape != dispatch.places.shape:
        raise ValueError(f"weights have shape {weights.shape}; expected {dispatch.places.shape}, one per choice")
    return _combine(*alike(y, weights, dispatch.source, dispatch.places))


def _check_rows(name: str, x: Any, rows: int, what: str) -> None:
    if x.ndim != 2 or x.shape[0] != rows:
        raise ValueError(f"{name} has shape {x.shape}; expected [{rows}, features], {what}")


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    if not x.shape[0]:
        return jnp.zeros_like(x, shape=(*index.shape, *x.shape[1:]))
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _spread(x: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """Return row r's token; 0 where it has none."""
    return _take(x, source // places.shape[1])


@jax.custom_vjp
def _gather(y: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    """Return the sum of the rows of each token's choices."""
    del source
    return jnp.sum(_take(y, places).astype(exact(y.dtype)), axis=1).astype(y.dtype)


def _linear(forward: Any, transpose: Any) -> None:
    """Make `transpose` the gradient of `forward`."""

    def forward_rule(x: jax.Array, source: jax.Array, places: jax.Array) -> tuple[Any, Any]:
        return forward(x, source, places), (source, places)

    def backward_rule(saved: Any, ct: jax.Array) -> tuple[Any, None, None]:
        return transpose(ct, *saved), None, None

    forward.defvjp(forward_rule, backward_rule)


_linear(_spread, _gather)
_linear(_gather, _spread)


@jax.custom_vjp
def _combine(y: jax.Array, weights: jax.Array, source: jax.Array, places: jax.Array) -> jax.Array:
    del source
    wide = exact(y.dtype)
    return jnp.einsum("tk,tkd->td", weights.astype(wide), _take(y, places).astype(wide)).astype(y.dtype)


def _combine_forward(y: jax.Array, weights: jax.Array, source: jax.Array, places: jax.Array) -> tuple[Any, Any]:
    return _combine(y, weights, source, places), (y, weights, source, places)


def _combine_backward(saved: Any, d_out: jax.Array) -> tuple[Any, Any, None, None]:
    y, weights, source, places = saved
    wide = exact(y.dtype)
    factor = _take(weights.reshape(-1), source).astype(wide)[:, None]
    d_y = factor * _take(d_out, source // places.shape[1]).astype(wide)
    d_weights = jnp.einsum("td,tkd->tk", d_out.astype(wide), _take(y, places).astype(wide))
    return d_y.astype(y.dtype), d_weights.astype(weights.dtype), None, None


_combine.defvjp(_combine_forward, _combine_backward)
