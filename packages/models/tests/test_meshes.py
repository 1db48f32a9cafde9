"""What a layer costs in collectives on a mesh, and what stays as it is there."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS, by_default

from dovetail_models import Llama, LlamaConfig, abstract, merge, placements, split
from dovetail_runtime import CONTEXT, EXPERT, FSDP, FSDP_TENSOR, SEQUENCE, TENSOR, batch_sharding, mesh, use


def collectives(objective: Any, layers: int, grid: Any, rules: Any, *, gradients: bool) -> collections.Counter[str]:
    """How many collectives of each kind the compiled program of a Llama has."""
    config = LlamaConfig(vocab_size=64, features=32, hidden=64, layers=layers, heads=8)
    build = lambda: Llama(config, rngs=nnx.Rngs(0))  # noqa: E731
    definition, params = abstract(build)
    places = placements(nnx.eval_shape(build), grid, rules)
    params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, places)
    rows = 1 if "context" in grid.shape else 8
    tokens = jax.ShapeDtypeStruct((rows, 128 // rows), jnp.int32, sharding=batch_sharding(grid, rules))
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
        ({"context": 8}, CONTEXT, {"collective-permute": 2}, {"collective-permute": 6}),
    ],
    ids=["tensor", "fsdp", "context"],
)
def test_what_a_layer_communicates(sizes: Any, rules: Any, forward: Any, backward: Any, objective: Any) -> None:
    """Tensor parallelism adds up after attention and MLP; FSDP gathers each of nine weights, and again to go back.

    Context parallelism sends keys and values round, and back with their gradients; those of weights are added up at the
    end. Anything else is an activation that crosses devices without need.
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


def check_decoder(objective: Any, family: Any, config: Any, grid: Any, rules: Any) -> None:
    """Check that loss and gradients are those of one device."""
    build = lambda: family(config, rngs=nnx.Rngs(0))  # noqa: E731
    definition, params = split(build())
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 16)).astype(np.int32)
    run = jax.jit(jax.value_and_grad(objective(definition)))
    loss, gradients = run(params, tokens)
    placed = jax.device_put(params, placements(nnx.eval_shape(build), grid, rules))
    with use(grid, rules):
        got = run(placed, jax.device_put(tokens, batch_sharding(grid, rules)))
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, largest)), got[1], gradients)


@pytest.mark.parametrize("name", by_default(MODELS, ("gpt2", "mamba2")))
def test_families(name: str, objective: Any) -> None:
    """Data, FSDP and tensor parallelism at once leave loss and gradients as they are."""
    check_decoder(objective, *MODELS[name], mesh(data=2, fsdp=2, tensor=2), FSDP_TENSOR)


@pytest.mark.parametrize(
    ("name", "sizes", "rules"),
    [
        ("llama", {"data": 2, "tensor": 4}, SEQUENCE),
        ("llama", {"data": 2, "context": 4}, CONTEXT),
        pytest.param("gpt_oss", {"fsdp": 2, "context": 4}, CONTEXT, marks=pytest.mark.soak),
        ("mamba2", {"data": 2, "context": 4}, CONTEXT),
        ("mixtral", {"fsdp": 2, "expert": 4}, EXPERT),
        pytest.param("deepseek_v3", {"data": 2, "expert": 4}, EXPERT, marks=pytest.mark.soak),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_other_ways_to_split(name: str, sizes: Any, rules: Any, objective: Any) -> None:
    """By sequence, within rows, or by experts: rules alone decide, and loss and gradients stay as they are."""
    config = LlamaConfig(vocab_size=24, features=16, hidden=24, layers=2, heads=4, kv_heads=2, init_std=0.3)
    check_decoder(objective, *MODELS.get(name, (Llama, config)), mesh(**sizes), rules)


@pytest.mark.parametrize("name", by_default(ENCODERS, ("bert", "siglip")))
def test_encoders(name: str) -> None:
    """Data, FSDP and tensor parallelism at once leave what encoders give, and its gradients, as they are."""
    kind, config = ENCODERS[name]
    build = lambda: kind(config, rngs=nnx.Rngs(0))  # noqa: E731
    definition, params = split(build())
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 10, (8, 6)).astype(np.int32)
    pixels = rng.normal(size=(8, 4, 4, 3)).astype(np.float32)
    inputs = {"siglip": (tokens, pixels)}.get(name, (pixels,) if hasattr(config, "image_size") else (tokens,))

    @jax.jit
    def run(params: Any, inputs: Any) -> Any:
        def loss(params: Any) -> Any:
            model = merge(definition, params)
            whole = model(*inputs)
            outputs = (whole, model.pooled(whole)) if hasattr(model, "pooled") else (whole,)
            return sum(jnp.sum(jnp.sin(out)) for out in outputs), outputs

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, outputs), gradients = run(params, inputs)
    grid = mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, placements(nnx.eval_shape(build), grid, FSDP_TENSOR))
    with use(grid, FSDP_TENSOR):
        (_, got), found = run(placed, jax.device_put(inputs, batch_sharding(grid, FSDP_TENSOR)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, outputs)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, largest)), found, gradients)


def test_the_residual_stream_is_split_further(objective: Any) -> None:
    """Under sequence parallelism no device keeps whole rows of it for the backward pass."""
    sizes: dict[Any, int] = {}
    config = LlamaConfig(vocab_size=16, features=256, hidden=8, layers=6, heads=8, head_dim=8)
    build = lambda: Llama(config, rngs=nnx.Rngs(0), remat="full")  # noqa: E731
    definition, params = abstract(build)
    for rules in (TENSOR, SEQUENCE):
        grid = mesh(tensor=8)
        places = placements(nnx.eval_shape(build), grid, rules)
        given = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, places)
        tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32, sharding=batch_sharding(grid, rules))
        with use(grid, rules):
            program = jax.jit(jax.grad(objective(definition)), out_shardings=places).lower(given, tokens).compile()
        sizes[rules] = program.memory_analysis().temp_size_in_bytes
    stream = 1024 * config.features * 4
    assert sizes[TENSOR] - sizes[SEQUENCE] > config.layers * stream / 2
