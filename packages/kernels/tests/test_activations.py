"""Gated linear units against float64 NumPy, with gradients by finite differences in float64."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Clamped, gated_linear_unit, gated_product
from dovetail_protocols import QuantizedArray

ERF = np.vectorize(math.erf)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


BY_HAND: dict[Any, Any] = {
    "silu": lambda a, b: a * sigmoid(a) * b,
    "gelu": lambda a, b: a * (1 + ERF(a / math.sqrt(2))) / 2 * b,
    "gelu_tanh": lambda a, b: a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) / 2 * b,
    "relu": lambda a, b: np.maximum(a, 0) * b,
    "relu2": lambda a, b: np.maximum(a, 0) ** 2 * b,
    "sigmoid": lambda a, b: sigmoid(a) * b,
    "identity": lambda a, b: a * b,
    "clamped": lambda a, b: np.minimum(a, 7) * sigmoid(1.702 * np.minimum(a, 7)) * (np.clip(b, -7, 7) + 1),
    Clamped(0.5, 2.0): lambda a, b: np.minimum(a, 2) * sigmoid(0.5 * np.minimum(a, 2)) * (np.clip(b, -2, 2) + 1),
}


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("activation", BY_HAND)
def test_values_and_gradients(activation: Any) -> None:
    """Every activation, separate and fused weights, biases, and the gradient of all of them."""
    operands = draw((5, 4), (4, 3), (4, 3), (3,), (3,), (5, 3))
    operands[0] *= 3  # beyond the limit of the clamped unit

    def by_hand(x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> np.ndarray:
        return BY_HAND[activation](x @ gate + gate_bias, x @ up + up_bias)

    *given, cotangent = operands

    def separate(x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> jax.Array:
        return gated_linear_unit(x, gate, up, activation=activation, gate_bias=gate_bias, up_bias=up_bias)

    def fused(x: Any, gate: Any, up: Any, gate_bias: Any, up_bias: Any) -> jax.Array:
        bias = jnp.stack([gate_bias, up_bias])
        return gated_linear_unit(x, jnp.stack([gate, up], 1), activation=activation, gate_bias=bias)

    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in given]
        for function in (separate, fused):
            out, pull = jax.vjp(jax.jit(function), *arrays)
            np.testing.assert_allclose(out, by_hand(*given), rtol=1e-12, atol=1e-12)
            for place, gradient in enumerate(pull(jnp.asarray(cotangent))):
                (direction,) = draw(given[place].shape)
                ends = [
                    by_hand(*(g + (s * 1e-6 * direction if i == place else 0) for i, g in enumerate(given)))
                    for s in (1, -1)
                ]
                slope = ((ends[0] - ends[1]) * cotangent).sum() / 2e-6
                np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


def test_products_of_given_factors() -> None:
    """Experts have their factors from grouped products; theirs must be the same unit."""
    gate, up = draw((3, 4), (3, 4))
    for activation, by_hand in BY_HAND.items():
        got = gated_product(jnp.asarray(5 * gate, jnp.float32), jnp.asarray(up, jnp.float32), activation=activation)
        np.testing.assert_allclose(got, by_hand(5 * gate, up), rtol=1e-5, atol=1e-5)
    half = jnp.asarray(gate, jnp.bfloat16)
    assert gated_product(half, half).dtype == jnp.bfloat16


def test_leading_axes_and_dtypes() -> None:
    """Any leading axes, none of them, empty ones; activations of 16 bits over parameters of 32."""
    x, gate, up = (jnp.asarray(a, jnp.float32) for a in draw((2, 3, 4), (4, 6), (4, 6)))
    expected = BY_HAND["silu"](np.asarray(x, np.float64) @ gate, np.asarray(x, np.float64) @ up)
    np.testing.assert_allclose(gated_linear_unit(x, gate, up), expected, atol=1e-5)
    np.testing.assert_allclose(gated_linear_unit(x[0, 0], gate, up), expected[0, 0], atol=1e-5)
    assert gated_linear_unit(x[:0], gate, up).shape == (0, 3, 6)
    short = gated_linear_unit(x.astype(jnp.bfloat16), gate, up)
    assert short.dtype == jnp.bfloat16
    np.testing.assert_allclose(short.astype(jnp.float32), expected, atol=0.2)
    np.testing.assert_allclose(jax.vmap(lambda x: gated_linear_unit(x, gate, up))(x), expected, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_both_weights_in_one(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit with one array for both weights computes and trains as one with two does, on one device or several."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    x, gate, up = (jnp.asarray(a, jnp.float32) for a in draw((300 + devices, 4), (4, 6), (4, 6)))
    bias, both = jnp.asarray(draw((2, 6))[0], jnp.float32), jnp.stack([gate, up], 1)

    def one(x: jax.Array, both: jax.Array) -> jax.Array:
        return gated_linear_unit(x, both, gate_bias=bias)

    def two(x: jax.Array, both: jax.Array) -> jax.Array:
        return gated_linear_unit(x, both[:, 0], both[:, 1], gate_bias=bias[0], up_bias=bias[1])

    def uses(unit: Any) -> Any:
        def all_of_them(x: jax.Array, both: jax.Array) -> Any:
            gradients = jax.grad(lambda *a: jnp.sum(unit(*a) ** 2), (0, 1))
            tangents = jax.jvp(unit, (x, both), (x, both))[1]
            curvature = jax.jvp(gradients, (x, both), (x, both))[1]
            return unit(x, both), gradients(x, both), tangents, curvature

        return jax.jit(all_of_them)(x, both)

    for a, b in zip(jax.tree.leaves(uses(one)), jax.tree.leaves(uses(two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * float(jnp.abs(b).max()))


def test_quantized_weights() -> None:
    """Weights pass the seam: a quantized one gives what its values give."""
    (x,) = draw((3, 4))
    values = np.random.default_rng(1).integers(-9, 10, (2, 4, 6)).astype(np.int8)
    quantized = [QuantizedArray.checked(jnp.asarray(v), jnp.full((1, 1), 0.1), None, jnp.float32) for v in values]
    got = gated_linear_unit(jnp.asarray(x, jnp.float32), *quantized)
    np.testing.assert_allclose(got, BY_HAND["silu"](x @ (values[0] * 0.1), x @ (values[1] * 0.1)), atol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """What does not fit is named."""
    x, w = jnp.ones((2, 4)), jnp.ones((4, 3))
    call: Any = gated_linear_unit
    for operands, options, message in (
        ((x, w), {}, r"gate \(4, 3\); x \(2, 4\) needs \(4, 2, 3\), both"),
        ((x, w, w.T), {}, r"up \(3, 4\)"),
        ((x, w, w), {"activation": "swish"}, "'swish'; expected one of"),
        ((x, w, w), {"gate_bias": jnp.ones(4)}, r"gate_bias has shape \(4,\); expected \(3,\)"),
        ((x, jnp.ones((4, 2, 3))), {"up_bias": jnp.ones(3)}, "up_bias without up"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*operands, **options)
    product: Any = gated_product
    with pytest.raises(ValueError, match=r"gate \(2, 4\), up \(2, 2\); expected equal shapes"):
        product(x, x[:, :2])
    with pytest.raises(ValueError, match="activation='swish'; expected one of"):
        product(x, x, activation="swish")
    with pytest.raises(TypeError, match="x has dtype int32"):
        call(jnp.ones((2, 4), jnp.int32), w, w)
