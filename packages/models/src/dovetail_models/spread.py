"""Experts on the devices of a mesh axis, as the rules of `dovetail_runtime.use` say."""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dovetail_kernels import Routing, expert_parallel
from dovetail_models.state import merge, split
from dovetail_protocols import LowRankArray
from dovetail_runtime import current, split_of

__all__ = ["spread"]


def spread(
    experts: nnx.Module, x: jax.Array, routing: Routing, *, exchange: Literal["all_to_all", "ring"]
) -> jax.Array:
    """Return the weighted sums of what each token's experts make of it, where rules split experts over a mesh axis.

    Tokens are split over the axes that the rules give them, and over that of the experts. What weights are split over
    besides is put together first, as with FSDP.

    Args:
        experts: called with rows and group sizes.
        x: tokens.
        routing: of them.
        exchange: see `dovetail_kernels.expert_parallel`.
    """
    context, found = current(), split_of("experts")
    assert context is not None
    assert found is not None
    mesh, axis = found
    wanted = [*context.rules.of("activations").get("tokens", ()), axis]
    axes = tuple(dict.fromkeys(name for name in wanted if mesh.shape.get(name, 1) > 1))
    definition, params = split(experts)
    params = jax.tree.map(_per_expert, params, is_leaf=lambda x: isinstance(x, LowRankArray))
    count, tokens = routing.scores.shape[1], x.shape[0]
    padding = -tokens % math.prod(mesh.shape[name] for name in axes)
    x, chosen, weights, scores = (jnp.pad(part, ((0, padding), (0, 0))) for part in (x, *routing))
    chosen = jnp.where(jnp.arange(tokens + padding)[:, None] < tokens, chosen, count)

    def local(params: Any, x: jax.Array, routing: Routing) -> jax.Array:
        return expert_parallel(functools.partial(_apply, definition), params, x, routing, axis=axis, exchange=exchange)

    shared = 1  # the length of what all experts have one of, as scales of quantized weights
    places = jax.tree.map(lambda leaf: PartitionSpec(None if leaf.shape[0] == shared else axis), params)
    rows = PartitionSpec(axes)
    run = jax.shard_map(local, mesh=mesh, in_specs=(places, rows, rows), out_specs=rows, axis_names=set(axes))
    return run(params, x, Routing(chosen, weights, scores))[:tokens]


def _per_expert(weight: Any) -> Any:
    """Return a weight whose every part has experts first; an adapter across experts is added up, as in products."""
    return weight.dense() if isinstance(weight, LowRankArray) and not weight.leading else weight


def _apply(definition: Any, params: Any, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
    return merge(definition, params)(rows, group_sizes)
