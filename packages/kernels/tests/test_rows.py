"""What all functions of a linear layer's rows promise about weights, forbidden tokens, narrow dtypes and wide ids."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import (
    CrossEntropyOptions,
    Teacher,
    TopLogprobs,
    configured,
    distillation_loss,
    linear_cross_entropy,
    token_logprobs,
)

BOTH = pytest.mark.parametrize("implementation", [configured("blocked", chunk=2), "reference"], ids=str)
RNG = np.random.default_rng(0)
H, W = (jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((7, 4), (4, 5)))
TARGETS = jnp.array([1, 2, 3, 4, 1, 2, 3])
FORBIDDEN = jnp.array([-jnp.inf, 0.0, 0.5, 0.0, 0.0])


def finite(tree: Any) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@BOTH
def test_a_forbidden_token(implementation: Any) -> None:
    """A bias of -inf gives the loss of a vocabulary without the token, with rows that do not count and chunks that
    do not fill: their targets have infinite losses."""
    own = functools.partial(linear_cross_entropy, implementation=implementation)
    weights = jnp.array([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    value = jax.jit(jax.value_and_grad(own, (0, 1)))
    for given in (None, weights):
        targets = TARGETS if given is None else TARGETS.at[2].set(0)
        got = value(H, W, targets, loss_weights=given, bias=FORBIDDEN)
        plain = value(H, W[:, 1:], TARGETS - 1, loss_weights=given, bias=FORBIDDEN[1:])
        np.testing.assert_allclose(got[0], plain[0], rtol=1e-6)
        np.testing.assert_allclose(got[1][0], plain[1][0], atol=1e-6)
        np.testing.assert_allclose(got[1][1][:, 1:], plain[1][1], atol=1e-6)


@pytest.mark.thin(2)
@BOTH
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_teachers_without_a_tail(beta: float, implementation: Any) -> None:
    """A teacher that names every token, or forbids one as the student does, has finite losses and gradients."""
    logprobs = jax.nn.log_softmax(H @ W)
    everything = TopLogprobs(logprobs, jnp.broadcast_to(jnp.arange(5), (7, 5)))
    weights = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    call = functools.partial(distillation_loss, beta=beta, loss_weights=weights, implementation=implementation)
    value = jax.jit(jax.value_and_grad(call, (0, 1)))
    got = value(H * 0.5, W, everything)
    full = value(H * 0.5, W, Teacher(H, W))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert finite(jax.grad(lambda w: call(H * 0.5, w, Teacher(H, W, FORBIDDEN), bias=FORBIDDEN))(W))


@BOTH
def test_weights_are_data(implementation: Any) -> None:
    """A weight that came from a model gets no gradient by one path and some by another."""
    for per_token in (False, True):
        how = {"options": CrossEntropyOptions(per_token=per_token), "implementation": implementation}
        gradient = jax.grad(lambda w, how=how: jnp.sum(linear_cross_entropy(H, W, TARGETS, loss_weights=w, **how)))
        assert not np.asarray(gradient(jnp.ones(7))).any()


def test_means_in_sixteen_bits() -> None:
    """The gradient of a mean over 300 tokens is not scaled by 1/300 rounded to 8 bits."""
    rng = np.random.default_rng(1)
    hidden, weight = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((300, 8), (8, 30)))
    targets = jnp.asarray(rng.integers(0, 30, 300), jnp.int32)
    mean = jax.grad(lambda w: linear_cross_entropy(hidden.astype(w.dtype), w, targets) / jnp.float32(300))
    wide = np.asarray(mean(weight), np.float64)
    narrow = np.asarray(mean(weight.astype(jnp.bfloat16)), np.float64)
    assert abs((wide * narrow).sum() / (wide * wide).sum() - 1) < 7e-4


def test_wide_ids() -> None:
    """An id beyond 32 bits is no token; it must not become the one that is left of it."""
    with jax.enable_x64(True):
        wide = TARGETS.astype(jnp.int64).at[2].set(2**32 + 1)
        losses = linear_cross_entropy(H, W, wide, options=CrossEntropyOptions(per_token=True))
        assert np.isnan(losses).tolist() == np.isnan(token_logprobs(H, W, wide)).tolist() == [i == 2 for i in range(7)]


def test_no_features() -> None:
    """A layer without inputs is its bias."""
    value = jax.grad(linear_cross_entropy, (0, 1))(H[:, :0], W[:0], TARGETS, bias=FORBIDDEN)
    assert [x.shape for x in value] == [(7, 0), (0, 5)]


@pytest.mark.usefixtures("untyped")
def test_numbers_that_are_traced() -> None:
    """A number that decides what is traced is asked for as one."""
    with pytest.raises(TypeError, match=r"softcap is traced; expected a Python number"):
        jax.jit(lambda teacher: distillation_loss(H, W, teacher))(Teacher(H, W, None, 5.0))
    with pytest.raises(TypeError, match="temperature is traced"):
        jax.jit(lambda t: token_logprobs(H, W, TARGETS, temperature=t))(2.0)
