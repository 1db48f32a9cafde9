"""Speculative verification against the target's own distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Sampling, filter_logits, sample, verify_draft

VERIFY = jax.jit(verify_draft)
SAMPLE = jax.jit(sample)
LIMITS = {1: 15.2, 2: 18.5, 3: 21.2, 4: 23.6, 5: 25.8}  # chi-square at p = 1e-4 by degrees of freedom


def how(rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, position=0):
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32, jnp.int32)
    values = (temperature, top_k, top_p, min_p, seed, position)
    return Sampling(*(jnp.broadcast_to(jnp.asarray(v, d), (rows,)) for v, d in zip(values, dtypes, strict=True)))


def agree(tokens, probabilities):
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), np.asarray(probabilities) * len(tokens)
    inside = expected > 0
    assert not counts[~inside].any()
    if inside.sum() > 1:
        assert ((counts - expected)[inside] ** 2 / expected[inside]).sum() < LIMITS[int(inside.sum()) - 1]


@functools.cache
def logits():
    rng = np.random.default_rng(4)
    return [jnp.asarray(x, jnp.float32) for x in (rng.standard_normal((3, 6)), rng.standard_normal((2, 6)) * 1.5)]


@pytest.mark.thin(2)
@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("params", [{}, {"temperature": 0.6, "top_k": 4}])
def test_the_targets_distribution(drawn, params):
    """Speculation changes what a model says: each position of 30,000 replies, drafts from another model or fixed."""
    draws = 30000
    target, other = logits()
    base = how(draws, **params, seed=jnp.arange(draws), position=3)
    plain = how(draws, seed=jnp.arange(draws), position=3)

    @jax.jit
    def run():
        rows = jnp.broadcast_to(other, (draws, 2, 6))
        drafts = [sample(rows[:, i], plain._replace(position=plain.position + i)) for i in (0, 1)]
        drafts = jnp.stack(drafts, 1) if drawn else jnp.broadcast_to(jnp.asarray([1, 4]), (draws, 2))
        q = jnp.stack([filter_logits(rows[:, i], plain) for i in (0, 1)], 1) if drawn else None
        return drafts, verify_draft(drafts, jnp.broadcast_to(target, (draws, 3, 6)), base, draft_logits=q)

    drafts, (tokens, kept) = jax.tree.map(np.asarray, run())
    p = np.asarray(jax.nn.softmax(filter_logits(target, how(3, **params)), -1), np.float64)
    for place in range(3):
        there = tokens[:, place] >= 0
        assert (there == (kept >= place)).all()
        agree(tokens[there, place], p[place])
    assert (drafts[kept > 0, 0] == tokens[kept > 0, 0]).all()
    if drawn:
        q = np.asarray(jax.nn.softmax(other, -1), np.float64)
        rate = np.minimum(p[0], q[0]).sum()
        assert abs((kept > 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / draws)  # as many as any rule can keep


def test_greedy_keeps_the_likeliest():
    """At temperature 0 the reply must be that of plain greedy decoding, by row and up to the row's length."""
    target = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4, 9)), jnp.float32)
    best = np.asarray(target.argmax(-1))
    drafts = best[:, :3].copy()
    drafts[1, 0] += 1
    drafts[2, 2] += 1
    drafts %= 9
    tokens, kept = VERIFY(jnp.asarray(drafts), target, how(5, temperature=0.0), lengths=jnp.asarray([3, 3, 3, 2, 0]))
    assert kept.tolist() == [3, 0, 2, 2, 0]
    for row, count in enumerate([3, 0, 2, 2, 0]):
        assert tokens[row].tolist() == [*best[row, : count + 1], *[-1] * (3 - count)]


def test_without_drafts_it_is_sample():
    """A row that has no drafts in some step must not change its reply for it."""
    target = jnp.asarray(np.random.default_rng(0).standard_normal((40, 3, 9)), jnp.float32)
    base = how(40, temperature=0.9, top_k=5, seed=jnp.arange(40), position=2)
    drafts = jnp.zeros((40, 2), jnp.int32)
    tokens, kept = VERIFY(drafts, target, base, lengths=jnp.zeros(40, jnp.int32))
    assert not kept.any()
    assert tokens[:, 0].tolist() == SAMPLE(target[:, 0], base).tolist()
    none = VERIFY(drafts[:, :0], target[:, :1], base)
    assert none.tokens[:, 0].tolist() == tokens[:, 0].tolist()


def test_certain_drafts_are_kept():
    """Drafts from the target's own distribution are never rejected, impossible ones and padding always."""
    target, _ = logits()
    rows = jnp.broadcast_to(target, (200, 3, 6))
    base = how(200, top_k=3, seed=jnp.arange(200))
    each = jax.tree.map(lambda x: jnp.repeat(x, 2), base)
    each = each._replace(position=each.position + jnp.tile(jnp.asarray([0, 1], jnp.int32), 200))
    flat = rows[:, :2].reshape(400, 6)
    q, drafts = jax.jit(filter_logits)(flat, each).reshape(200, 2, 6), SAMPLE(flat, each).reshape(200, 2)
    assert VERIFY(drafts, rows, base, draft_logits=q).kept.tolist() == [2] * 200
    unlikely = jnp.full((200, 2), int(target[0].argmin()), jnp.int32)
    for wrong in (unlikely, unlikely * 0 - 1, unlikely * 0 + 6):
        tokens, kept = VERIFY(wrong, rows, base)
        assert not kept.any()
        assert (tokens[:, 0] >= 0).all()


def test_composes():
    """A batch of batches or a rematerialised step verifies as one row after the other; shard_map is with sampling."""
    rng = np.random.default_rng(0)
    target, drafted = (jnp.asarray(rng.standard_normal((4, n, 9)), jnp.float32) for n in (3, 2))
    drafts, base = jnp.asarray(rng.integers(0, 9, (4, 2))), how(4, top_k=5, seed=jnp.arange(4), position=2)

    def step(drafts, target, base, drafted):
        return verify_draft(drafts, target, base, draft_logits=drafted)

    expected = step(drafts, target, base, drafted)
    pairs = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (drafts, target, base, drafted))
    mapped = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), jax.vmap(jax.checkpoint(step))(*pairs))
    jax.tree.map(np.testing.assert_array_equal, mapped, expected)


@pytest.mark.usefixtures("untyped")
def test_bad_shapes():
    """The target's logits after the last draft are needed too."""
    drafts = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"target_logits \(2, 3, 5\); expected \(2, 4, 'vocab'\)"):
        verify_draft(drafts, jnp.zeros((2, 3, 5)), how(2))
    with pytest.raises(ValueError, match=r"draft_logits \(2, 4, 5\); expected \(2, 3, 5\)"):
        verify_draft(drafts, jnp.zeros((2, 4, 5)), how(2), draft_logits=jnp.zeros((2, 4, 5)))
