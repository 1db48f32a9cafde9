"""RMS normalisation against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import rms_norm


@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3, 7), (0, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_closed_form(shape: tuple[int, ...], weighted: bool) -> None:
    """Value and gradient, for any leading axes, with and without a weight."""
    rng = np.random.default_rng(0)
    x, weight, cotangent = rng.standard_normal(shape) * 3, rng.standard_normal(shape[-1]), rng.standard_normal(shape)
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-3)
    factor = weight if weighted else np.ones_like(weight)
    scaled = cotangent * factor
    gradient = scaled / root - x * (scaled * x).mean(axis=-1, keepdims=True) / root**3

    @jax.jit
    def run(x: jax.Array, weight: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda x, w: rms_norm(x, w if weighted else None, eps=1e-3), x, weight)
        return (out, *pull(cotangent))

    out, dx, dw = run(*(jnp.asarray(a, jnp.float32) for a in (x, weight, cotangent)))
    np.testing.assert_allclose(out, x / root * factor, atol=1e-5)
    np.testing.assert_allclose(dx, gradient, atol=1e-5)
    if weighted:
        np.testing.assert_allclose(dw, (cotangent * x / root).reshape(-1, shape[-1]).sum(axis=0), atol=1e-5)


def test_precision() -> None:
    """16-bit inputs are normalised in float32 (a sum of squares overflows float16), float64 in float64."""
    x = jnp.full((2, 8), 300.0, jnp.float16)
    np.testing.assert_array_equal(rms_norm(x), np.ones((2, 8)))
    assert rms_norm(x.astype(jnp.bfloat16), jnp.ones(8)).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = np.random.default_rng(0).standard_normal((2, 8))
        expected = wide / np.sqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(rms_norm(jnp.asarray(wide)), expected, rtol=1e-14)


def test_zeros_are_finite() -> None:
    """Rows of zeros (padding) give zeros and finite gradients."""
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(rms_norm(x)))(jnp.zeros((2, 4)))
    assert value == 0
    assert np.isfinite(gradient).all()


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """A weight of another size must not be broadcast; integers must not be rounded back."""
    with pytest.raises(ValueError, match=r"weight has shape \(1,\); expected \(4,\)"):
        rms_norm(jnp.ones((2, 4)), jnp.ones(1))
    with pytest.raises(TypeError, match="int32"):
        rms_norm(jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        rms_norm(jnp.float32(1))
