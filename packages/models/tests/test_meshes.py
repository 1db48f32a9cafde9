"""What a layer costs in collectives on a mesh."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dovetail_models import Llama, LlamaConfig, abstract, placements
from dovetail_runtime import FSDP, TENSOR, batch_sharding, mesh, use


def collectives(objective: Any, layers: int, grid: Any, rules: Any, *, gradients: bool) -> collections.Counter[str]:
    """How many collectives of each kind the compiled program of a Llama has."""
    config = LlamaConfig(vocab_size=64, features=32, hidden=64, layers=layers, heads=8)
    build = lambda: Llama(config, rngs=nnx.Rngs(0))  # noqa: E731
    definition, params = abstract(build)
    places = placements(nnx.eval_shape(build), grid, rules)
    params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, places)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=batch_sharding(grid, rules))
    loss = objective(definition)
    with use(grid, rules):
        program = jax.jit(jax.grad(loss), out_shardings=places) if gradients else jax.jit(loss)
        text = program.lower(params, tokens).compile().as_text()
    kinds = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
    return collections.Counter(re.findall(kinds, text))


@pytest.mark.parametrize(
    ("sizes", "rules", "forward", "backward"),
    [
        ({"tensor": 8}, TENSOR, {"all-reduce": 2}, {"all-reduce": 4}),
        ({"fsdp": 8}, FSDP, {"all-gather": 9}, {"all-gather": 18}),
    ],
    ids=["tensor", "fsdp"],
)
def test_what_a_layer_communicates(sizes: Any, rules: Any, forward: Any, backward: Any, objective: Any) -> None:
    """Tensor parallelism adds up after attention and MLP; FSDP gathers each of nine weights, and again to go back.

    Anything else is an activation that crosses devices without need.
    """
    grid = mesh(**sizes)
    for gradients, most in ((False, forward), (True, backward)):
        two, three = (collectives(objective, layers, grid, rules, gradients=gradients) for layers in (2, 3))
        per_layer = {kind: three[kind] - two[kind] for kind in three if three[kind] != two[kind]}
        if gradients:
            assert set(per_layer) == set(most), per_layer
            assert all(0 < count <= most[kind] for kind, count in per_layer.items()), per_layer
        else:
            assert per_layer == most
