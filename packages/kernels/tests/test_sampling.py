"""Sampling against float64 sorts, closed forms and frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from dovetail_kernels import Sampling, filter_logits, logprobs, sample, top_logprobs, verify_draft


def how(rows=1, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    """Return parameters; each is one value for all rows, or one per row."""
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32, jnp.int32)
    values = (temperature, top_k, top_p, min_p, seed, position)
    return Sampling(*(jnp.broadcast_to(jnp.asarray(v, d), (rows,)) for v, d in zip(values, dtypes, strict=True)))


def kept(logits, temperature, top_k, top_p, min_p):
    """Return which tokens stay, by sorting in float64; None where rounding could decide the nucleus."""
    scaled = np.asarray(np.float32(logits) / np.float32(temperature), np.float64)
    stay = np.ones(len(scaled), bool)
    if 0 < top_k < len(scaled):
        stay &= scaled >= np.sort(scaled)[-top_k]
    if top_p < 1:
        mass = np.where(stay, np.exp(scaled - scaled.max()), 0.0)
        order = np.argsort(-scaled, kind="stable")
        total = np.cumsum(mass[order] / mass.sum())
        if np.min(np.abs(total - np.float32(top_p))) < 1e-5:
            return None
        last = scaled[order[np.searchsorted(total, top_p)]]
        stay &= scaled >= last
    if min_p > 0:
        floor = scaled.max() + np.log(np.float32(min_p))
        if np.min(np.abs(scaled - floor)) < 1e-5 and min_p < 1:
            return None
        stay &= scaled >= min(floor, scaled.max())
    return stay


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([1, 2, 7, 50]),
    spread=st.sampled_from([0.0, 0.1, 3.0, 1e4]),
    temperature=st.sampled_from([0.1, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 49, 50, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_filters_keep_what_a_sort_keeps(seed, vocab, spread, temperature, top_k, top_p, min_p):
    """A filter keeps too much or too little for some logits: ties, negative numbers, extreme temperatures."""
    logits = np.random.default_rng(seed).standard_normal(vocab) * spread
    expected = kept(logits, temperature, top_k, top_p, min_p)
    if expected is None:
        return
    params = how(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = np.asarray(JITTED(jnp.asarray(logits, jnp.float32)[None], params))[0]
    np.testing.assert_array_equal(np.isfinite(got), expected)
    np.testing.assert_allclose(got[expected], np.float32(logits[expected]) / np.float32(temperature), rtol=1e-6)


JITTED = jax.jit(filter_logits)


LARGE = 20011  # more than the blocks that a short look takes in, and no multiple of their size


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 50, "top_p": 0.95},
        {"top_k": 1},
        {"top_k": 5000},
        {"top_p": 0.5},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"top_k": 40, "min_p": 1e-6, "top_p": 0.3, "temperature": 0.7},
        {"temperature": 1.3},
    ],
)
def test_large_vocabularies(params, spread):
    """Looking at a few blocks of a row misses tokens that stay, or judges the nucleus by a part of the mass."""
    logits = np.random.default_rng(3).standard_normal((2, LARGE)).astype(np.float32) * spread
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | params
    got = np.asarray(JITTED(jnp.asarray(logits), how(2, **params)))
    for row, filtered in zip(logits, got, strict=True):
        expected = kept(row, **full)
        if expected is not None:
            np.testing.assert_array_equal(np.isfinite(filtered), expected)
    drawn = DRAWN(jnp.asarray(logits), how(2, **params, seed=5, position=11))
    assert drawn.tolist() == by_jax_random(got, 5, 11)


DRAWN = jax.jit(sample)


def by_jax_random(filtered, seed, position):
    """Return the tokens of a Gumbel maximum with jax's own noise over whole rows."""
    noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position), (LARGE,))
    return np.argmax(filtered + noise, -1).tolist()


def test_large_vocabularies_with_ties():
    """More equal logits than a short look holds: all of them tie with the last that stays."""
    logits = jnp.zeros((1, LARGE)).at[0, 7].set(1.0)
    assert np.isfinite(JITTED(logits, how(top_k=3))).sum() == LARGE
    assert np.isfinite(JITTED(logits, how(top_k=1))).sum() == 1
    rows = jnp.broadcast_to(logits.at[0, 19000].set(1.0), (20, LARGE))
    chosen = DRAWN(rows, how(20, top_k=2, seed=jnp.arange(20)))
    assert set(chosen.tolist()) == {7, 19000}


def test_large_vocabularies_with_forbidden_tokens():
    """A grammar leaves few tokens: nothing else may be drawn, and more tokens may be asked for than there are."""
    allowed = [0, 31, 5000, LARGE - 1]
    logits = jnp.full((60, LARGE), -jnp.inf).at[:, jnp.asarray(allowed)].set(0.5)
    for params in ({}, {"top_k": 50}, {"top_p": 0.99}, {"top_k": 2, "top_p": 0.5}):
        assert set(DRAWN(logits, how(60, **params, seed=jnp.arange(60))).tolist()) == set(allowed)


