import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dovetail_runtime import FSDP, FSDP_TENSOR, TENSOR, ShardingError, explain, mesh, resolve

CASES = [
    # rules, names, shape, spec (data=2, fsdp=2, tensor=2)
    (FSDP.weights, ("embed", "mlp"), (8, 6), P("fsdp")),
    (FSDP.weights, ("vocab", "embed"), (9, 8), P(None, "fsdp")),
    (FSDP.weights, (None, None), (8, 6), P()),
    (FSDP.weights, (), (), P()),
    (TENSOR.weights, ("embed", "heads", "head_dim"), (8, 4, 4), P(None, "tensor")),
    (FSDP_TENSOR.weights, ("embed", "mlp"), (8, 6), P("fsdp", "tensor")),
    (FSDP_TENSOR.activations, ("batch", "time", "mlp"), (8, 3, 4), P(("data", "fsdp"), None, "tensor")),
    (FSDP_TENSOR.activations, ("tokens", "embed"), (8, 4), P(("data", "fsdp"))),
]


@pytest.mark.parametrize(("rules", "names", "shape", "spec"), CASES)
def test_presets_give_the_textbook_specs(rules, names, shape, spec):
    assert resolve(names, shape, rules, mesh(data=2, fsdp=2, tensor=2)) == spec


def test_mesh_axes_that_are_absent_are_ignored():
    """One rule set fits a mesh with fewer axes; without this, laptops would need their own rules."""
    assert resolve(("batch", "mlp"), (8, 4), FSDP_TENSOR.activations, mesh(data=8)) == P("data")


def test_a_mesh_axis_chosen_twice_is_an_error_that_names_both():
    """Flax silently drops one of the two."""
    rules = {"rows": "fsdp", "columns": "fsdp"}
    with pytest.raises(ShardingError, match=r"'fsdp'.*dimension 0 \(rows\) and 1 \(columns\)"):
        resolve(("rows", "columns"), (8, 8), rules, mesh(fsdp=8))
    with pytest.raises(ShardingError, match="'fsdp'"):
        resolve(("rows", "rows"), (8, 8), rules, mesh(fsdp=8))


def test_a_conflict_does_not_hide_on_one_device_or_behind_a_size():
    rules = {"rows": "fsdp", "columns": "fsdp"}
    with pytest.raises(ShardingError):
        resolve(("rows", "columns"), (8, 8), rules, mesh(fsdp=1, devices=jax.devices()[:1]))
    with pytest.raises(ShardingError):
        resolve(("rows", "columns"), (8, 7), rules, mesh(fsdp=8))


def test_conflict_first_lets_the_earlier_rule_win():
    rules = {"columns": ("fsdp", "tensor"), "rows": "fsdp"}
    small = mesh(fsdp=4, tensor=2)
    result = explain(("rows", "columns"), (8, 8), rules, small, conflict="first")
    assert result.spec == P(None, ("fsdp", "tensor"))
    assert "dimension 1 keeps it" in result.notes[0]
    assert resolve(("rows", "rows"), (8, 8), rules, small, conflict="first") == P("fsdp")


def test_indivisible_dimensions_use_the_longest_prefix_that_divides():
    rules = {"a": ("data", "fsdp", "tensor")}
    made = mesh(data=2, fsdp=2, tensor=2)
    for size, spec in ((8, P(("data", "fsdp", "tensor"))), (4, P(("data", "fsdp"))), (6, P("data")), (7, P())):
        result = explain(("a",), (size,), rules, made)
        assert result.spec == spec
        assert bool(result.notes) == (size != 8)


def test_unknown_names_and_wrong_ranks_are_errors():
    with pytest.raises(ShardingError, match=r"'embedd'.*'embed'"):
        resolve(("embedd",), (8,), FSDP.weights, mesh(fsdp=8))
    with pytest.raises(ShardingError, match=r"2 logical names.*rank 1"):
        resolve(("embed", None), (8,), FSDP.weights, mesh(fsdp=8))


AXES = ("data", "fsdp", "tensor")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_result_is_a_valid_sharding(data):
    """Whatever the rules and sizes, jax accepts the spec, and no mesh axis is used twice."""
    choice = st.one_of(st.none(), st.lists(st.sampled_from(AXES), unique=True, max_size=3).map(tuple))
    rules = {name: data.draw(choice) for name in "abcd"}
    names = data.draw(st.lists(st.sampled_from([*"abcd", None]), max_size=4))
    shape = [data.draw(st.integers(0, 12)) for _ in names]
    made = mesh(data=2, fsdp=2, tensor=2)
    try:
        strict = resolve(names, shape, rules, made)
    except ShardingError:
        strict = None
    spec = resolve(names, shape, rules, made, conflict="first")
    assert strict is None or strict == spec
    used = [axis for part in spec for axis in ((part,) if isinstance(part, str) else part or ())]
    assert len(used) == len(set(used))
    shard = NamedSharding(made, spec).shard_shape(tuple(shape))
    assert math.prod(shard) * 2 ** len(used) == math.prod(shape)
    np.testing.assert_array_less(-1, shard)
