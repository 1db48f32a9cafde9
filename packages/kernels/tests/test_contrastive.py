"""Contrastive losses against the whole matrix in float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import configured, contrastive_loss

SMALL = configured("blocked", chunk=3)


def make(pairs: int, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    sides = (jnp.asarray(rng.standard_normal((pairs, 4)), dtype) for _ in range(2))
    return *sides, jnp.asarray(1.7, dtype)


def truth(left: Any, right: Any, scale: Any, symmetric: bool) -> list[np.ndarray]:
    """Loss per pair, and the gradients of the sum."""
    left, right, scale = (np.asarray(x, np.float64) for x in (left, right, scale))
    z = scale * left @ right.T
    loss, dz = np.zeros(len(z)), np.zeros(z.shape)
    for axis in (1, 0) if symmetric else (1,):
        peak = z.max(axis, keepdims=True)
        lse = peak + np.log(np.exp(z - peak).sum(axis, keepdims=True))
        loss += lse.reshape(-1) - np.diag(z)
        dz += np.exp(z - lse) - np.eye(len(z))
    half = 0.5 if symmetric else 1.0
    return [loss * half, half * scale * dz @ right, half * scale * dz.T @ left, half * (dz * (left @ right.T)).sum()]


@pytest.mark.parametrize("implementation", [None, SMALL, "reference"], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pairs", [1, 11])
def test_closed_form(pairs: int, symmetric: bool, implementation: Any) -> None:
    """Image and text towers learn from a wrong gradient on one side, or a scale that drifts."""
    x = make(pairs)

    def total(left: Any, right: Any, scale: Any) -> Any:
        each = contrastive_loss(
            left, right, scale=scale, symmetric=symmetric, per_pair=True, implementation=implementation
        )
        return jnp.sum(each), each

    (_, each), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(*x)
    for a, b in zip((each, *gradients), truth(*x, symmetric), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
    loss, gradients = jax.value_and_grad(contrastive_loss, argnums=(0, 1))(
        *x[:2], scale=x[2], symmetric=symmetric, implementation=implementation
    )
    expected = truth(*x, symmetric)
    for a, b in zip((loss, *gradients), (expected[0].sum(), *expected[1:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_over_a_mesh() -> None:
    """Every device sees all negatives, and the gradients of the sum are those of the whole matrix."""
    x = make(24)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = jax.P("data"), jax.P()

    def own(left: Any, right: Any, scale: Any) -> Any:
        def total(left: Any, right: Any, scale: Any) -> Any:
            return jax.lax.psum(contrastive_loss(left, right, scale=scale, axis="data", implementation=SMALL), "data")

        return jax.value_and_grad(total, argnums=(0, 1, 2))(left, right, scale)

    loss, gradients = jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=(rows, rows, whole), out_specs=(whole, (rows, rows, whole)))
    )(*x)
    expected = truth(*x, symmetric=True)
    for a, b in zip((loss, *gradients), (expected[0].sum(), *expected[1:]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=5e-5)


def test_other_dtypes_and_empty() -> None:
    """16-bit embeddings give a float32 loss, float64 ones a float64 loss, no pairs none."""
    left, right, scale = make(9, jnp.bfloat16)
    loss = contrastive_loss(left, right, scale=1.0)
    np.testing.assert_allclose(loss, truth(left, right, 1.0, True)[0].sum(), rtol=1e-2)
    assert loss.dtype == jnp.float32
    assert contrastive_loss(left[:0], right[:0], scale=scale) == 0
    assert contrastive_loss(left[:0], right[:0], per_pair=True).shape == (0,)
    with jax.enable_x64(True):
        x = make(9, jnp.float64)
        loss = contrastive_loss(*x[:2], scale=x[2], implementation=SMALL)
        np.testing.assert_allclose(loss, truth(*x, True)[0].sum(), rtol=1e-13)


def test_memory() -> None:
    """The matrix of all pairs is never in memory."""
    shape = jax.ShapeDtypeStruct((4096, 8), jnp.float32)
    gradient = jax.jit(jax.grad(lambda a, b: contrastive_loss(a, b, implementation=configured("blocked", chunk=64))))
    analysis = gradient.lower(shape, shape).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4096 * 4096 * 4 / 8


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """Sides that do not pair up, or that are not floats, are refused with their shapes and dtypes."""
    with pytest.raises(ValueError, match=r"left \(3, 2\), right \(4, 2\); expected both \[pairs, features\]"):
        contrastive_loss(jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(TypeError, match="right has dtype int32"):
        contrastive_loss(jnp.ones((3, 2)), jnp.ones((3, 2), jnp.int32))
