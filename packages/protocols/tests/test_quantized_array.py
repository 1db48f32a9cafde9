"""QuantizedArray means what its formula says, for every way to group a scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_protocols import QuantizedArray


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_dequantize_is_the_formula(data):
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 2, 4, 6]), min_size=1, max_size=3)))
    groups, zeros = (tuple(data.draw(st.sampled_from(divisors(n))) for n in shape) for _ in range(2))
    rng = np.random.default_rng(0)
    q = rng.integers(-128, 128, shape).astype(np.int8)
    scale = rng.random(groups).astype(np.float32)
    zero = rng.integers(-8, 8, zeros).astype(np.int8) if data.draw(st.booleans()) else None
    array = QuantizedArray.checked(*(None if x is None else jnp.asarray(x) for x in (q, scale, zero)))
    expected = np.zeros(shape)
    for index in np.ndindex(*shape):
        at = tuple(i // (n // g) for i, n, g in zip(index, shape, groups, strict=True))
        zero_at = tuple(i // (n // g) for i, n, g in zip(index, shape, zeros, strict=True))
        expected[index] = float(scale[at]) * (float(q[index]) - (0 if zero is None else float(zero[zero_at])))
    np.testing.assert_allclose(array.dequantize(), expected, rtol=1e-6)
    assert (array.shape, array.ndim, array.size) == (shape, len(shape), int(np.prod(shape)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("qtype", ["int8", "int4", "float8_e4m3fn"])
def test_logical_dtype(dtype, qtype):
    array = QuantizedArray.checked(jnp.ones((2, 3), qtype), jnp.full((1, 3), 0.5), dtype=dtype)
    assert array.dequantize().dtype == array.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(array.dequantize(), np.float32), 0.5)


def test_it_is_a_pytree_that_jit_and_vmap_take():
    array = QuantizedArray(jnp.ones((4, 3), jnp.int8), jnp.ones((4, 1)), None, jnp.dtype(jnp.bfloat16))
    leaves, structure = jax.tree.flatten(array)
    assert len(leaves) == 2
    assert jax.tree.unflatten(structure, leaves).dtype == jnp.bfloat16
    np.testing.assert_array_equal(jax.jit(lambda x: x.dequantize())(array), array.dequantize())
    np.testing.assert_array_equal(jax.vmap(lambda x: x.dequantize())(array), array.dequantize())


@pytest.mark.parametrize("shape", [(3,), (4, 2), (0, 3), (3, 3), (4, 3, 1)])
@pytest.mark.parametrize("name", ["scale", "zero_point"])
def test_checked_refuses_groups_that_do_not_divide(shape, name):
    parts = {"scale": jnp.ones((1, 1)), name: jnp.ones(shape)}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        QuantizedArray.checked(jnp.ones((4, 3), jnp.int8), **parts)
