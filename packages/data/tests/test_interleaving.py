"""Turns: exact counts at every prefix, random access, and the order of Megatron-LM's blended datasets."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data.interleaving import MOST_TURNS, Turns, shares

SHARES = st.lists(st.sampled_from([0, 1, 1, 2, 3, 5, 17, 60]), min_size=1, max_size=8).filter(any)


def megatron(weights, count):
    """The order of `build_blending_indices`: the largest error goes next, the first of equals."""
    current, order = [0] * len(weights), []
    for place in range(count):
        errors = [weight * max(place, 1) - has for weight, has in zip(weights, current, strict=True)]
        order.append(errors.index(max(errors)))
        current[order[-1]] += 1
    return order


@settings(max_examples=200, deadline=None)
@given(SHARES)
def test_nobody_is_ever_a_turn_ahead_or_behind(given_shares):
    """At every prefix of three periods; ordinals, counts and places agree with the sequence."""
    turns = Turns(given_shares)
    count = 3 * turns.period
    whose, ordinals = turns.whose(np.arange(count)), turns.ordinals(np.arange(count))
    taken = np.cumsum(whose[:, None] == np.arange(len(given_shares)), axis=0)
    exact = np.arange(1, count + 1)[:, None] * np.array(given_shares)
    assert (np.abs(taken * turns.period - exact) <= turns.period).all()
    np.testing.assert_array_equal(ordinals + 1, taken[np.arange(count), whose])
    for prefix in {0, 1, turns.period - 1, turns.period, count - 1}:
        np.testing.assert_array_equal(turns.counts(prefix), taken[prefix - 1] if prefix else 0 * taken[0])
    for source, share in enumerate(given_shares):
        for taken_before in {0, share - 1, share, 2 * share} if share else ():
            place = turns.place(source, taken_before)
            assert (whose[place], ordinals[place]) == (source, taken_before)


def test_far_places_cost_what_near_ones_cost():
    """A place of which no list could be made."""
    turns = Turns((5, 3, 2))
    far = np.array([10**17, 10**17 + 1])
    np.testing.assert_array_equal(turns.whose(far), turns.whose(far % 10 + 10))
    assert turns.counts(10**17).tolist() == [5 * 10**16, 3 * 10**16, 2 * 10**16]


@pytest.mark.parametrize(
    "weights", [(5, 3, 2), (1, 1), (7, 2, 1), (80, 15, 5), (1, 1, 1), (333, 667), (40, 30, 20, 10)]
)
def test_the_order_is_megatrons(weights):
    """With weights that never leave anybody a turn behind there."""
    exact = [Fraction(weight, sum(weights)) for weight in weights]
    turns = Turns(shares(weights))
    count = 2 * turns.period + 3
    assert turns.whose(np.arange(count)).tolist() == megatron(exact, count)


def test_where_megatron_falls_behind_the_counts_stay_exact():
    """Breaks when most-behind-first alone decides: one of these sources is more than a turn behind there."""
    weights = (300, 3, 2, 2)
    exact = [Fraction(weight, sum(weights)) for weight in weights]
    order = np.array(megatron(exact, sum(weights)))
    taken = np.cumsum(order[:, None] == np.arange(4), axis=0)
    due = np.arange(1, len(order) + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(taken - due).max() > 1
    turns = Turns(weights)
    for prefix in range(sum(weights)):
        assert np.abs(turns.counts(prefix) - prefix * np.array(weights) / sum(weights)).max() <= 1


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.5, 0.3, 0.2], (5, 3, 2)),
        ([0.333, 0.667], (333, 667)),
        ([1 / 3, 2 / 3], (1, 2)),
        ([2e9, 1e9, 0], (2, 1, 0)),
        ([Fraction(1, 7), Fraction(6, 7)], (1, 6)),
        ([0.1, 0.2], (1, 2)),
        ([1e-300, 1.0], (1, MOST_TURNS - 1)),
    ],
)
def test_shares(weights, expected):
    assert shares(weights) == expected


def test_shares_of_odd_weights_are_close():
    """Counts of tokens as weights: no short period has them, and what is rounded is known."""
    weights = [123_456_789, 987_654_321, 55_555]
    got = np.array(shares(weights))
    assert got.sum() <= MOST_TURNS
    np.testing.assert_allclose(got / got.sum(), np.array(weights) / sum(weights), atol=1 / MOST_TURNS)


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1], ["much", 1]])
def test_wrong_weights_are_refused(weights, untyped):
    with pytest.raises(ValueError, match=r"expected .* 0"):
        shares(weights)
