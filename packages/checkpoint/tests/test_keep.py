"""Keep policies against a brute-force model."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail_checkpoint import Committed, Policy, all_steps, best, every, latest

METRIC = st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]) | st.none()
POLICIES = st.sampled_from(
    [
        (latest(1), lambda h: _last(h, 1)),
        (latest(3), lambda h: _last(h, 3)),
        (every(4), lambda h: {s for s, _ in h if s % 4 == 0}),
        (best("loss", 1), lambda h: _brute_best(h, 1, 1)),
        (best("loss", 2), lambda h: _brute_best(h, 2, 1)),
        (best("loss", 2, mode="max"), lambda h: _brute_best(h, 2, -1)),
        (all_steps(), lambda h: {s for s, _ in h}),
    ]
)


def _last(history, n):
    return {s for s, _ in history if sum(t > s for t, _ in history) < n}


def _brute_best(history, n, sign):
    """A step is among the n best when fewer than n others beat it: better value, or equal and later."""
    valued = [(s, sign * m) for s, m in history if m is not None and not math.isnan(m)]
    return {s for s, m in valued if sum((o < m) or (o == m and t > s) for t, o in valued) < n}


@given(st.dictionaries(st.integers(0, 40), METRIC, min_size=1, max_size=12), st.lists(POLICIES, min_size=1, max_size=3))
def test_online_deletion_equals_the_policy_on_the_whole_history(steps, chosen):
    """If a policy forgot a step that it wants later, deleting step by step would differ from judging all at once."""
    policy = chosen[0][0]
    for other, _ in chosen[1:]:
        policy = policy | other
    alive: list[tuple[int, float | None]] = []
    for step in sorted(steps):
        alive.append((step, steps[step]))
        history = [Committed(s, {} if m is None else {"loss": m}) for s, m in alive]
        kept = policy.kept(history) | {step}
        alive = [(s, m) for s, m in alive if s in kept]
    whole = sorted(steps.items())
    assert {s for s, _ in alive} == set().union(*(model(whole) for _, model in chosen)) | {max(steps)}


def test_ties_go_to_the_later_step_and_nan_never_wins():
    """A run whose loss turned NaN must not displace its best step."""
    history = [Committed(1, {"loss": 1.0}), Committed(2, {"loss": 1.0}), Committed(3, {"loss": math.nan})]
    assert best("loss").kept(history) == {2}
    assert best("loss", 5).kept(history) == {1, 2}
    assert best("absent").kept(history) == frozenset()


@pytest.mark.parametrize(
    "make",
    [
        lambda: latest(0),
        lambda: latest(True),
        lambda: latest(1.5),
        lambda: every(-1),
        lambda: best("", 1),
        lambda: best("loss", 0),
        lambda: best("loss", mode="least"),
    ],
)
def test_bad_arguments_are_refused(make):
    """A policy that keeps nothing by mistake would delete everything."""
    with pytest.raises(ValueError, match="expected"):
        make()


def test_only_policies_are_joined():
    """Joining with anything else is a mistake that Python must report."""
    with pytest.raises(TypeError):
        latest(1) | 3
    with pytest.raises(NotImplementedError):
        Policy().kept([])
