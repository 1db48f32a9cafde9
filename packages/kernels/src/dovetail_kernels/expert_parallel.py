"""Experts that are spread over the devices of a mesh axis, inside ``jax.shard_map``; nothing is dropped.

Every device holds an equal part of the experts and of the tokens. With "all_to_all" rows go to the device of their
expert and come back (GShard, arXiv:2006.16668): a bounded number for each pair of devices, and again until all have
been there. With "ring" the tokens of each device go round, and every device adds what its experts make of them. Loops
that often, and buffers of fixed size, are what shapes known ahead and tokens that choose freely leave.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.moe import Dispatch, Routing, combine, permute, sort_by_expert

__all__ = ["expert_parallel"]

ALIGN = 8


class How(NamedTuple):
    """The static part of a call.

    Attributes:
        function: of parameters, rows and group sizes.
        tree: the structure of the parameters.
        axis: of the mesh.
        experts: of a device.
        rows: of a buffer: for each pair of devices, or for the tokens of one device at another.
    """

    function: Callable[..., jax.Array]
    tree: Any
    axis: str
    experts: int
    rows: int

    def apply(self, params: "Params", rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """Transform rows that are sorted by expert."""
        leaves = [one if other is None else other for one, other in zip(*params, strict=True)]
        return self.function(jax.tree.unflatten(self.tree, leaves), rows, group_sizes)


class Params(NamedTuple):
    """Leaves of the parameters: those with gradients, and the others, such as quantized ones; None where it is not."""

    learned: tuple[jax.Array | None, ...]
    fixed: tuple[jax.Array | None, ...]


class Tokens(NamedTuple):
    """Tokens on their way, with what they chose: ``[tokens, features]``, ``[tokens, k]`` and ``[tokens, k]``."""

    x: jax.Array
    weights: jax.Array
    experts: jax.Array


def expert_parallel(
    function: Callable[[Any, jax.Array, jax.Array], jax.Array],
    params: Any,
    x: Float[Array, "tokens features"],
    routing: Routing,
    *,
    axis: str,
    exchange: Literal["all_to_all", "ring"] = "all_to_all",
    slack: float = 1.25,
) -> Float[Array, "tokens features"]:
    """Return the weighted sums of what each token's experts make of it, wherever these are.

    Memory is that of this device's tokens and of buffers for `slack` times the rows that balanced experts would have;
    experts that are chosen more often take more rounds. The backward pass (reverse mode, first order) makes the buffers
    again. Round trips of "all_to_all" carry rows to their experts only; "ring" sends every token to every device, which
    is less where tokens choose as many experts as there are devices.

    Args:
        function: ``function(params, rows, group_sizes)`` transforms rows that are sorted by expert, of this device's
            experts alone; it may hold no arrays but those in `params`.
        params: of this device's experts, a pytree of arrays; those that are no floats get no gradient.
        x: this device's tokens.
        routing: of these tokens, to all experts: device n has the n-th equal part of them. An expert outside of their
            number is none.
        axis: name of the mesh axis that experts and tokens are spread over.
        exchange: how they meet.
        slack: rows of a buffer relative to those of balanced experts.

    Raises:
        ValueError: the experts are no multiple of the devices, an unknown exchange, or `slack` not above 0.
    """
    devices, count = jax.lax.axis_size(axis), routing.scores.shape[1]
    if count % devices:
        raise ValueError(f"{count} experts over {devices} devices of {axis!r}; expected a multiple")
    if exchange not in ("all_to_all", "ring"):
        raise ValueError(f"exchange={exchange!r}; expected 'all_to_all' or 'ring'")
    if not slack > 0:
        raise ValueError(f"slack={slack}; expected more than 0")
    choices = routing.experts.size
    if not choices:
        return x
    rows = min(choices, -(-int(slack * choices / devices + 0.5) // ALIGN) * ALIGN or ALIGN)
    leaves, tree = jax.tree.flatten(params)
    *leaves, x, weights, experts = alike(*leaves, x, routing.weights, routing.experts)
    floats = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    learned, fixed = (
        tuple(leaf if is_float is wanted else None for leaf, is_float in zip(leaves, floats, strict=True))
        for wanted in (True, False)
    )
    how = How(function, tree, axis, count // devices, rows)
    run = _exchanged if exchange == "all_to_all" else _ring
    return run(how, Params(learned, fixed), Tokens(x, weights, experts)).astype(x.dtype)


def _exchanged(how: How, params: Params, tokens: Tokens) -> jax.Array:
    """Send rows to their experts and back, as many rounds as the fullest pair of devices needs."""
    sizes = sort_by_expert(_targets(how, tokens.experts), jax.lax.axis_size(how.axis)).group_sizes
    rounds = (jax.lax.pmax(jnp.max(sizes), how.axis) + how.rows - 1) // how.rows
    return _total(_trip, how, rounds, params, tokens)


def _targets(how: How, experts: jax.Array) -> jax.Array:
    """Return the device of each choice."""
    return experts // how.experts


def _trip(how: How, number: jax.Array, params: Params, tokens: Tokens) -> jax.Array:
    """Return what the rows of one round add."""
    devices = jax.lax.axis_size(how.axis)
    dispatch = _round(_targets(how, tokens.experts), devices, how.rows, number)
    local = jnp.take(tokens.experts.reshape(-1) % how.experts, dispatch.source, mode="fill", fill_value=how.experts)

    def swapped(x: jax.Array) -> jax.Array:
        split = x.reshape(devices, how.rows, *x.shape[1:])
        return jax.lax.all_to_all(split, how.axis, 0, 0).reshape(x.shape)

    inner = sort_by_expert(swapped(local)[:, None], how.experts)
    out = how.apply(params, permute(swapped(permute(tokens.x, dispatch)), inner), inner.group_sizes)
    whole = jnp.ones_like(out, exact(out.dtype), shape=(out.shape[0], 1))
    return combine(swapped(combine(out, whole, inner)), tokens.weights, dispatch)


def _round(groups: jax.Array, count: int, rows: int, number: jax.Array) -> Dispatch:
    """Return where the choices go that are the ``number``-th `rows` of their group; each group has `rows` rows."""
    whole = sort_by_expert(groups, count)
    begins = jnp.cumsum(whole.group_sizes) - whole.group_sizes
    rank = whole.places - jnp.take(begins, groups, mode="clip") - number * rows
    mine = ~whole.dropped & (rank >= 0) & (rank < rows)
    places = jnp.where(mine, groups * rows + rank, count * rows)
    source = jnp.full_like(whole.source, groups.size, shape=(count * rows,))
    source = source.at[places.reshape(-1)].set(jnp.arange(groups.size, dtype=source.dtype), mode="drop")
    return Dispatch(source, places, jnp.clip(whole.group_sizes - number * rows, 0, rows))


def _passed(how: How, tree: Any) -> Any:
    """Send to the next device of the ring, and get from the one before."""
    devices = jax.lax.axis_size(how.axis)
    pairs = [(i, (i + 1) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, how.axis, pairs), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how: How, params: Params, tokens: Tokens) -> jax.Array:
    def step(_: Any, state: tuple[Tokens, jax.Array]) -> Any:
        passing, y = state
        return _passed(how, (passing, y + _visited(how, params, passing)))

    y = _zeros(tokens.x, exact(tokens.x.dtype))
    return jax.lax.fori_loop(0, jax.lax.axis_size(how.axis), step, (tokens, y))[1]


def _ring_forward(how: How, params: Params, tokens: Tokens) -> tuple[Any, Any]:
    return _ring(how, params, tokens), (params, tokens)


def _ring_backward(how: How, saved: Any, d_y: jax.Array) -> tuple[Params, Tokens]:
    params, tokens = saved

    def step(_: Any, state: Any) -> Any:
        passing, d_y, sums = state
        more = _gradients(how, _visited, params, passing, d_y)
        d_learned, d_x, d_weights = _added(sums, more)
        passing, d_y, d_x, d_weights = _passed(how, (passing, d_y, d_x, d_weights))
        return passing, d_y, (d_learned, d_x, d_weights)

    state = tokens, d_y, _nothing(params, tokens)
    return _cotangents(params, tokens, jax.lax.fori_loop(0, jax.lax.axis_size(how.axis), step, state)[2])


_ring.defvjp(_ring_forward, _ring_backward)


def _visited(how: How, params: Params, tokens: Tokens) -> jax.Array:
    """Return what this device's experts add to tokens that are here now, some rows at a time."""
    here = _here(how, tokens.experts)
    rounds = (jnp.sum(here.group_sizes) + how.rows - 1) // how.rows
    return _total(_visit, how, rounds, params, tokens)


