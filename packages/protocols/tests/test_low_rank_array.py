"""LowRankArray means what its formula says, for every number of leading, summed and resulting axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import LowRankArray, QuantizedArray, as_array

SHAPES = {
    "matrix": ((), (4,), (6,)),
    "heads": ((), (4,), (3, 2)),
    "out": ((), (3, 2), (5,)),
    "both": ((2, 3), (4,), (2, 2)),
}


def arrays(leading, inputs, outputs, rank=2):
    rng = np.random.default_rng(0)
    shapes = (*leading, *inputs, *outputs), (*leading, *inputs, rank), (*leading, rank, *outputs), (*leading, *outputs)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def values(base, a, b, magnitude, leading, inputs, scale):
    """The formula, output by output, in float64."""
    total = np.zeros(base.shape)
    for at in np.ndindex(*base.shape):
        first, end = len(leading), len(leading) + len(inputs)
        group, row, column = at[:first], at[first:end], at[end:]
        product = sum(float(a[(*group, *row, r)]) * float(b[(*group, r, *column)]) for r in range(a.shape[-1]))
        total[at] = float(base[at]) + scale * product
    if magnitude is None:
        return total
    axes = tuple(range(len(leading), len(leading) + len(inputs)))
    return total / np.sqrt((total**2).sum(axes, keepdims=True)) * np.expand_dims(magnitude.astype(np.float64), axes)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dora", [False, True])
def test_dense_is_the_formula(name, dora):
    leading, inputs, outputs = SHAPES[name]
    base, a, b, magnitude = arrays(leading, inputs, outputs)
    lengths = magnitude if dora else None
    w = LowRankArray.checked(*(None if x is None else jnp.asarray(x) for x in (base, a, b, lengths)), scale=1.5)
    np.testing.assert_allclose(w.dense(), values(base, a, b, lengths, leading, inputs, 1.5), atol=1e-5)
    assert (w.shape, w.ndim, w.size, w.rank) == (base.shape, base.ndim, base.size, 2)
    assert (w.leading, w.inputs) == (len(leading), len(inputs))
    np.testing.assert_array_equal(as_array(w), w.dense())


def test_the_base_may_be_quantized():
    base, a, b, _ = arrays((), (4,), (6,))
    scale, dtype = jnp.full((1, 6), 0.1, jnp.float32), jnp.dtype("bfloat16")
    quantized = QuantizedArray(jnp.asarray(base * 10, jnp.int8), scale, dtype=dtype)
    w = LowRankArray(quantized, jnp.asarray(a), jnp.asarray(b))
    assert w.dense().dtype == w.dtype == jnp.bfloat16
    expected = np.asarray(quantized.dequantize(), np.float64) + a.astype(np.float64) @ b
    np.testing.assert_allclose(np.asarray(w.dense(), np.float64), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dora", [False, True])
def test_transpose(dora):
    base, a, b, magnitude = map(jnp.asarray, arrays((), (4,), (6,)))
    w = LowRankArray(base, a, b, magnitude if dora else None, 0.5)
    np.testing.assert_allclose(as_array(w.T), w.dense().T, atol=1e-6)
    assert isinstance(w.T, jax.Array if dora else LowRankArray)
    with pytest.raises(ValueError, match="1 leading axes has no transpose"):
        _ = LowRankArray(*map(jnp.asarray, arrays((2,), (4,), (6,))[:3])).T
    quantized = QuantizedArray(jnp.ones((4, 6), jnp.int8), jnp.ones((2, 6)), jnp.ones((4, 1), jnp.int8))
    np.testing.assert_array_equal(quantized.T.dequantize(), quantized.dequantize().T)


def test_an_output_of_norm_nothing_has_no_nan():
    w = LowRankArray(jnp.zeros((3, 2)), jnp.ones((3, 1)), jnp.zeros((1, 2)), jnp.zeros(2))
    assert not np.isnan(w.dense()).any()


def test_layers_are_parts_of_all_arrays():
    """A loop over stacked layers takes each array apart along its first axis."""
    w = LowRankArray(*map(jnp.asarray, arrays((3,), (4,), (6,))), 2.0)
    one = jax.tree.map(lambda x: x[1], w)
    np.testing.assert_allclose(one.dense(), w.dense()[1], atol=1e-6)
    assert one.leading == 0


GOOD = {"base": (4, 6), "a": (4, 2), "b": (2, 6), "magnitude": None, "scale": 1.0}


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"a": (5, 2)}, "do not make"),
        ({"b": (3, 6)}, "do not make"),
        ({"base": (6,)}, "do not make"),
        ({"base": ()}, "do not make"),
        ({"a": (4, 0), "b": (0, 6)}, "has rank 0; expected at least 1"),
        ({"magnitude": (4,)}, r"magnitude has shape \(4,\); expected \(6,\)"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_checked_refuses_what_does_not_fit(changed, match):
    given = GOOD | changed
    parts = {name: jnp.ones(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()}
    with pytest.raises(ValueError, match=match):
        LowRankArray.checked(**parts)
