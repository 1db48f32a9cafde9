"""Mixtures: every row against a list made one by one, stages, limits, states across a change of the blend."""

import json

import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data import Mixture, Plan
from dovetail_data.interleaving import Turns, shares
from dovetail_data.mixture import Timeline
from dovetail_protocols.testing import check_plan


def sources(**tokens):
    """Sources of one vocabulary whose ids do not overlap."""
    return {name: Shifted([7] * count, name, 10_000 * place) for place, (name, count) in enumerate(tokens.items())}


class Shifted(Arrays):
    """Tokens from an offset on."""

    vocab_size = 100_000

    def __init__(self, lengths, name, offset):
        super().__init__(lengths, name)
        self.offset = offset

    def gather(self, documents, starts, stops):
        return super().gather(documents, starts, stops) + np.uint32(self.offset)


STAGES = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.sampled_from([0, 1, 2, 3, 7]), min_size=4, max_size=4).filter(any)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(STAGES, st.lists(st.sampled_from([None, 1, 2, 9, 30]), min_size=4, max_size=4), st.booleans())
def test_every_row_against_one_row_at_a_time(stages, limits, stop):
    """Sources, ordinals, counts and the end, as a loop over rows finds them that knows nothing of spans."""
    starts = np.cumsum([0, *(rows for rows, _ in stages)])[:-1].tolist()
    weights = [shares(part) for _, part in stages]
    made = Timeline(list(zip(starts, weights, strict=True)), limits, stop=stop)
    taken, expected, current, begun, rows = [0] * 4, [], None, 0, 200
    for row in range(rows):
        due = weights[max(i for i, start in enumerate(starts) if start <= row)]
        if row in starts:
            current = None
        while True:
            left = [limit is None or limit > has for limit, has in zip(limits, taken, strict=True)]
            if current is None:
                active = [share if kept else 0 for share, kept in zip(due, left, strict=True)]
                if not any(active) or (stop and active != list(due)):
                    current = []
                    break
                current, begun = active, row
            source = int(Turns(current).whose(np.array([row - begun]))[0])
            if left[source]:
                break
            current = None
        if not current:
            break
        expected.append((source, taken[source]))
        taken[source] += 1
    got = list(zip(*(part.tolist() for part in made.find(np.arange(rows))), strict=True))
    assert got[: len(expected)] == expected
    assert all(source == -1 for source, _ in got[len(expected) :])
    assert made.count == len(expected) if len(expected) < rows else made.count is None or made.count >= rows
    for prefix in range(0, len(expected), 7):
        assert made.counts(prefix).tolist() == [sum(s == i for s, _ in expected[:prefix]) for i in range(4)]


