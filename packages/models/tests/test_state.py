"""Modules as definition and parameters; models made and run on meshes of eight devices."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_models import (
    Llama,
    LlamaConfig,
    abstract,
    from_pretrained,
    init,
    logical_axes,
    merge,
    placements,
    save_pretrained,
    split,
)
from dovetail_protocols import paths
from dovetail_runtime import DATA, FSDP, FSDP_TENSOR, TENSOR, Rules, ShardingError, batch_sharding, mesh, use

MESHES: dict[str, tuple[dict[str, int], Any]] = {
    "data": ({"data": 8}, DATA),
    "fsdp": ({"fsdp": 8}, FSDP),
    "tensor with uneven heads": ({"tensor": 4}, TENSOR),
    "mixed": ({"data": 2, "fsdp": 2, "tensor": 2}, FSDP_TENSOR),
}


def devices(sizes: dict[str, int]) -> Any:
    return mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def test_split_and_merge(build: Any, logits: Any) -> None:
    """Parameters are a plain nested dict, and the definition is hashable and equal for equal models."""
    model = build()
    definition, params = split(model)
    assert isinstance(params["layers"][0]["attention"]["query"], jax.Array)
    assert hash(definition) == hash(split(build())[0])
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    np.testing.assert_array_equal(logits(merge(definition, params), tokens), logits(model, tokens))


def test_abstract_computes_nothing(build: Any) -> None:
    """A model that fits no machine can be planned."""
    config = LlamaConfig(vocab_size=10**6, features=2**16, hidden=2**18, layers=2, heads=64)
    _, shapes = abstract(lambda: Llama(config, rngs=nnx.Rngs(0)))
    assert shapes["layers"][1]["mlp"]["up"] == jax.ShapeDtypeStruct((2**16, 2**18), jnp.float32)
    _, small = abstract(build)
    shape = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), split(build())[1])
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), small) == shape


def test_logical_axes(build: Any) -> None:
    """One name per dimension of every parameter, abstract or not."""
    _, params = split(build())
    for names in (logical_axes(build()), logical_axes(nnx.eval_shape(build))):
        assert names["layers"][0]["attention"]["query"] == ("embed", "heads", None)
        ranks = jax.tree.map(lambda leaf, name: leaf.ndim == len(name), params, names)
        assert all(jax.tree.leaves(ranks))


def batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 48, (8, 12)).astype(np.int32) for _ in range(2))


@pytest.fixture(scope="module")
def run(build: Any, summed_loss: Any) -> Any:
    """The mean loss of a batch and its gradients, as a function of the parameters and the batch."""
    definition, _ = abstract(build)

    def value(params: Any, tokens: Any, targets: Any) -> Any:
        return jax.value_and_grad(lambda p: summed_loss(merge(definition, p), tokens, targets) / 96)(params)

    return jax.jit(value)


@pytest.fixture(scope="module")
def alone(build: Any, run: Any) -> Any:
    """Parameters, loss and gradients on one device."""
    _, params = split(build())
    return params, *run(params, *batch())


@pytest.mark.parametrize("name", MESHES)
def test_meshes_agree_with_one_device(name: str, build: Any, run: Any, alone: Any) -> None:
    """Loss and gradients on a mesh are those of one device."""
    sizes, rules = MESHES[name]
    grid = devices(sizes)
    params, loss, gradients = alone
    placed = jax.device_put(params, placements(nnx.eval_shape(build), grid, rules))
    with use(grid, rules):
        got = run(placed, *jax.device_put(batch(), batch_sharding(grid, rules)))
    np.testing.assert_allclose(got[0], loss, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], gradients)


@pytest.fixture(scope="module")
def spread(build: Any) -> Any:
    """A model made on eight devices."""
    return init(build, devices({"fsdp": 4, "tensor": 2}), FSDP_TENSOR)


def test_init_makes_every_part_in_its_place(build: Any, alone: Any, spread: Any) -> None:
    """No device holds more than its share, and the values are those of one device."""
    expected = paths.flatten(placements(nnx.eval_shape(build), devices({"fsdp": 4, "tensor": 2}), FSDP_TENSOR))
    _, params = split(spread)
    for address, leaf in paths.flatten(params).items():
        assert leaf.sharding == expected[address]
        np.testing.assert_allclose(leaf, paths.flatten(alone[0])[address], rtol=1e-6, err_msg=address)
    assert params["layers"][0]["mlp"]["up"].addressable_shards[0].data.shape == (4, 16)


def test_checkpoints_go_into_a_mesh_and_out(spread: Any, tmp_path: Any) -> None:
    """A sharded model is saved and loaded without ever being whole on a device, with the same values."""
    save_pretrained(spread, tmp_path / "out")
    model = from_pretrained(tmp_path / "out", mesh=devices({"fsdp": 4, "tensor": 2}), rules=FSDP_TENSOR)
    whole = paths.flatten(split(spread)[1])
    for address, leaf in paths.flatten(split(model)[1]).items():
        assert leaf.sharding.is_equivalent_to(whole[address].sharding, leaf.ndim)
        np.testing.assert_array_equal(leaf, whole[address])


def test_the_compiled_step_is_split(build: Any, summed_loss: Any) -> None:
    """With eight rows on eight devices each computes about an eighth, not everything."""
    definition, params = split(build())
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def flops(context: Any, params: Any, tokens: Any) -> float:
        def loss(params: Any, tokens: Any) -> jax.Array:
            return summed_loss(merge(definition, params), tokens, tokens)

        with context:
            return jax.jit(jax.grad(loss)).lower(params, tokens).compile().cost_analysis()["flops"]

    grid = devices({"fsdp": 8})
    places = placements(build(), grid, FSDP)
    split_params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, places)
    split_tokens = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=batch_sharding(grid, FSDP))
    whole = flops(contextlib.nullcontext(), params, tokens)
    assert flops(use(grid, FSDP), split_params, split_tokens) < whole / 5


def test_rules_that_do_not_fit(build: Any) -> None:
    """A rule set that lacks the models' names is refused with the parameter's address."""
    with pytest.raises(ShardingError, match=r"embedding.*'vocab'"):
        init(build, devices({"fsdp": 8}), Rules({"embed": "fsdp"}))
