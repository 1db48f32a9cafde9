"""Penalties and biases against loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import bias_logits, penalize


def by_hand(logits, history, prompt, repetition, presence, frequency):
    out = np.array(logits, np.float64)
    for row in range(len(out)):
        for token in range(out.shape[1]):
            count = (history[row] == token).sum()
            if count or (prompt[row] == token).any():
                out[row, token] *= repetition[row] if out[row, token] < 0 else 1 / repetition[row]
            out[row, token] -= presence[row] * (count > 0) + frequency[row] * count
    return out


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_penalties(dtype):
    """A penalty counts padding, the prompt or a token twice, or mixes up rows."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((3, 11)) * 3, dtype)
    history, prompt = rng.integers(-1, 12, (3, 9), np.int32), rng.integers(-2, 12, (3, 4), np.int32)
    options = {
        "repetition": np.float32([1.0, 1.3, 0.7]),
        "presence": np.float32([0.5, 0.0, -1.0]),
        "frequency": np.float32([0.0, 0.25, 2.0]),
    }
    got = jax.jit(penalize)(logits, jnp.asarray(history), prompt=jnp.asarray(prompt), **options)
    expected = by_hand(np.asarray(logits, np.float64), history, prompt, *options.values())
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert got.dtype == jnp.float32


def test_nothing_asked_for_changes_nothing():
    """The defaults, an empty history and rows of padding leave the logits alone."""
    logits = jnp.asarray([[1.0, -2.0, -jnp.inf]])
    for history in (jnp.zeros((1, 0), jnp.int32), jnp.asarray([[-1, 3]]), jnp.asarray([[0, 1]])):
        np.testing.assert_array_equal(penalize(logits, history), logits)
    empty = penalize(logits, jnp.asarray([[-1, 7]]), repetition=2.0, presence=1.0, frequency=1.0)
    np.testing.assert_array_equal(empty, logits)


def test_bias():
    """A dense bias is a sum; a sparse one adds up where an id is there twice and ignores padding."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)), jnp.bfloat16)
    dense = jnp.asarray([[0.0, 1.5, 0.0, -jnp.inf, 0.0], [0.25, 0.0, 0.0, 0.0, 0.0]])
    ids = jnp.asarray([[1, 3, -1, 1], [0, 5, -7, 99]])
    values = jnp.asarray([[1.0, -jnp.inf, 8.0, 0.5], [0.25, 7.0, 7.0, 7.0]])
    np.testing.assert_array_equal(bias_logits(logits, dense), logits.astype(jnp.float32) + dense)
    np.testing.assert_allclose(jax.jit(bias_logits)(logits, values, ids), bias_logits(logits, dense), rtol=1e-6)


@pytest.mark.usefixtures("untyped")
def test_bad_shapes():
    """A history of other rows must not be broadcast."""
    with pytest.raises(ValueError, match=r"history has shape \(1, 3\); expected 2 rows as logits \(2, 4\)"):
        penalize(jnp.ones((2, 4)), jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"prompt has shape \(2,\)"):
        penalize(jnp.ones((2, 4)), jnp.ones((2, 3), jnp.int32), prompt=jnp.ones(2, jnp.int32))
    with pytest.raises(ValueError, match=r"bias has shape \(2, 3\)"):
        bias_logits(jnp.ones((2, 4)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4\), ids \(1, 4\)"):
        bias_logits(jnp.ones((2, 4)), jnp.ones((1, 4)), jnp.ones((1, 4), jnp.int32))
