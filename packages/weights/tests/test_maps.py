import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_weights import (
    Cast,
    Concat,
    Lazy,
    Reshape,
    Rule,
    Split,
    Stack,
    Transpose,
    Unstack,
    WeightMap,
    WeightsError,
)
from dovetail_weights.lazy import lazy_of


def arrays_of(shape, count=1):
    size = math.prod(shape)
    return [np.arange(i * 100, i * 100 + size, dtype=np.float32).reshape(shape) for i in range(count)]


CASES = [
    (Transpose(), arrays_of((2, 3), 2), lambda a: [x.T for x in a]),
    (Transpose((2, 0, 1)), arrays_of((2, 3, 4)), lambda a: [x.transpose(2, 0, 1) for x in a]),
    (Reshape((6, 4), (2, 3, 4)), arrays_of((6, 4)), lambda a: [x.reshape(2, 3, 4) for x in a]),
    (Reshape((2, 3, 4), (6, 4)), arrays_of((2, 3, 4)), lambda a: [x.reshape(6, 4) for x in a]),
    (Reshape((4, 6), (3, 8)), arrays_of((4, 6)), lambda a: [x.reshape(3, 8) for x in a]),
    (Reshape((3, 4, 4), (3, 2, 2, 4)), arrays_of((3, 4, 4)), lambda a: [x.reshape(3, 2, 2, 4) for x in a]),
    (Reshape((1, 4), (4, 1, 1)), arrays_of((1, 4)), lambda a: [x.reshape(4, 1, 1) for x in a]),
    (Reshape((), (1, 1)), arrays_of(()), lambda a: [x.reshape(1, 1) for x in a]),
    (Reshape((0, 4), (2, 0, 3)), arrays_of((0, 4)), lambda a: [x.reshape(2, 0, 3) for x in a]),
    (Stack(3), arrays_of((2, 2), 3), lambda a: [np.stack(a)]),
    (Stack(2, axis=1), arrays_of((3, 2), 4), lambda a: [np.stack(a[:2], 1), np.stack(a[2:], 1)]),
    (Unstack(3, axis=1), arrays_of((2, 3, 2)), lambda a: [a[0][:, i] for i in range(3)]),
    (Concat((2, 2, 2), axis=1), arrays_of((3, 2), 3), lambda a: [np.concatenate(a, 1)]),
    (Split((1, 4, 2)), arrays_of((7, 2)), lambda a: np.split(a[0], [1, 5])),
    (Cast(np.float32, np.float64), arrays_of((3,)), lambda a: [x.astype(np.float64) for x in a]),
]


@pytest.mark.parametrize(("transform", "arrays", "truth"), CASES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_transforms_equal_numpy_in_whole_and_in_part(transform, arrays, truth, data):
    """A transform, its inverse, or the part that one device reads is wrong."""
    expected = truth(arrays)
    made = transform.apply([lazy_of(a) for a in arrays])
    assert len(made) == len(expected)
    for lazy, value in zip(made, expected, strict=True):
        assert (lazy.shape, lazy.dtype) == (value.shape, value.dtype)
        bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in value.shape]
        index = tuple(slice(a, b) for a, b in bounds)
        np.testing.assert_array_equal(lazy.read(index), value[index])
        np.testing.assert_array_equal(lazy.read(), value)
    back = transform.inverse().apply(made)
    for lazy, value in zip(back, arrays, strict=True):
        np.testing.assert_array_equal(lazy.read(), value)
    assert transform.inverse().inverse() == transform


def test_a_part_reads_only_its_part():
    """A sharded load reads whole tensors from the disk."""
    value, read = np.arange(48.0).reshape(4, 12), []
    source = Lazy(value.shape, value.dtype, lambda index: read.append(value[index].size) or value[index])
    chain = [Transpose(), Reshape((12, 4), (3, 4, 4))]
    lazies = [source]
    for transform in chain:
        lazies = transform.apply(lazies)
    part = lazies[0].read((slice(1, 2), slice(0, 4), slice(2, 4)))
    np.testing.assert_array_equal(part, value.T.reshape(3, 4, 4)[1:2, :, 2:4])
    assert read == [8]


@pytest.mark.parametrize(
    ("transform", "arrays"),
    [
        (Transpose(), arrays_of((2, 3, 4))),
        (Transpose((0, 0)), arrays_of((2, 3))),
        (Reshape((6,), (2, 3)), arrays_of((7,))),
        (Stack(2), arrays_of((2,), 3)),
        (Stack(2), [*arrays_of((2,)), *arrays_of((3,))]),
        (Stack(1, axis=3), arrays_of((2,))),
        (Unstack(2), arrays_of((3,))),
        (Concat((2, 2)), arrays_of((2,), 3)),
        (Concat((2, 2)), [*arrays_of((2, 1)), *arrays_of((2, 2))]),
        (Split((1, 1)), arrays_of((3,))),
        (Split((1, 1), axis=1), arrays_of((2,))),
    ],
)
def test_shapes_that_do_not_fit(transform, arrays):
    """A transform is applied to an array that it is not meant for."""
    with pytest.raises(WeightsError, match="does not fit"):
        transform.apply([lazy_of(a) for a in arrays])


