"""The kit of the weights seam accepts a good seam and rejects each named broken one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import (
    QuantizedArray,
)
from dovetail_protocols.testing import (
    ConformanceError,
    FakeQuantized,
    check_quantized,
)


def dense(w):
    return w.dequantize() if isinstance(w, QuantizedArray) else w


def good_einsum(spec, x, w):
    return jnp.einsum(spec, x, dense(w))


def good_take(w, ids):
    return dense(w)[ids]


def without(field):
    def strip(w):
        return dense(dataclasses.replace(w, **{field: None})) if isinstance(w, QuantizedArray) else w

    return strip


def no_scale(w):
    return w.qvalue.astype(w.dtype) if isinstance(w, QuantizedArray) else w


def first_scale(w):
    if not isinstance(w, QuantizedArray):
        return w
    one = w.scale[(slice(0, 1),) * w.ndim]
    return dense(dataclasses.replace(w, scale=one))


def always_float32(w):
    return dense(dataclasses.replace(w, dtype=jnp.float32)) if isinstance(w, QuantizedArray) else w


def wrap_int8(w):
    """Keeps the integers in int8, where zero points overflow."""
    if not isinstance(w, QuantizedArray) or w.zero_point is None:
        return dense(w)
    return dense(dataclasses.replace(w, qvalue=w.qvalue.astype(jnp.int8), zero_point=w.zero_point.astype(jnp.int8)))


SEAMS = {
    "ignores the zero point": without("zero_point"),
    "ignores the scale": no_scale,
    "reads only the first scale": first_scale,
    "overflows in int8": wrap_int8,
}


def test_a_good_seam_passes():
    check_quantized(good_einsum, good_take)


@pytest.mark.parametrize("fault", SEAMS)
@pytest.mark.parametrize("part", ["einsum", "take"])
def test_broken_seams_are_rejected(fault, part):
    read = SEAMS[fault]
    einsum = (lambda spec, x, w: jnp.einsum(spec, x, read(w))) if part == "einsum" else good_einsum
    take = (lambda w, ids: read(w)[ids]) if part == "take" else good_take
    with pytest.raises(ConformanceError, match=f"Seam: .*{part}"):
        check_quantized(einsum, take)


def test_other_broken_seams_are_rejected():
    def wide(spec, x, w):
        return jnp.einsum(spec, x.astype(jnp.float32), always_float32(w).astype(jnp.float32))

    def blind(spec, x, w):
        return (
            jax.lax.stop_gradient(good_einsum(spec, x, w)) if isinstance(w, QuantizedArray) else good_einsum(spec, x, w)
        )

    for einsum, rule in ((wide, "logical dtype"), (blind, "gradient of x")):
        with pytest.raises(ConformanceError, match=rule):
            check_quantized(einsum, good_take)
    with pytest.raises(ConformanceError, match="take"):
        check_quantized(good_einsum, lambda w, ids: dense(w)[jnp.minimum(ids, 7)])


def test_fake_quantized_holds_the_same_numbers_twice():
    rng = np.random.default_rng(0)
    w, half = jnp.asarray(rng.standard_normal((8, 24)), jnp.float32), jnp.asarray(rng.standard_normal((8, 8)))
    tree = {"a": {"w": w, "half": half.astype(jnp.bfloat16)}, "bias": jnp.ones(3)}
    twins = FakeQuantized.of(tree)
    for name in ("w", "half"):
        quantized, plain = twins.quantized["a"][name], twins.dense["a"][name]
        assert isinstance(quantized, QuantizedArray)
        assert plain.dtype == tree["a"][name].dtype
        np.testing.assert_array_equal(quantized.dequantize(), plain)
        scale = np.asarray(quantized.scale)
        error = np.abs(np.asarray(plain, np.float32) - np.asarray(tree["a"][name], np.float32))
        assert (error <= scale * 0.51).all()
        assert (np.log2(scale) % 1 == 0).all()
    assert twins.quantized["bias"] is tree["bias"]
    chosen = FakeQuantized.of(tree, ["a/w"]).quantized
    assert isinstance(chosen["a"]["w"], QuantizedArray)
    assert not isinstance(chosen["a"]["half"], QuantizedArray)
    assert float(FakeQuantized.of(jnp.zeros((2, 2))).dense.max()) == 0