def test_rows_are_those_of_the_sources():
    """A mixture reorders nothing inside a source: its rows of one source are a plan of it alone, row by row."""
    given = sources(web=40, code=30, maths=20)
    mixture = Mixture(given, [(0, {"web": 0.5, "code": 0.5}), (8, {"web": 0.2, "code": 0.3, "maths": 0.5})])
    made = Plan(mixture, seq_len=6, batch=5, seed=3)
    check_plan(made, steps=12)
    owners = np.concatenate([made.at(step).tokens[:, 0] // 10_000 for step in range(16)])
    assert {piece.source for row in made.explain(3).rows for piece in row} <= {"web", "code"}
    assert np.bincount(owners[:40], minlength=3).tolist() == [20, 20, 0]
    assert np.bincount(owners[40:], minlength=3).tolist() == [8, 12, 20]
    assert made.counts(16) == {"web": 28, "code": 32, "maths": 20}
    for place, (name, source) in enumerate(given.items()):
        rows = np.concatenate([made.at(step).tokens for step in range(16)])[owners == place]
        alone = Plan(Mixture({name: source}, {name: 1}), seq_len=6, batch=len(rows), seed=3)
        np.testing.assert_array_equal(rows, alone.at(0).tokens)


def test_stages_in_tokens():
    """The blend changes with the row that the tokens reach."""
    mixture = Mixture(sources(web=9, code=9), [(0, {"web": 1}), (61, {"code": 1})], unit="tokens")
    made = Plan(mixture, seq_len=6, batch=4, seed=0)
    owners = np.concatenate([made.at(step).tokens[:, 0] // 10_000 for step in range(5)])
    assert owners.tolist() == [0] * 11 + [1] * 9


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_limits(packing):
    """A source is read as often as it may be; then the others have its part, or the plan ends."""
    given = sources(small=6, large=200)
    options = {"seq_len": 13, "batch": 2, "seed": 1, "packing": packing}
    weights = {"small": 0.5, "large": 0.5}
    endless = Plan(Mixture(given, weights, max_epochs={"small": 2}), **options)
    assert endless.steps is None
    reached = [endless.counts(step)["small"] for step in range(0, 50, 10)]
    most = Plan(Mixture({"small": given["small"]}, {"small": 1}, max_epochs={"small": 2}), **options).rows
    assert reached[-1] == reached[-2] == most
    ending = Plan(Mixture(given, weights, max_epochs={"small": 2}, on_exhausted="stop"), **options)
    assert ending.counts(ending.steps)["small"] == most
    assert abs(ending.rows - 2 * most) <= 1
    documents = [
        p.document for k in range(ending.steps) for row in ending.explain(k).rows for p in row if p.source == "small"
    ]
    counts = np.bincount(documents, minlength=6)
    assert (counts >= 2).all() if packing == "cut" else (counts == 2).all()
    both = Plan(Mixture(given, weights, max_epochs={"small": 2, "large": 1}), **options)
    assert both.counts(both.steps) == {"small": most, "large": both.rows - most}
    last = both.at(both.steps - 1)
    assert last.tokens.shape == (2, 13)
    with pytest.raises(IndexError, match="this plan has the steps"):
        both.at(both.steps)


def test_batches_that_grow():
    """Every row comes once and in the same order, whatever the steps."""
    source = Arrays([7] * 50)
    grown = Plan(source, seq_len=6, batch=[(0, 2), (3, 4), (5, 8)], seed=0)
    even = Plan(source, seq_len=6, batch=2, seed=0)
    rows = np.concatenate([grown.at(step).tokens for step in range(7)])
    assert [len(grown.at(step).tokens) for step in range(7)] == [2, 2, 2, 4, 4, 8, 8]
    np.testing.assert_array_equal(rows, np.concatenate([even.at(step).tokens for step in range(15)]))
    parts = [grown.loader(process_index=i, process_count=2, prefetch=0) for i in range(2)]
    for step, pair in zip(range(7), zip(*map(iter, parts), strict=True), strict=False):
        np.testing.assert_array_equal(np.concatenate([part.tokens for part in pair]), grown.at(step).tokens)
    with pytest.raises(ValueError, match="a divisor of the batch of 0:2,3:4,5:8 rows"):
        grown.loader(process_count=4)
    finite = Plan(source, seq_len=6, batch=[(0, 2), (3, 4)], seed=0, epochs=1)
    weights = sum(float(finite.at(step).loss_weights.sum()) for step in range(finite.steps))
    assert weights == source.tokens - len(source)


def test_the_future_may_change_and_the_past_may_not():
    """A saved position, JSON and back, goes on in a plan whose blend, batches or sources change later."""
    given = sources(web=40, code=30, maths=20)
    plain = {"web": given["web"], "code": given["code"]}
    stages = [(0, {"web": 0.7, "code": 0.3}), (4, {"web": 0.5, "code": 0.5})]
    options = {"seq_len": 6, "seed": 3}
    loader = iter(Plan(Mixture(plain, stages), batch=4, **options).loader())
    for _ in range(6):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    further = [*stages, (6, {"web": 0.1, "maths": 0.9})]
    changed = Plan(Mixture(given, further), batch=[(0, 4), (7, 8)], skip=[(9, 12)], **options)
    again = iter(changed.loader())
    again.set_state(state)
    np.testing.assert_equal(next(again), changed.at(6))
    for step in range(6):
        np.testing.assert_equal(changed.at(step), Plan(Mixture(plain, stages), batch=4, **options).at(step))
    other = [(0, {"web": 0.6, "code": 0.4}), (4, {"web": 0.5, "code": 0.5})]
    cases = [
        (Plan(Mixture(plain, other), batch=4, **options), "what begins before step 6 must be the same"),
        (Plan(Mixture(plain, [*stages, (5, {"web": 1})]), batch=4, **options), "before step 6"),
        (Plan(Mixture(plain, stages), batch=[(0, 4), (5, 8)], **options), "stages before step 6"),
        (
            Plan(Mixture(plain | {"web": Shifted([7] * 40, "new", 0)}, stages), batch=4, **options),
            "data web is web there",
        ),
        (Plan(Mixture(plain, stages, max_epochs={"web": 1}), batch=4, **options), "before step 6"),
        (Plan(given["web"], batch=4, **options), "mixture is .* there and None here"),
    ]
    for plan, message in cases:
        with pytest.raises(ValueError, match=message):
            iter(plan.loader()).set_state(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": {}}, "expected at least one"),
        ({"weights": {"web": 1, "books": 1}}, "'books'; the sources are"),
        ({"weights": {"web": 0}}, "stage at 0 steps: .* above 0"),
        ({"weights": {"web": -1}}, "number of 0 or more"),
        ({"weights": [(1, {"web": 1})]}, "rise from 0"),
        ({"weights": [(0, {"web": 1}), (0, {"code": 1})]}, "rise from 0"),
        ({"max_epochs": {"web": 0}}, "max_epochs of 'web' is 0"),
        ({"max_epochs": {"books": 1}}, "max_epochs names 'books'"),
        ({"unit": "epochs"}, "unit='epochs'"),
        ({"on_exhausted": "repeat"}, "on_exhausted='repeat'"),
        ({"sources": {"a b": Arrays([3])}, "weights": {"a b": 1}}, "source 'a b'"),
        ({"sources": {"web": Arrays([3]), "code": Arrays([4])}}, "expected one size"),
    ],
)
def test_wrong_mixtures_are_refused(arguments, message, untyped):
    plain = {"sources": sources(web=3, code=4), "weights": {"web": 0.5, "code": 0.5}}
    with pytest.raises(ValueError, match=message):
        Mixture(**(plain | arguments))


def test_the_fingerprint_tells_what_the_rows_depend_on():
    """The seventh digit of a weight makes other rows; a common factor does not."""
    given = sources(web=40, code=30)

    def fingerprint(web, code):
        return Plan(Mixture(given, {"web": web, "code": code}), seq_len=6, batch=4, seed=0).fingerprint

    assert fingerprint(100_001, 100_000) != fingerprint(100_002, 100_000)
    assert fingerprint(123_456, 123_455) != fingerprint(123_457, 123_455)
    assert fingerprint(0.8, 0.2) == fingerprint(4e6, 1e6)


def test_a_mixture_has_no_epochs():
    with pytest.raises(ValueError, match="max_epochs in the mixture"):
        Plan(Mixture(sources(web=3), {"web": 1}), seq_len=4, batch=1, seed=0, epochs=1)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (0, "batch=0; expected at least 1"),
        ([], "rise from 0"),
        ([(1, 2)], "rise from 0"),
        ([(0, 2), (0, 3)], "rise from 0"),
        ([(0, 0)], "at least 1"),
        ([(0, 1, 2)], "batch stage"),
    ],
)
def test_wrong_batches_are_refused(batch, message, untyped):
    with pytest.raises(ValueError, match=message):
        Plan(Arrays([9]), seq_len=4, batch=batch, seed=0)
