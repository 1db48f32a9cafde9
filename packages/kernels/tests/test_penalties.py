"""Penalties and biases against loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

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


def test_ids_of_any_width():
    """Narrow ids cannot say where a large vocabulary ends; those past 32 bits become those of other tokens."""
    logits = jnp.ones((1, 500))
    narrow = penalize(logits, jnp.asarray([[3, -1]], jnp.int8), presence=1.0)
    np.testing.assert_array_equal(narrow, logits.at[0, 3].set(0.0))
    with jax.enable_x64(True):
        beyond = jnp.asarray([[2**32 + 1, -(2**32) + 1]])
        np.testing.assert_array_equal(penalize(logits, beyond, prompt=beyond, repetition=2.0, presence=1.0), logits)
        np.testing.assert_array_equal(bias_logits(logits, jnp.ones((1, 2), jnp.float32), beyond), logits)


def test_composes():
    """A batch of batches, a rematerialised step or rows over devices are penalized as one after the other."""
    rng = np.random.default_rng(0)
    logits, history = jnp.asarray(rng.standard_normal((8, 11)), jnp.float32), jnp.asarray(rng.integers(-1, 12, (8, 9)))
    presence = jnp.asarray(rng.standard_normal(8), jnp.float32)

    def step(logits, history, presence):
        out = penalize(logits, history, repetition=1.3, presence=presence, frequency=0.5)
        return bias_logits(out, presence[:, None], history[:, :1])

    expected = step(logits, history, presence)
    pairs = jax.vmap(step)(*(x.reshape(4, 2, *x.shape[1:]) for x in (logits, history, presence)))
    np.testing.assert_allclose(pairs.reshape(8, 11), expected, rtol=1e-6)
    mesh, rows = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("data")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=rows, out_specs=rows)
    for function in (jax.checkpoint(step), mapped):
        gradient = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(function(*x)))))  # noqa: B023
        value, slope = gradient(logits, history, presence)
        np.testing.assert_allclose(value, jnp.sum(jnp.sin(expected)), atol=1e-5)
        seen = (np.asarray(history)[..., None] == np.arange(11)).any(1)
        factor = np.where(seen, np.where(logits < 0, 1.3, 1 / 1.3), 1)
        np.testing.assert_allclose(slope, np.cos(expected) * factor, atol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_bad_input():
    """A history of other rows must not be broadcast, and a penalty must not make infinities of logits."""
    with pytest.raises(ValueError, match=r"history has shape \(1, 3\); expected 2 rows as logits \(2, 4\)"):
        penalize(jnp.ones((2, 4)), jnp.ones((1, 3), jnp.int32))
    with pytest.raises(ValueError, match=r"prompt has shape \(2,\)"):
        penalize(jnp.ones((2, 4)), jnp.ones((2, 3), jnp.int32), prompt=jnp.ones(2, jnp.int32))
    for number in (0, -1.5, float("nan")):
        with pytest.raises(ValueError, match=f"repetition={number}; expected a finite positive number"):
            penalize(jnp.ones((2, 4)), jnp.ones((2, 3), jnp.int32), repetition=number)
    with pytest.raises(ValueError, match=r"bias has shape \(2, 3\)"):
        bias_logits(jnp.ones((2, 4)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4\), ids \(1, 4\)"):
        bias_logits(jnp.ones((2, 4)), jnp.ones((1, 4)), jnp.ones((1, 4), jnp.int32))