def _here(how: How, experts: jax.Array) -> Dispatch:
    return sort_by_expert(experts - jax.lax.axis_index(how.axis) * how.experts, how.experts)


def _visit(how: How, number: jax.Array, params: Params, tokens: Tokens) -> jax.Array:
    """Return what the ``number``-th rows of the sorted ones add."""
    whole, start = _here(how, tokens.experts), number * how.rows
    choices = whole.source.shape[0]
    place = whole.places - start
    row = start + jnp.arange(how.rows, dtype=whole.source.dtype)
    ends = jnp.cumsum(whole.group_sizes)
    bounds = (jnp.clip(x - start, 0, how.rows) for x in (ends, ends - whole.group_sizes))
    dispatch = Dispatch(
        jnp.take(whole.source, row, mode="fill", fill_value=choices),
        jnp.where(~whole.dropped & (place >= 0) & (place < how.rows), place, how.rows),
        next(bounds) - next(bounds),
    )
    out = how.apply(params, permute(tokens.x, dispatch), dispatch.group_sizes)
    return combine(out, tokens.weights, dispatch)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(term: Any, how: How, count: jax.Array, params: Params, tokens: Tokens) -> jax.Array:
    """Return the sum of ``term(how, n, params, tokens)`` over n below `count`."""
    wide = exact(tokens.x.dtype)

    def step(n: jax.Array, y: jax.Array) -> jax.Array:
        return y + term(how, n, params, tokens).astype(wide)

    return jax.lax.fori_loop(jnp.zeros_like(count), count, step, _zeros(tokens.x, wide))


