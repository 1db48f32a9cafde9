"""Copies are right in every order of axes, jax takes them over, and they come at the rate that they are made for."""

import time

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail_weights import copying

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_, np.complex64, ml_dtypes.float8_e4m3fn)


@st.composite
def views(draw):
    """An array with permuted, reversed, cut and single axes."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    array = (np.arange(np.prod(shape, dtype=int)) % 7).reshape(shape).astype(dtype)
    axes = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, -1, 2]), min_size=len(shape), max_size=len(shape)))
    return array.transpose(axes)[tuple(slice(None, None, step) for step in steps)]


@pytest.fixture
def small(monkeypatch):
    """Arrays of a few numbers go the ways of those of a few million."""
    for name, value in (("LARGE", 8), ("ROWS", 2), ("COLUMNS", 3)):
        monkeypatch.setattr(copying, name, value)


@given(views())
def test_any_view(value):
    """A merged axis takes a number for its neighbour."""
    np.testing.assert_array_equal(copying.copied(value), value, strict=True)


@pytest.mark.usefixtures("small")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(views())
def test_any_view_in_tiles(value):
    """A tile at an edge, a piece of a thread or an axis above the second is left out."""
    np.testing.assert_array_equal(copying.copied(value), value, strict=True)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("target", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_casts(source, target):
    """A cast on the way rounds in another way than NumPy's, or loses NaN, infinities, -0 or subnormal numbers."""
    values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 1.0 + 2**-8, 1.0 + 3 * 2**-9, -7.0, 2.0**-24, 448.0]
    value = np.asarray(values).astype(source).reshape(4, 3).T
    got, expected = copying.copied(value, target), value.astype(target)
    assert got.dtype == expected.dtype
    got, expected = got.astype(np.float64), expected.astype(np.float64)  # NumPy knows the NaN of these alone
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


def test_large_arrays():
    """What several threads copy has seams."""
    value = np.random.default_rng(0).standard_normal((3, 1500, 700), np.float32)
    for axes in ((0, 2, 1), (2, 1, 0), (2, 0, 1), (0, 1, 2)):
        np.testing.assert_array_equal(copying.copied(value.transpose(axes)), value.transpose(axes))
    parts = value.reshape(3, 15, 100, 700).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(copying.copied(parts), parts)


@pytest.mark.parametrize("count", [3, 1 << 21])
def test_jax_takes_it_over(count):
    """Memory is needed twice while it is copied once more."""
    value = copying.copied(np.arange(2 * count, dtype=np.float32).reshape(2, count).T)
    assert jax.device_put(value, jax.devices("cpu")[0]).unsafe_buffer_pointer() == value.ctypes.data


def test_speed_of_a_transpose():
    """NumPy's own takes 4 to 8 times as long, by the machine; twice is asked for."""
    value = np.ones((8192, 2048), np.float32).T
    to = np.zeros(value.shape, np.float32)

    def seconds(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    ours, plain = (
        min(seconds(f) for _ in range(5)) for f in (lambda: copying.assign(to, value), lambda: np.copyto(to, value))
    )
    assert ours < plain / 2
