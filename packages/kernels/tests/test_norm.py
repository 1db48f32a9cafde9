"""Normalisations against float64 NumPy."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import group_norm, layer_norm, rms_norm

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["blocked", "reference"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", [(5,), (3, 1), (2, 3, 7), (0, 4)])
@pytest.mark.parametrize("weighted", [False, True])
def test_closed_form(shape: tuple[int, ...], weighted: bool, implementation: str) -> None:
    """Value and gradient, for any leading axes, with and without a weight."""
    rng = np.random.default_rng(0)
    x, weight, cotangent = rng.standard_normal(shape) * 3, rng.standard_normal(shape[-1]), rng.standard_normal(shape)
    root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-3)
    factor = weight if weighted else np.ones_like(weight)
    scaled = cotangent * factor
    gradient = scaled / root - x * (scaled * x).mean(axis=-1, keepdims=True) / root**3

    @jax.jit
    def run(x: jax.Array, weight: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, ...]:
        def call(x: jax.Array, w: jax.Array) -> jax.Array:
            return rms_norm(x, w if weighted else None, eps=1e-3, implementation=implementation)

        out, pull = jax.vjp(call, x, weight)
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


@IMPLEMENTATIONS
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_every_option(centred: bool, axis: int, implementation: str) -> None:
    """Residual, offset of the weight, bias and axis, with the gradients of all operands by hand."""
    rng = np.random.default_rng(1)
    x, residual, dy, ds = (rng.standard_normal((3, 5, 4)) for _ in range(4))
    weight, bias = rng.standard_normal((2, x.shape[axis]))
    total = np.moveaxis(x + residual, axis, -1)
    cotangent = np.moveaxis(dy, axis, -1)
    mean = total.mean(-1, keepdims=True) * centred
    root = np.sqrt(((total - mean) ** 2).mean(-1, keepdims=True) + 1e-2)
    normed, scaled = (total - mean) / root, cotangent * (weight + 1)
    dx = scaled - (scaled * normed).mean(-1, keepdims=True) * normed - scaled.mean(-1, keepdims=True) * centred
    expected = {
        "out": np.moveaxis(normed * (weight + 1) + bias, -1, axis),
        "sum": x + residual,
        "dx": np.moveaxis(dx / root, -1, axis) + ds,
        "dweight": (cotangent * normed).reshape(-1, len(weight)).sum(0),
        "dbias": cotangent.reshape(-1, len(weight)).sum(0),
    }
    function = layer_norm if centred else rms_norm

    @jax.jit
    def run(
        x: jax.Array, residual: jax.Array, weight: jax.Array, bias: jax.Array, *cotangents: jax.Array
    ) -> list[jax.Array]:
        def call(x: jax.Array, r: jax.Array, w: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
            options = {"axis": axis, "weight_offset": 1.0, "eps": 1e-2, "implementation": implementation}
            return function(x, w, bias=b, residual=r, **options)

        (out, total), pull = jax.vjp(call, x, residual, weight, bias)
        dx, dr, dw, db = pull(cotangents)
        return [out, total, dx, dw, db, dr]

    got = run(*(jnp.asarray(a, jnp.float32) for a in (x, residual, weight, bias, dy, ds)))
    for value, (name, want) in zip(got, expected.items(), strict=False):
        np.testing.assert_allclose(value, want, atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(got[5], got[2])


@pytest.mark.parametrize("function", [rms_norm, layer_norm])
def test_higher_orders(function: Callable[..., jax.Array]) -> None:
    """Second order in reverse mode is that of the reference, which alone has forward mode; means do not cancel."""
    rng = np.random.default_rng(3)
    x, weight = jnp.asarray(rng.standard_normal((4, 6)) + 100, jnp.float32), jnp.asarray(rng.random(6), jnp.float32)

    def of(implementation: str) -> Callable[[jax.Array], jax.Array]:
        def loss(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(function(x, weight, implementation=implementation)))

        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))

    expected = of("reference")(x)
    np.testing.assert_allclose(of("blocked")(x), expected, atol=1e-4 * float(jnp.abs(expected).max()))
    tangent = jax.jvp(functools.partial(function, implementation="reference"), (x,), (x,))[1]
    np.testing.assert_allclose(tangent, np.zeros_like(x), atol=1e-3)


def test_gradients_need_no_large_array() -> None:
    """A backward pass that holds the normalised input beside the input costs as much memory as the activations."""
    x, weight = jax.ShapeDtypeStruct((4096, 256), jnp.float32), jax.ShapeDtypeStruct((256,), jnp.float32)

    def both(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(rms_norm, x, w)
        return (out, *pull(out))

    assert jax.jit(both).lower(x, weight).compile().memory_analysis().temp_size_in_bytes < x.size


def test_the_residual_sum_is_rounded_once() -> None:
    """The norm sees the sum in float32, and the stream of residuals gets it in its own dtype."""
    x, residual = jnp.full((1, 4), 256.0, jnp.bfloat16), jnp.asarray([[1.0, 0.0, -1.0, 0.0]], jnp.bfloat16)
    normed, total = layer_norm(x, residual=residual, eps=0.0)
    assert normed.dtype == total.dtype == jnp.bfloat16
    np.testing.assert_allclose(normed.astype(jnp.float32), [[2**0.5, 0, -(2**0.5), 0]], atol=1e-2)


def test_groups() -> None:
    """Groups are of neighbouring features, over all places of one example."""
    rng = np.random.default_rng(2)
    x, weight, bias = rng.standard_normal((2, 3, 5, 6)), rng.standard_normal(6), rng.standard_normal(6)
    expected = np.empty_like(x)
    for example in range(2):
        for group in (slice(0, 3), slice(3, 6)):
            part = x[example, ..., group]
            expected[example, ..., group] = (part - part.mean()) / np.sqrt(part.var() + 1e-5)
    got = group_norm(
        *(jnp.asarray(a, jnp.float32) for a in (x,)),
        2,
        jnp.asarray(weight, jnp.float32),
        jnp.asarray(bias, jnp.float32),
    )
    np.testing.assert_allclose(got, expected * weight + bias, atol=1e-5)


def test_empty_groups() -> None:
    """The last batch of an epoch may be empty, and so may an image."""
    for shape in ((0, 5, 4), (2, 0, 4), (2, 5, 0)):
        assert group_norm(jnp.ones(shape), 2).shape == shape


def test_default_eps() -> None:
    """Both norms of mean and variance have PyTorch's default: nearly constant features differ much by it."""
    x = jnp.array([[0.0, 4e-3]])
    expected = 2e-3 / np.sqrt(4e-6 + 1e-5)
    for out in (layer_norm(x), group_norm(x, 1)):
        np.testing.assert_allclose(out, [[-expected, expected]], rtol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """A weight of another size must not be broadcast; integers must not be rounded back."""
    with pytest.raises(ValueError, match=r"weight has shape \(1,\); expected \(4,\)"):
        rms_norm(jnp.ones((2, 4)), jnp.ones(1))
    with pytest.raises(TypeError, match="int32"):
        rms_norm(jnp.ones((2, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"shape \(\) and no axis -1"):
        rms_norm(jnp.float32(1))
    with pytest.raises(ValueError, match=r"residual has shape \(4,\); expected \(2, 4\)"):
        layer_norm(jnp.ones((2, 4)), residual=jnp.ones(4))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\); expected \(2,\)"):
        layer_norm(jnp.ones((2, 4)), bias=jnp.ones(4), axis=0)
    with pytest.raises(ValueError, match="groups=3; expected a divisor of the 4 features"):
        group_norm(jnp.ones((2, 4)), 3)
