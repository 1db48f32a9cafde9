import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dovetail_protocols.paths import PatternError
from dovetail_runtime import FSDP, FSDP_TENSOR, ShardingError, mesh, shardings, shardings_like, table


def spec(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TREE = {"embedding": spec(16, 8), "layers": {0: {"up": spec(8, 12), "norm": spec(8), "scale": spec()}}}
NAMES = {"embedding": ("vocab", "embed"), "layers": {0: {"up": ("embed", "mlp"), "norm": ("embed",), "scale": ()}}}
PATTERNS = {"embedding": ("vocab", "embed"), "**/up": ("embed", "mlp"), "**/norm": ("embed",), "**": None}


@pytest.mark.parametrize("names", [NAMES, PATTERNS])
def test_trees_and_patterns_give_the_same_shardings(names):
    """Both ways of naming are the same information."""
    found = shardings(TREE, names, FSDP_TENSOR, mesh(data=2, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda s: s.spec, found)
    assert specs == {
        "embedding": P("tensor", "fsdp"),
        "layers": {0: {"up": P("fsdp", "tensor"), "norm": P("fsdp"), "scale": P()}},
    }


def test_parameters_initialised_into_the_shardings_have_them():
    """The result is what jax.jit takes as out_shardings."""
    found = shardings(TREE, NAMES, FSDP, mesh(data=2, fsdp=4))
    init = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), TREE), out_shardings=found)
    made = init()
    assert made["embedding"].addressable_shards[0].data.shape == (16, 2)
    assert made["layers"][0]["up"].sharding == found["layers"][0]["up"]


def test_one_device_changes_nothing():
    found = shardings(TREE, NAMES, FSDP_TENSOR, mesh(devices=jax.devices()[:1]))
    put = jax.device_put(jax.tree.map(lambda s: jnp.ones(s.shape), TREE), found)
    assert all(leaf.is_fully_addressable and leaf.is_fully_replicated for leaf in jax.tree.leaves(put))


def test_the_table_counts_bytes_and_gives_reasons(caplog):
    rules, made = FSDP, mesh(fsdp=8)
    result = table({"a": spec(16, 3), "b": spec(12)}, {"a": ("embed", "mlp"), "b": ("embed",)}, rules, made)
    assert [row.bytes_per_device for row in result.rows] == [2 * 3 * 4, 48]
    assert result.bytes_per_device == 72
    assert result.rows[0].notes == ()
    assert "embed=12 does not divide by fsdp=8: replicated" in str(result)
    with caplog.at_level(logging.WARNING, "dovetail_runtime"):
        shardings({"b": spec(12)}, {"b": ("embed",)}, rules, made)
    assert "sharding of b: embed=12" in caplog.text


def test_optimizer_state_follows_the_parameters():
    """Moments that are replicated cost more memory than the parameters that they belong to."""
    params = {"w": spec(16, 8), "b": spec(8)}
    of_params = shardings(params, {"w": ("embed", "mlp"), "b": ("mlp",)}, FSDP, mesh(fsdp=8))
    state = ({"mu": params, "row": {"w": spec(16)}}, spec())
    found = shardings_like(state, params, of_params)
    assert found[0]["mu"]["w"].spec == P("fsdp")
    assert found[0]["row"]["w"].spec == P()
    assert found[1].spec == P()
    with pytest.raises(ValueError, match="no leaves"):
        shardings_like(state, {}, {})


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"w": ("embed",)}, ShardingError, "w: 1 logical names"),
        ({"w": ("embed", "what")}, ShardingError, "w: no rule for the logical name 'what'"),
        ({"x": ("embed", None)}, PatternError, "'x' matches no leaf"),
        ({"x": {"y": ("embed", None)}}, ShardingError, "no logical names for the leaf 'w'.*x/y"),
        ({}, ShardingError, "no logical names for the leaf 'w'"),
        ({"w": "embed"}, ShardingError, "not 'embed'"),
    ],
)
def test_wrong_names_say_which_leaf(names, error, message):
    with pytest.raises(error, match=message):
        shardings({"w": spec(8, 8)}, names, FSDP, mesh(fsdp=8))