def test_large_greedy():
    """The likeliest token is looked for by blocks: the first of equals, the last token, and NaN must be found."""
    logits = (
        jnp.zeros((4, LARGE)).at[0, LARGE - 1].set(1.0).at[1, 77].set(2.0).at[1, 78].set(2.0).at[2, 99].set(jnp.nan)
    )
    assert DRAWN(logits, how(4, temperature=0.0)).tolist() == [LARGE - 1, 77, 99, 0]


def test_min_p_is_relative_to_the_likeliest_probability():
    """min_p scales logits instead of probabilities: p = [.5, .3, .15, .05] at .5 must leave [.625, .375]."""
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    probabilities = jax.nn.softmax(filter_logits(logits, how(min_p=0.5)), -1)
    np.testing.assert_allclose(probabilities[0], [0.625, 0.375, 0.0, 0.0], atol=1e-6)


def test_temperature_comes_before_the_nucleus():
    """The nucleus is taken at temperature 1: at 4 these four are nearly even, and .8 of the mass needs all of them."""
    logits = jnp.log(jnp.asarray([[0.7, 0.1, 0.1, 0.1]]))
    assert np.isfinite(filter_logits(logits, how(top_p=0.8))).sum() == 4  # the three others tie
    logits = jnp.log(jnp.asarray([[0.81, 0.1, 0.06, 0.03]]))
    assert np.isfinite(filter_logits(logits, how(top_p=0.8))).sum() == 1
    assert np.isfinite(filter_logits(logits, how(top_p=0.8, temperature=4.0))).sum() == 3


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3, "temperature": 1.5}]
)
def test_tokens_come_as_often_as_they_should(params):
    """Samples are drawn from another distribution than the filtered softmax (chi-square of 20,000 draws, p > 1e-4)."""
    logits = jnp.asarray([1.0, 0.2, -0.5, 1.5, -2.0, 0.0])
    draws = 20000
    rows = jnp.broadcast_to(logits, (draws, 6))
    chosen = np.asarray(jax.jit(sample)(rows, how(draws, **params, seed=jnp.arange(draws), position=5)))
    expected = np.asarray(jax.nn.softmax(filter_logits(logits[None], how(**params)), -1))[0] * draws
    counts = np.bincount(chosen, minlength=6)
    assert not counts[expected == 0].any()
    inside = expected > 0
    chi2 = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    limits = {2: 15.2, 3: 18.5, 4: 21.2, 5: 23.6, 6: 25.8}
    assert chi2 < limits[int(inside.sum())]


