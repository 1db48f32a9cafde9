"""The kit of adapted weights accepts a good seam and rejects each named broken one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dovetail_protocols import LowRankArray, as_array
from dovetail_protocols.testing import ConformanceError, check_low_rank


def einsum_of(change):
    return lambda spec, x, w: jnp.einsum(spec, x, change(w), precision="highest")


def take_of(change):
    return lambda w, ids: change(w)[ids]


def replaced(**fields):
    def change(w):
        return as_array(dataclasses.replace(w, **{name: make(w) for name, make in fields.items()}))

    return change


def norm_with_gradient(w):
    if w.magnitude is None:
        return as_array(w)
    total = as_array(dataclasses.replace(w, magnitude=None))
    axes = tuple(range(w.leading, w.leading + w.inputs))
    norm = jnp.sqrt(jnp.sum(total**2, axis=axes, keepdims=True))
    return total / norm * jnp.expand_dims(w.magnitude, axes)


def norm_of_less(w):
    total = as_array(dataclasses.replace(w, magnitude=None))
    return total if w.magnitude is None else total * 0.9


def frozen(w):
    a, b = jax.lax.stop_gradient((w.a, w.b))
    return as_array(LowRankArray(w.base, a, b, w.magnitude, w.scale))


BROKEN = {
    "ignores the adapter": lambda w: as_array(w.base),
    "ignores the scale": replaced(scale=lambda w: 1.0),
    "ignores the magnitude": replaced(magnitude=lambda w: None),
    "takes another norm": norm_of_less,
    "gives the norm a gradient": norm_with_gradient,
    "gives the adapter no gradient": frozen,
}


def test_a_good_seam():
    check_low_rank(einsum_of(as_array), take_of(as_array))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_einsums(name):
    with pytest.raises(ConformanceError, match="Seam"):
        check_low_rank(einsum_of(BROKEN[name]), take_of(as_array))


@pytest.mark.parametrize("name", ["ignores the adapter", "ignores the scale", "ignores the magnitude"])
def test_broken_lookups(name):
    with pytest.raises(ConformanceError, match="take"):
        check_low_rank(einsum_of(as_array), take_of(BROKEN[name]))
