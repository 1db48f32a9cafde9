"""The weights seam: plain and quantized operands, lookups out of range, wrong specifications."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import einsum, take
from dovetail_protocols import QuantizedArray
from dovetail_protocols.testing import check_quantized


def test_conformance() -> None:
    """Quantized weights of any layout give what their dequantized values give."""
    check_quantized(einsum, take)


@pytest.mark.parametrize(
    ("spec", "x", "w"),
    [("td,df->tf", (3, 4), (4, 5)), ("td,dhk->thk", (3, 4), (4, 2, 3)), ("thk,hkd->td", (3, 2, 5), (2, 5, 4))],
)
def test_einsum_is_numpys(spec: str, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    """Values against float64, and the activations' dtype whatever the parameters' is."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(x), rng.standard_normal(w)
    expected = np.einsum(spec, a, b)
    np.testing.assert_allclose(
        einsum(spec, jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), expected, atol=1e-5
    )
    for dtypes in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)):
        got = einsum(spec, jnp.asarray(a, dtypes[0]), jnp.asarray(b, dtypes[1]))
        assert got.dtype == dtypes[0]
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=0.15)


def test_gradient_dtypes() -> None:
    """Float32 parameters under bfloat16 activations get float32 gradients."""
    gradient = jax.grad(lambda w: jnp.sum(einsum("td,df->tf", jnp.ones((2, 3), jnp.bfloat16), w)).astype(jnp.float32))
    assert gradient(jnp.ones((3, 4))).dtype == jnp.float32


@pytest.mark.parametrize("quantized", [False, True])
def test_take(quantized: bool) -> None:
    """Ids of any shape; an id outside the table gives NaN rather than another token's vector, negative ones too."""
    rng = np.random.default_rng(0)
    values = rng.integers(-9, 10, (6, 2, 3)).astype(np.float32)
    table: Any = jnp.asarray(values)
    if quantized:
        table = QuantizedArray.checked(table.astype(jnp.int8), jnp.ones((3, 1, 1)), None, jnp.float32)
    ids = np.array([[0, 5, 3], [6, -1, 2**31 - 1]], np.int32)
    got = jax.jit(take)(table, jnp.asarray(ids))
    assert got.shape == (2, 3, 2, 3)
    np.testing.assert_array_equal(got[0], values[ids[0]])
    assert np.isnan(got[1]).all()


def test_take_from_nothing() -> None:
    """A table without rows has no row for any id."""
    got, pull = jax.vjp(lambda w: take(w, jnp.array([0, -1], jnp.int32)), jnp.ones((0, 3)))
    assert np.isnan(got).all()
    assert got.shape == (2, 3)
    assert pull(got)[0].shape == (0, 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_take_wide_ids(dtype: Any) -> None:
    """An id beyond 32 bits is outside of the table, not the row of its lower half."""
    with jax.enable_x64(True):
        got = take(jnp.ones((3, 2), dtype), jnp.array([1, 2**32 + 1, -(2**32) + 1]))
    np.testing.assert_array_equal(np.isnan(got), [[False] * 2, [True] * 2, [True] * 2])


def test_take_gradient_is_a_scatter() -> None:
    """Repeated ids add up; ids outside the table add nothing anywhere."""
    ids = jnp.array([1, 1, 2, 7], jnp.int32)
    gradient = jax.grad(lambda w: jnp.sum(take(w, ids)[:3]))(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, [[0, 0], [2, 2], [1, 1], [0, 0]])


def test_take_gradient_of_short_tables() -> None:
    """A token that comes a thousand times has a gradient of 1,000, not the 256 at which sums of 16 bits stop."""
    ids = jnp.asarray([0] * 1000 + [2, 9, -1], jnp.int32)
    run = jax.jit(jax.grad(lambda w: jnp.sum(jnp.where(jnp.arange(1003)[:, None] < 1001, take(w, ids), 0))))
    gradient = run(jnp.ones((3, 2), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[1000, 1000], [0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("spec", "x", "w", "message"),
    [
        ("td,df", (2, 3), (3, 4), "'td,df'; expected two operands and an explicit result"),
        ("td->td", (2, 3), (3, 4), "expected two operands"),
        ("td,df,fg->tg", (2, 3), (3, 4), "expected two operands"),
        ("td,df->tf", (2, 3, 1), (3, 4), r"x has shape \(2, 3, 1\); 'td'.*rank 2"),
        ("td,df->tf", (2, 3), (3,), r"w has shape \(3,\); 'df'"),
        ("td,df->tf", (2, 3), (4, 4), r"'d'.*\(2, 3\).*\(4, 4\)"),
        ("td,df->tg", (2, 3), (3, 4), "g"),
    ],
)
def test_bad_specifications(spec: str, x: tuple[int, ...], w: tuple[int, ...], message: str) -> None:
    """A specification that does not fit names what does not."""
    with pytest.raises(ValueError, match=message):
        einsum(spec, jnp.ones(x), jnp.ones(w))


@pytest.mark.usefixtures("untyped")
def test_bad_operands() -> None:
    """Float ids and integer activations are refused."""
    with pytest.raises(TypeError, match="float32; expected integers"):
        take(jnp.ones((3, 2)), jnp.ones(2))
    with pytest.raises(TypeError, match="x has dtype int32"):
        einsum("td,df->tf", jnp.ones((2, 3), jnp.int32), jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"\(\)"):
        take(jnp.float32(1), jnp.ones(2, jnp.int32))


def test_quantized_products_are_made_in_blocks() -> None:
    """A served model needs no float copy of its weights, and its logits stay those of the dequantized weights."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.integers(-7, 8, (4096, 1024)), jnp.int8)
    w = QuantizedArray(values, jnp.asarray(rng.uniform(1, 2, (8, 1024)), jnp.float32))
    x = jnp.asarray(rng.standard_normal((2, 3, 4096)), jnp.float32)
    compiled = jax.jit(lambda x, w: einsum("btd,df->btf", x, w)).lower(x, w).compile()
    expected = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(compiled(x, w), expected, atol=1e-6 * np.abs(expected).max())
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 1024 * 4 * 0.75