def test_reshape_of_another_size():
    """A reshape that loses elements is accepted."""
    with pytest.raises(WeightsError, match="equally many"):
        Reshape((2, 3), (5,))


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))


@given(SHAPES, st.integers(1, 3), st.permutations(range(3)), st.booleans())
@settings(max_examples=150, deadline=None)
def test_import_of_export_is_the_tree(shape, layers, axes, cast):
    """What save writes, load does not read back."""
    d, h, k = shape
    chain = [Transpose(tuple(axes)), Stack(layers, axis=1)]
    chain += [Cast(np.float64, np.float32)] if cast else []
    rules = [
        Rule("layers/query", "model.layers.{i}.q.weight", chain, over={"i": layers}),
        Rule("heads/{n}", "heads.{n}", [Reshape((d, h * k), (d, h, k))]),
        Rule("qkv/{n}", ("q.{n}", "k.{n}"), [Concat((h, h), 0), Transpose()]),
        Rule(("gate", "up"), "gate_up", [Split((d, h), 1)]),
        Rule("experts", ("e.{e}.a.{j}", "e.{e}.b.{j}"), [Stack(2), Stack(3), Concat((3, 3))], over={"e": 3, "j": 2}),
    ]
    at = [shape[a] for a in axes]
    tree = {
        "layers/query": np.random.default_rng(0).normal(size=(at[0], layers, *at[1:])).astype(np.float32),
        "heads/0": arrays_of((d, h, k))[0],
        "heads/1": arrays_of((d, h, k), 2)[1],
        "qkv/7": arrays_of((k, 2 * h))[0],
        "gate": arrays_of((k, d))[0],
        "up": arrays_of((k, h), 2)[1],
        "experts": arrays_of((6, 2, 4))[0],
    }
    groups = WeightMap(rules).groups(list(tree))
    theirs, ours = {}, {}
    for group in groups:
        theirs |= zip(group.names, group.to_theirs([lazy_of(tree[a]) for a in group.addresses]), strict=True)
    assert theirs["model.layers.0.q.weight"].shape == shape
    assert theirs["heads.1"].shape == (d, h * k)
    assert theirs["gate_up"].shape == (k, d + h)
    np.testing.assert_array_equal(theirs["e.2.b.1"].read(), tree["experts"][5, 1])
    for group in groups:
        ours |= zip(group.addresses, group.to_ours([theirs[n] for n in group.names]), strict=True)
    for address, value in tree.items():
        np.testing.assert_array_equal(ours[address].read(), value)
        assert ours[address].dtype == value.dtype


def test_cast_keeps_bits_where_it_can():
    """A checkpoint in bfloat16 comes back with other bits."""
    bits = np.arange(2**16, dtype=np.uint16)
    value = bits[bits & 0x7F80 != 0x7F80].view(ml_dtypes.bfloat16)  # every finite number
    cast = Cast(ml_dtypes.bfloat16, np.float32)
    back = cast.inverse().apply(cast.apply([lazy_of(value)]))[0]
    assert back.read().tobytes() == value.tobytes()


def test_first_rule_holds_and_variables_repeat():
    """A special case before the general rule is ignored, or a repeated variable may differ."""
    table = WeightMap([Rule("a/{i}/{i}", "same.{i}"), Rule("a/{i}/{j}", "two.{i}.{j}")])
    assert [g.names for g in table.groups(["a/1/1", "a/1/2"])] == [("same.1",), ("two.1.2",)]


@pytest.mark.parametrize(
    ("rules", "addresses", "match"),
    [
        ([Rule("a/{i}", "x.{i}")], ["a/0", "b"], r"b: no rule.*nearest.*a/\{i\}"),
        ([Rule(("a", "b"), "ab", [Split((1, 1))])], ["a"], "b: its rule needs it"),
        ([Rule("a", "x"), Rule("b", "x")], ["a", "b"], "x: two leaves claim"),
        ([], ["a"], "a: no rule"),
    ],
)
def test_maps_that_do_not_fit_the_tree(rules, addresses, match):
    """A leaf without a rule keeps its random values, or two leaves share a tensor."""
    with pytest.raises(WeightsError, match=match):
        WeightMap(rules).groups(addresses)


@pytest.mark.parametrize(
    "arguments",
    [
        ("a/{i}", "x"),
        ("a", "x.{i}"),
        (("a/{i}", "b/{j}"), "x.{i}"),
        ("a/{i}", "x.{i}", (), {"i": 2}),
    ],
)
def test_rules_with_unbound_variables(arguments):
    """A variable that nothing fills in surfaces as a KeyError during a load."""
    with pytest.raises(WeightsError, match="variables"):
        Rule(*arguments)


def test_a_rule_whose_transforms_make_too_many():
    """A rule without its Stack silently drops tensors."""
    group = Rule("a", "x.{i}", (), {"i": 2}).group({})
    with pytest.raises(WeightsError, match="make 2 arrays, expected 1"):
        group.to_ours([lazy_of(a) for a in arrays_of((2,), 2)])
