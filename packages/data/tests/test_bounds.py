"""Tokens that begin or end documents, against lists."""

import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data import Plan, WithBos, WithoutEos

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=12)


def documents(source):
    every = np.arange(len(source))
    return np.split(source.gather(every, np.zeros_like(every), source.lengths), np.cumsum(source.lengths))[:-1]


@settings(max_examples=80, deadline=None)
@given(LENGTHS.filter(any), st.data())
def test_every_piece_is_a_slice_of_the_changed_document(lengths, data):
    source = Arrays(lengths)
    plain = [part.tolist() for part in documents(source)]
    changed = {
        WithBos(source, 0): [[0, *part] if part else [] for part in plain],
        WithoutEos(source): [part[:-1] for part in plain],
        WithBos(WithoutEos(source), 0): [[0, *part[:-1]] if part[:-1] else [] for part in plain],
    }
    for made, expected in changed.items():
        assert made.lengths.tolist() == [len(part) for part in expected]
        ids = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8)), np.int64)
        cuts = [sorted(data.draw(st.tuples(*[st.integers(0, len(expected[i]))] * 2))) for i in ids]
        starts, stops = (np.array([cut[end] for cut in cuts], np.int64) for end in (0, 1))
        got = made.gather(ids, starts, stops)
        assert got.tolist() == [t for i, (a, b) in zip(ids, cuts, strict=True) for t in expected[i][a:b]]


def test_plans_take_them_and_states_tell_them_apart():
    """A row of packed documents begins each with the token; the fingerprints differ."""
    source = Arrays([5, 4, 6])
    made = Plan(WithBos(source, 7), seq_len=9, batch=1, seed=0, packing="best_fit")
    firsts = [made.at(step).tokens[0, 0] for step in range(made.yields[""].rows)]
    assert set(firsts) == {7}
    assert len({one.fingerprint for one in (source, WithBos(source, 7), WithBos(source, 8), WithoutEos(source))}) == 4
    assert WithBos(source, 7).origin(1) == "doc1"
    assert WithBos(source, 7).tokens == source.tokens + 3
    assert WithBos(source, 7).bytes == source.bytes


def test_a_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="bos_id=15; expected 0 to 14"):
        WithBos(Arrays([15]), 15)
