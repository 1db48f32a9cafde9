"""Products with quantized weights against float64 NumPy products of the dequantized ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import configured, quantized_matmul
from dovetail_protocols import QuantizedArray

INNER, OUTER = 24, 6
SMALL = configured("blocked", rows=9)
BOTH = pytest.mark.parametrize("implementation", ["reference", SMALL], ids=["reference", "blocked"])
FORMATS: dict[str, tuple[Any, tuple[int, int], bool]] = {
    "int8 per column": (jnp.int8, (1, OUTER), False),
    "int8 per matrix, zero point": (jnp.int8, (1, 1), True),
    "uint8 per column, zero point": (jnp.uint8, (1, OUTER), True),
    "int4 in groups": (jnp.int4, (6, OUTER), False),
    "int4 in groups of rows and columns, zero point": (jnp.int4, (3, 2), True),
    "int8 per element": (jnp.int8, (INNER, OUTER), False),
    "float8_e4m3fn": (jnp.float8_e4m3fn, (1, OUTER), False),
    "float8_e5m2 in groups": (jnp.float8_e5m2, (4, 1), False),
}


def weight(name: str) -> QuantizedArray:
    dtype, shape, shifted = FORMATS[name]
    rng = np.random.default_rng(0)
    low, high = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8)}.get(jnp.dtype(dtype).name, (-50, 50))
    qvalue = jnp.asarray(rng.integers(low, high, (INNER, OUTER)).astype(np.float32)).astype(dtype)
    scale = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
    zero_point = jnp.asarray(rng.integers(max(low, -8), 8, shape), jnp.float32) if shifted else None
    return QuantizedArray.checked(qvalue, scale, zero_point)


def dense(w: QuantizedArray) -> np.ndarray:
    """The float64 weight."""

    def spread(part: Any) -> np.ndarray:
        part = np.asarray(part, np.float64)
        return np.kron(part, np.ones((INNER // part.shape[0], OUTER // part.shape[1])))

    value = np.asarray(w.qvalue.astype(jnp.float32), np.float64)
    return (value - (0 if w.zero_point is None else spread(w.zero_point))) * spread(w.scale)


def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def rounded(x: Any) -> np.ndarray:
    unit = np.abs(np.asarray(x)).max(-1, keepdims=True) / np.float32(127)
    return np.round(np.asarray(x) / unit).astype(np.float64) * unit


def close(a: Any, b: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max())


@BOTH
@pytest.mark.parametrize("name", FORMATS)
def test_values_and_gradients(name: str, implementation: Any) -> None:
    """Serving gives other logits if a scale meets the wrong rows, or a tail of a block is lost."""
    w, x, g = weight(name), draw(2, 5, INNER), draw(2, 5, OUTER)
    call = functools.partial(quantized_matmul, implementation=implementation)
    out, dx = jax.jit(lambda x, w, g: [(p := jax.vjp(lambda x: call(x, w), x))[0], p[1](g)[0]])(x, w, g)
    close(out, np.asarray(x, np.float64) @ dense(w))
    close(dx, np.asarray(g, np.float64) @ dense(w).T)


@BOTH
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", [name for name in FORMATS if "int" in name])
def test_integer_activations(name: str, rows: int, implementation: Any) -> None:
    """Only the rounding of the activations changes the result; the gradient passes straight through it."""
    w, x, g = weight(name), draw(rows, INNER), draw(rows, OUTER)
    x = x.at[0].set(0) if rows > 1 else x
    call = functools.partial(quantized_matmul, activations="int8", implementation=implementation)
    out, dx = jax.jit(lambda x, w, g: [(p := jax.vjp(lambda x: call(x, w), x))[0], p[1](g)[0]])(x, w, g)
    with np.errstate(invalid="ignore"):
        close(out, np.nan_to_num(rounded(x)) @ dense(w))
    close(dx, np.asarray(g, np.float64) @ dense(w).T)


def test_dtypes() -> None:
    """16-bit activations keep their dtype with sums in float32; float64 is not computed in float32."""
    w = weight("int4 in groups")
    x = draw(3, INNER, dtype=jnp.bfloat16)
    out = quantized_matmul(x, w, implementation=SMALL)
    assert out.dtype == jnp.bfloat16
    close(out, np.asarray(x, np.float64) @ dense(w), 1e-2)
    for implementation in (SMALL, "reference"):
        out = quantized_matmul(x, w, activations="int8", implementation=implementation)
        assert out.dtype == jnp.bfloat16
        close(out, rounded(np.asarray(x, np.float32)) @ dense(w), 1e-2)
    with jax.enable_x64(True):
        x = draw(3, INNER, dtype=jnp.float64)
        for implementation in (SMALL, "reference"):
            close(quantized_matmul(x, w, implementation=implementation), np.asarray(x) @ dense(w), 1e-14)


def test_scales_can_be_trained() -> None:
    """Without rounded activations, gradients of scales are those of the dequantized product."""
    w, x = weight("int4 in groups"), draw(3, INNER)

    def loss(scale: jax.Array, implementation: Any) -> jax.Array:
        parts = QuantizedArray(w.qvalue, scale, None)
        return jnp.sum(jnp.sin(quantized_matmul(x, parts, implementation=implementation)))

    expected = jax.grad(loss)(w.scale, "reference")
    np.testing.assert_allclose(jax.grad(loss)(w.scale, SMALL), expected, atol=1e-3)


def test_sums_that_int32_cannot_hold() -> None:
    """The largest integers over very many inner rows would wrap to plausible numbers of the other sign."""
    inner = 2**18
    x, w = jnp.ones((1, inner)), QuantizedArray(jnp.full((inner, 1), -128, jnp.int8), jnp.ones((1, 1)))
    assert quantized_matmul(x, w, activations="int8").tolist() == [[-128.0 * inner]]
    with pytest.raises(ValueError, match=f"{inner} inner rows share a scale; int32 holds the sums of 132104"):
        quantized_matmul(x, w, activations="int8", implementation="blocked")
    halves = QuantizedArray(w.qvalue, jnp.ones((2, 1)))
    assert quantized_matmul(x, halves, activations="int8", implementation="blocked").tolist() == [[-128.0 * inner]]


def test_empty_axes() -> None:
    """No tokens or no inner rows is a clean result."""
    w = weight("int8 per column")
    assert quantized_matmul(jnp.ones((0, 3, INNER)), w).shape == (0, 3, OUTER)
    empty = QuantizedArray(jnp.ones((0, 2), jnp.int8), jnp.ones((1, 2)))
    np.testing.assert_array_equal(quantized_matmul(jnp.ones((3, 0)), empty), np.zeros((3, 2)))


@pytest.mark.parametrize("activations", [None, "int8"])
def test_composes_with_transforms_and_shardings(activations: Any) -> None:
    """vmap, checkpoint, the partitioner and shard_map give the gradients of a plain call."""
    w, x = weight("int4 in groups"), draw(8, INNER)

    def loss(x: jax.Array, w: QuantizedArray) -> jax.Array:
        return jnp.sum(jnp.sin(quantized_matmul(x, w, activations=activations, implementation=SMALL)))

    gradient = jax.jit(jax.grad(loss))
    plain = gradient(x, w)
    mapped = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(x.reshape(4, 2, INNER), w).reshape(8, INNER)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    placed = gradient(jax.device_put(x, NamedSharding(mesh, rows)), w)
    for other in (jax.jit(jax.grad(jax.checkpoint(loss)))(x, w), mapped, placed, jax.jit(sharded)(x, w)):
        np.testing.assert_allclose(other, plain, atol=1e-3)


def test_the_float_weight_never_exists() -> None:
    """A quantized model fits where its float weights would not: temporaries are a block, also in the backward pass."""
    x = jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    w = QuantizedArray(*(jax.ShapeDtypeStruct(*p) for p in (((4096, 4096), jnp.int4), ((64, 4096), jnp.float32))))

    def gradient(x: jax.Array, w: QuantizedArray) -> jax.Array:
        return jax.grad(lambda x: jnp.sum(quantized_matmul(x, w, implementation="blocked")))(x)

    for function in (quantized_matmul, gradient):
        temp = jax.jit(function).lower(x, w).compile().memory_analysis().temp_size_in_bytes
        assert temp < 4096 * 4096 * 4 / 2


W = QuantizedArray(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)))


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """What does not fit is refused with its shape or dtype."""
    with pytest.raises(ValueError, match=r"x \(2, 3\), w \(4, 2\); expected \[..., inner\]"):
        quantized_matmul(jnp.ones((2, 3)), W)
    with pytest.raises(ValueError, match="activations='int4'; expected None or 'int8'"):
        quantized_matmul(jnp.ones((2, 4)), W, activations="int4")
    w = QuantizedArray(W.qvalue.astype(jnp.float8_e5m2), W.scale)
    with pytest.raises(ValueError, match="float8_e5m2; expected integers of up to 8 bits"):
        quantized_matmul(jnp.ones((2, 4)), w, activations="int8")
    with pytest.raises(TypeError, match="x has dtype int32"):
        quantized_matmul(jnp.ones((2, 4), int), W)
    with pytest.raises(TypeError, match="expected a QuantizedArray, or use einsum"):
        quantized_matmul(jnp.ones((2, 4)), jnp.ones((4, 2)))
