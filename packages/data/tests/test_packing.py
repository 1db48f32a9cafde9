"""Packing against first fit and best-fit-decreasing by the book, and rows of packed plans."""

import time

import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data import Plan
from dovetail_data.packing import OPEN_ROWS, cut_long, pack

LENGTHS = st.lists(st.integers(0, 30), min_size=1, max_size=40)


def first_fit(lengths, capacity):
    left, rows = [], []
    for length in lengths:
        row = next((i for i, space in enumerate(left) if space >= length), len(left))
        left[row : row + 1] = [(left[row] if row < len(left) else capacity) - length]
        rows.append(row)
    return rows


def rows_of_best_fit_decreasing(lengths, capacity):
    left = []
    for length in sorted(lengths, reverse=True):
        fitting = [(space, row) for row, space in enumerate(left) if space >= length]
        if fitting:
            left[min(fitting)[1]] -= length
        else:
            left.append(capacity - length)
    return len(left)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 30), st.data())
def test_against_the_book(capacity, data):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=60)), np.int64)
    assert pack(lengths, capacity, "first_fit").tolist() == first_fit(lengths.tolist(), capacity)
    rows = pack(lengths, capacity, "best_fit")
    assert len(set(rows.tolist())) == rows_of_best_fit_decreasing(lengths.tolist(), capacity)
    assert (np.bincount(rows, lengths) <= capacity).all()


def test_a_million_documents_take_seconds():
    """Neither quadratic nor a Python loop per open row; hardly any padding, also where rows are closed early."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.6, 1.1, 200_000).astype(int) + 1, 2049)
    for packing, allowed in (("first_fit", 10), ("best_fit", 2)):
        started = time.process_time()
        rows = pack(lengths, 2049, packing)
        assert time.process_time() - started < allowed
        assert (np.bincount(rows, lengths) <= 2049).all()
        assert lengths.sum() / ((rows.max() + 1) * 2049) > 0.98
    many = np.full(3 * OPEN_ROWS, 7)  # none of which fits to another
    assert pack(many, 10, "first_fit").tolist() == list(range(len(many)))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 9))
def test_long_documents(lengths, capacity):
    """Split: every token but a document's first is a target once; crop and drop do what they say."""
    documents, starts, stops = cut_long(np.array(lengths), capacity, "split")
    assert (stops - starts <= capacity).all()
    assert (stops > starts).all()
    targets = [(d, i) for d, a, b in zip(documents, starts, stops, strict=True) for i in range(a + 1, b)]
    assert targets == [(d, i) for d, length in enumerate(lengths) for i in range(1, length)]
    documents, starts, stops = cut_long(np.array(lengths), capacity, "crop")
    assert (starts == 0).all()
    assert stops.tolist() == [min(length, capacity) for length in lengths if length]
    documents, _, stops = cut_long(np.array(lengths), capacity, "drop")
    assert documents.tolist() == [d for d, length in enumerate(lengths) if 0 < length <= capacity]


def test_long_documents_as_an_error():
    with pytest.raises(
        ValueError, match="2 documents are longer than a row of 5 tokens, the first is document 1 with 6"
    ):
        cut_long(np.array([5, 6, 7]), 5, "error")


@settings(max_examples=60, deadline=None)
@given(
    LENGTHS.filter(lambda lengths: sum(lengths) > 1),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from(["first_fit", "best_fit"]),
    st.sampled_from(["rows", "documents"]),
    st.booleans(),
)
def test_every_document_is_in_every_epoch_once(lengths, seq_len, batch, packing, shuffle, across):
    """All tokens of a piece stand together, in one segment, at positions from 0; the rest of a row is padding."""
    source = Arrays(lengths)
    options = {"seq_len": seq_len, "batch": batch, "seed": 5, "packing": packing, "shuffle": shuffle}
    made = Plan(source, **options, epochs=2, across_documents=across)
    rows = [row for step in range(made.steps) for row in made.explain(step).rows]
    assert all(sum(piece.stop - piece.start for piece in row) <= seq_len + 1 for row in rows)
    for epoch in range(2):
        pieces = sorted((p.document, p.start, p.stop) for row in rows for p in row if p.epoch == epoch)
        expected = zip(*(part.tolist() for part in cut_long(np.array(lengths), seq_len + 1, "split")), strict=True)
        assert pieces == sorted(expected)
    summary = made.yields[""]
    assert summary.tokens + summary.padding == summary.rows * (seq_len + 1)
    assert summary.left_out == 0
    batches = [made.at(step) for step in range(made.steps)]
    flat = iter(rows)
    for got in batches:
        for tokens, targets, weights, positions, segments in zip(*got[:5], strict=True):
            ids = np.concatenate([tokens, targets[-1:]])
            expected, places, numbers = [], [], []
            for number, piece in enumerate(next(flat), 1):
                first = source.starts[piece.document]
                expected += range(first + piece.start, first + piece.stop)
                places += range(piece.stop - piece.start)
                numbers += [number] * (piece.stop - piece.start)
            pad = seq_len + 1 - len(expected)
            assert ids.tolist() == expected + [0] * pad
            assert segments.tolist() == (numbers + [0] * pad)[:-1]
            assert positions.tolist() == (places + [0] * pad)[:-1]
            known = np.array(numbers + [0] * pad)
            same = known[1:] != 0 if across else (known[1:] == known[:-1]) & (known[1:] != 0)
            assert (weights == same).all()


@pytest.mark.parametrize("packing", ["first_fit", "best_fit"])
def test_epochs_have_other_orders_and_steps_any_place(packing):
    """Rows are the same ones in another order; far epochs cost what near ones cost."""
    made = Plan(Arrays(range(1, 60)), seq_len=70, batch=1, seed=1, packing=packing)
    per_epoch = made.yields[""].rows
    epochs = [[made.at(step).tokens.tobytes() for step in range(first, first + per_epoch)] for first in (0, per_epoch)]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert sorted(made.at(per_epoch * 10**12 + i).tokens.tobytes() for i in range(per_epoch)) == sorted(epochs[0])


def test_what_is_cropped_or_dropped_is_counted():
    """Nothing is lost in silence."""
    source = Arrays([4, 30, 3])
    found = {
        policy: Plan(source, seq_len=9, batch=1, seed=0, packing="best_fit", over_long=policy).yields[""]
        for policy in ("split", "crop", "drop")
    }
    assert found["split"].left_out == 0
    assert (found["crop"].left_out, found["drop"].left_out) == (20, 30)
    with pytest.raises(ValueError, match="document 1 with 30"):
        Plan(source, seq_len=9, batch=1, seed=0, packing="best_fit", over_long="error")
    with pytest.raises(ValueError, match="no document of 1 is in a row"):
        Plan(Arrays([30]), seq_len=9, batch=1, seed=0, packing="best_fit", over_long="drop")


@pytest.mark.parametrize(
    ("options", "message"), [({"packing": "tight"}, "packing='tight'"), ({"over_long": "cut"}, "over_long='cut'")]
)
def test_wrong_options_are_refused(options, message, untyped):
    with pytest.raises(ValueError, match=message):
        Plan(Arrays([5, 6]), seq_len=4, batch=1, seed=0, **options)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="lengths span 0 to 3; expected 1 to 4"):
        pack(np.array([0, 3]), 4, "best_fit")
