"""Rows of T+1 tokens lose no target, and weights are 0 exactly where there is nothing to learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail_protocols import LMBatch, batch_size, pad_choices, split_rows


@given(st.integers(1, 3), st.integers(2, 7), st.randoms(use_true_random=False))
def test_split_rows_against_a_loop(batch, columns, random):
    rows = np.array([[random.randrange(9) for _ in range(columns)] for _ in range(batch)])
    segments = np.array([[random.randrange(3) for _ in range(columns)] for _ in range(batch)])
    weights = np.array([[random.random() for _ in range(columns)] for _ in range(batch)], np.float32)
    positions = rows + 1
    got = split_rows(rows, segments, positions, weights)
    for b, t in np.ndindex(batch, columns - 1):
        learned = segments[b, t] == segments[b, t + 1] != 0
        assert got.tokens[b, t] == rows[b, t]
        assert got.targets[b, t] == rows[b, t + 1]
        assert got.loss_weights[b, t] == (weights[b, t + 1] if learned else 0)
        assert got.positions[b, t] == positions[b, t]
        assert got.segment_ids[b, t] == segments[b, t]


def test_defaults_and_dtypes():
    got = split_rows(np.arange(8, dtype=np.uint16).reshape(2, 4))
    assert [leaf.dtype.name for leaf in got[:5]] == ["int32", "int32", "float32", "int32", "int32"]
    assert got.choices is None
    assert got.loss_weights.min() == 1
    assert got.segment_ids.min() == 1
    np.testing.assert_array_equal(got.positions, [[0, 1, 2]] * 2)
    assert all(leaf.flags.c_contiguous for leaf in got[:5])


@pytest.mark.parametrize("rows", [np.zeros(4, int), np.zeros((2, 1), int), np.zeros((2, 4)), np.zeros((1, 2, 3), int)])
def test_rows_that_are_not_token_rows(rows):
    with pytest.raises(ValueError, match="rows have shape"):
        split_rows(rows)


@pytest.mark.parametrize("name", ["segment_ids", "positions", "loss_weights"])
def test_arrays_of_another_shape(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\)"):
        split_rows(np.zeros((2, 4), int), **{name: np.zeros((2, 3))})


def test_choices_stand_at_their_tokens():
    """A layer's experts at another token's place train what did not sample it."""
    rng = np.random.default_rng(0)
    told = [rng.integers(0, 9, (3, count, 2)).astype(np.int16) for count in (4, 6)]
    got = pad_choices([told[0], None, told[1]], 6)
    assert (got.shape, got.dtype) == ((3, 6, 3, 2), np.int32)
    for row, tokens, layer, k in np.ndindex(got.shape):
        found = {0: told[0], 2: told[1]}.get(row)
        known = found is not None and tokens < found.shape[1]
        assert got[row, tokens, layer, k] == (found[layer, tokens, k] if known else -1)
    assert batch_size(split_rows(np.zeros((3, 7), int))._replace(choices=got)) == 3


@pytest.mark.parametrize("shapes", [[], [(3, 7, 2)], [(3, 4, 2), (2, 4, 2)], [(3, 4, 2), (3, 4, 1)], [(3, 4)], [()]])
def test_choices_of_no_rows(shapes):
    with pytest.raises(ValueError, match=r"experts have the shapes .* at most time=6 tokens"):
        pad_choices([None, *(np.zeros(shape, int) for shape in shapes)], 6)


def test_batch_size():
    assert batch_size(LMBatch(*[np.zeros((3, 2))] * 5)) == 3
    assert batch_size({"a": [np.zeros(0)], "b": None}) == 0
    with pytest.raises(ValueError, match="no array leaves"):
        batch_size({})
    for bad in ({"a": np.zeros(2), "b": np.zeros((3, 2))}, {"a": np.float32(1)}, [np.zeros(2), 3]):
        with pytest.raises(ValueError, match="share their leading axis"):
            batch_size(bad)