def _total_forward(term: Any, how: How, count: jax.Array, params: Params, tokens: Tokens) -> tuple[Any, Any]:
    return _total(term, how, count, params, tokens), (count, params, tokens)


def _total_backward(term: Any, how: How, saved: Any, d_y: jax.Array) -> tuple[None, Params, Tokens]:
    count, params, tokens = saved

    def step(n: jax.Array, sums: Any) -> Any:
        return _added(sums, _gradients(how, functools.partial(_nth, term, n), params, tokens, d_y))

    sums = jax.lax.fori_loop(jnp.zeros_like(count), count, step, _nothing(params, tokens))
    return None, *_cotangents(params, tokens, sums)


def _nth(term: Any, n: jax.Array, how: How, params: Params, tokens: Tokens) -> jax.Array:
    return term(how, n, params, tokens)


def _gradients(how: How, function: Any, params: Params, tokens: Tokens, d_y: jax.Array) -> Any:
    """Return the gradients of learned parameters, tokens and weights."""

    def call(learned: Any, x: jax.Array, weights: jax.Array) -> jax.Array:
        return function(how, Params(learned, params.fixed), Tokens(x, weights, tokens.experts))

    out, pull = jax.vjp(call, params.learned, tokens.x, tokens.weights)
    return pull(d_y.astype(out.dtype))


def _nothing(params: Params, tokens: Tokens) -> Any:
    """Return sums of gradients before the first."""
    return jax.tree.map(lambda leaf: _zeros(leaf, exact(leaf.dtype)), (params.learned, tokens.x, tokens.weights))


def _added(sums: Any, more: Any) -> Any:
    return jax.tree.map(lambda total, part: total + part.astype(total.dtype), sums, more)


def _cotangents(params: Params, tokens: Tokens, sums: Any) -> tuple[Params, Tokens]:
    given = params.learned, tokens.x, tokens.weights
    learned, x, weights = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), sums, given)
    nothing: Any = None
    return Params(learned, nothing), Tokens(x, weights, nothing)


_total.defvjp(_total_forward, _total_backward)


def _zeros(x: jax.Array, dtype: Any = None) -> jax.Array:
    """Return zeros that vary over the mesh axes as `x` does."""
    return alike(jnp.zeros(x.shape, dtype or x.dtype), x)[0]