def test_a_row_depends_on_itself_alone():
    """Neighbours, their number or their parameters change a row's token."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), jnp.float32)
    alone = [int(DRAWN(logits[i : i + 1], how(temperature=0.9, top_k=9, seed=7 + i, position=i))[0]) for i in range(6)]
    params = how(6, temperature=0.9, top_k=9, seed=7 + jnp.arange(6), position=jnp.arange(6))
    assert DRAWN(logits, params).tolist() == alone
    greedy = params._replace(temperature=params.temperature.at[2].set(0.0), top_k=params.top_k.at[4].set(0))
    mixed = DRAWN(logits, greedy).tolist()
    assert [mixed[i] for i in (0, 1, 3, 5)] == [alone[i] for i in (0, 1, 3, 5)]
    assert mixed[2] == int(logits[2].argmax())


def test_seed_and_position_both_matter():
    """Every position of a reply, or every request, gets the same random numbers."""
    logits = jnp.zeros((64, 1000))
    by_position = DRAWN(logits, how(64, seed=3, position=jnp.arange(64)))
    by_seed = DRAWN(logits, how(64, seed=jnp.arange(64), position=3))
    assert len(set(by_position.tolist())) > 55
    assert len(set(by_seed.tolist())) > 55


def test_greedy_takes_the_first_of_equals():
    """Ties are broken by chance at temperature 0."""
    assert sample(jnp.asarray([[1.0, 3.0, 3.0]]), how(temperature=0.0)).tolist() == [1]


@pytest.mark.parametrize("temperature", [2e-38, 5e-38, 1e-20, 3e38])
def test_extreme_temperatures_keep_the_likeliest(temperature):
    """A temperature near zero makes infinities of the logits, and the likeliest token is dropped."""
    logits = jnp.asarray([[20.0, 19.0, 1.0, 0.0]])
    assert np.isfinite(filter_logits(logits, how(temperature=temperature, top_k=2, top_p=0.9))[0, 0])
    if temperature < 1:
        assert sample(logits, how(temperature=temperature)).tolist() == [0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logprobs_are_those_of_the_unfiltered_softmax(dtype):
    """Reported log-probabilities are not what a trainer computes."""
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 33)) * 5, dtype)
    exact = np.asarray(logits.astype(jnp.float32), np.float64)
    exact = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    tokens = jnp.asarray([0, 5, 32, 7])
    np.testing.assert_allclose(logprobs(logits, tokens), exact[np.arange(4), tokens], atol=1e-5)
    values, ids = top_logprobs(logits, 5)
    np.testing.assert_allclose(values, -np.sort(-exact, -1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(exact, np.asarray(ids), -1), values, atol=1e-5)


def test_logits_that_are_not_finite_show_in_the_logprob():
    """A model that broke is answered with a token as if nothing were wrong."""
    logits = jnp.asarray([[0.0, jnp.nan], [0.0, 1.0], [jnp.inf, 0.0]])
    tokens = sample(logits, how(3, temperature=0.0))
    assert np.isnan(logprobs(logits, tokens)).tolist() == [True, False, True]


def test_infinite_logits_and_nan():
    """A model that broke must be seen: its token is NaN's or infinity's at any temperature, not a plausible one."""
    bad = [jnp.inf, jnp.nan, jnp.inf, jnp.nan]
    logits = jnp.zeros((4, LARGE)).at[jnp.arange(4), jnp.asarray([3, 777, 19000, LARGE - 1])].set(jnp.asarray(bad))
    for params in ({}, {"top_p": 0.5}, {"top_k": 2, "min_p": 0.1}, {"temperature": jnp.inf}, {"temperature": 0.0}):
        tokens = DRAWN(logits, how(4, **params))
        assert tokens.tolist() == [3, 777, 19000, LARGE - 1]
    assert np.isnan(logprobs(logits, tokens)).all()
    filtered = JITTED(logits[:2, :800], how(2, top_p=0.5))
    np.testing.assert_array_equal(filtered, jnp.full((2, 800), -jnp.inf).at[0, 3].set(jnp.inf).at[1, 777].set(jnp.inf))
    verified = verify_draft(jnp.zeros((2, 1), jnp.int32), logits[:2, None, :800].repeat(2, 1), how(2))
    assert verified.tokens.tolist() == [[3, -1], [777, -1]]


def test_parameters_of_64_bits():
    """A program with jax_enable_x64 samples other tokens, or none; ids past 32 bits become those of other tokens."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, LARGE)), jnp.float32)
    rows, drafts = logits[:, :60].reshape(2, 3, 20), jnp.asarray([[1, 2], [3, 4]], jnp.int32)
    params = how(2, temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=7, position=3)
    expected = sample(logits, params), filter_logits(rows[:, 0], params), verify_draft(drafts, rows, params)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64 if x.dtype == jnp.float32 else np.int64) for x in params]
        for each in (params, Sampling(*wide), Sampling(*map(jnp.asarray, wide))):
            got = sample(logits, each), filter_logits(rows[:, 0], each), verify_draft(drafts, rows, each)
            jax.tree.map(np.testing.assert_array_equal, got, expected)
            assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(expected)]
        beyond = jnp.asarray([2**32 + 1] * 2)
        assert np.isnan(logprobs(logits, beyond)).all()
        assert not verify_draft(
            beyond[:, None], jnp.tile(rows[:1, :1].at[..., 1].set(9.0), (2, 2, 1)), params
        ).kept.any()
        everything = Sampling(*wide)._replace(top_k=beyond, top_p=params.top_p * 0 + 1, min_p=params.min_p * 0)
        assert np.isfinite(filter_logits(rows[:, 0], everything)).all()


def test_no_rows_and_unknown_ids():
    """An idle step crashes; the log-probability of padding is a neighbour's."""
    assert sample(jnp.zeros((0, LARGE)), how(0)).shape == (0,)
    assert filter_logits(jnp.zeros((0, 50)), how(0)).shape == (0, 50)
    assert np.isnan(logprobs(jnp.zeros((3, 5)), jnp.asarray([-1, 4, 5], jnp.int8))).tolist() == [True, False, True]


@pytest.mark.usefixtures("untyped")
def test_bad_input():
    """Parameters of another batch, or logits that are no logits, are refused with their names."""
    with pytest.raises(TypeError, match="logits have dtype int32; expected a float"):
        sample(jnp.zeros((2, 5), jnp.int32), how(2))
    with pytest.raises(ValueError, match=r"logits have shape \(2, 0\); expected at least one token"):
        filter_logits(jnp.zeros((2, 0)), how(2))
    with pytest.raises(ValueError, match=r"how.top_p has shape \(1,\); expected \(2,\), one per row"):
        verify_draft(jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 2, 5)), how(2)._replace(top_p=jnp.ones(1)))
    with pytest.raises(TypeError, match=r"how.top_k has dtype float32; expected integers"):
        sample(jnp.zeros((2, 5)), how(2)._replace(top_k=jnp.ones(2)))


def test_rows_over_devices():
    """Each device samples its rows, with replicated parameters or its own, inside shard_map with its checks on."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    target = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3, 9)), jnp.float32)
    same, drafts = how(1, top_k=3, seed=5), jnp.zeros((8, 2), jnp.int32)
    every = jax.tree.map(lambda x: jnp.repeat(x, 8), same)

    def run(target, drafts, params):
        return sample(target[:, 0], params), filter_logits(target[:, 1], params), verify_draft(drafts, target, params)

    expected = jax.jit(run)(target, drafts, every)
    for params, spec in ((every, rows), (same, whole)):
        mapped = jax.shard_map(run, mesh=mesh, in_specs=(rows, rows, spec), out_specs=rows)
        jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped)(target, drafts, params), expected)
