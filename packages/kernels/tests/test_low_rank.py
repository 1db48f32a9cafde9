"""Adapted weights in every function that takes one; if these fail, an adapter computes something else when merged."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import (
    DenseMixer,
    einsum,
    gated_linear_unit,
    linear_cross_entropy,
    ragged_dot,
    take,
    token_logprobs,
)
from dovetail_protocols import LowRankArray, QuantizedArray
from dovetail_protocols.testing import check_low_rank

INNER, OUTER, RANK = 24, 40, 2


def adapted(*shape: int, leading: int = 0, quantized: bool = False, magnitude: bool = False, dtype: Any = None) -> Any:
    """Return a weight ``[*leading, inputs, *outputs]``."""
    rng = np.random.default_rng(0)
    draw = lambda *sizes: jnp.asarray(rng.standard_normal(sizes), dtype or jnp.float32)  # noqa: E731
    base: Any = draw(*shape)
    if quantized:
        base = QuantizedArray((base * 40).astype(jnp.int8), jnp.full((1,) * len(shape), 1 / 40, jnp.float32))
    head, into, out = shape[:leading], shape[leading], shape[leading + 1 :]
    lengths = 1 + draw(*head, *out) ** 2 if magnitude else None
    return LowRankArray.checked(base, draw(*head, into, RANK), draw(*head, RANK, *out), lengths, scale=0.5)


def test_conformance() -> None:
    """Einsums in all orders and lookups, with gradients, plain and quantized bases, LoRA and DoRA."""
    check_low_rank(einsum, take)


@pytest.mark.parametrize("spec", ["...d,df->...f", "td,dd->t", "td,dhk->th"])
def test_other_einsums_are_those_of_the_sum(spec: str) -> None:
    """An ellipsis, a letter that repeats, a magnitude of outputs of which some are summed over."""
    w = adapted(*{"td,dd->t": (8, 8), "td,dhk->th": (8, 3, 2)}.get(spec, (8, 6)), magnitude=spec == "td,dhk->th")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32)
    np.testing.assert_allclose(einsum(spec, x, w), jnp.einsum(spec, x, w.dense()), atol=1e-4)


def test_result_dtypes() -> None:
    """The result has the activations' dtype, whatever that of base and adapter; or the one that is asked for."""
    w = adapted(8, 6)
    x = jnp.ones((3, 8), jnp.bfloat16)
    assert einsum("td,df->tf", x, w).dtype == jnp.bfloat16
    assert einsum("td,df->tf", x, w, dtype=jnp.dtype("float32")).dtype == jnp.float32
    table = LowRankArray(w.base.astype(jnp.bfloat16), w.a, w.b)
    assert take(table, jnp.array([1, 2])).dtype == jnp.bfloat16


def test_lookups_outside_of_the_table() -> None:
    """They are NaN, as in a plain table."""
    got = take(adapted(5, 3), jnp.array([0, 5, -1]))
    assert np.isnan(got[1:]).all()
    assert np.isfinite(got[0]).all()
    assert take(adapted(3, 5, 4, leading=1), jnp.array([2])).shape == (1, 5, 4)


@pytest.mark.thin(2)
@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_ragged_dot(implementation: str, quantized: bool, magnitude: bool) -> None:
    """Experts with adapters of their own, rows of no group included; values and gradients are those of the sum."""
    w = adapted(3, INNER, 6, leading=1, quantized=quantized, magnitude=magnitude)
    rows = jnp.asarray(np.random.default_rng(1).standard_normal((20, INNER)), jnp.float32)
    sizes = jnp.array([7, 0, 9])

    def run(rows: jax.Array, a: jax.Array, b: jax.Array, *, whole: bool) -> jax.Array:
        rhs = LowRankArray(w.base, a, b, w.magnitude, w.scale)
        return ragged_dot(rows, rhs.dense() if whole else rhs, sizes, implementation=implementation)

    def total(*args: jax.Array, whole: bool) -> jax.Array:
        return jnp.sum(jnp.sin(run(*args, whole=whole)))

    args = rows, w.a, w.b
    np.testing.assert_allclose(run(*args, whole=False), run(*args, whole=True), atol=2e-4)
    ours, theirs = (jax.grad(total, (0, 1, 2))(*args, whole=whole) for whole in (False, True))
    for got, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


def test_ragged_dot_of_one_adapter_for_all() -> None:
    """A rank that groups share is no leading axis, and the weight is added up."""
    w = LowRankArray.checked(jnp.ones((3, 4, 6)), jnp.ones((3, 2)), jnp.ones((2, 4, 6)))
    rows, sizes = jnp.ones((5, 4)), jnp.array([1, 2, 2])
    np.testing.assert_allclose(ragged_dot(rows, w, sizes), ragged_dot(rows, w.dense(), sizes), rtol=1e-6)


@pytest.mark.parametrize("together", [False, True])
def test_gated_linear_unit(together: bool) -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 8)), jnp.float32)
    weights = [adapted(8, 2, 6)] if together else [adapted(8, 6), adapted(8, 6, magnitude=True)]
    np.testing.assert_allclose(
        gated_linear_unit(x, *weights), gated_linear_unit(x, *(w.dense() for w in weights)), atol=1e-3, rtol=1e-4
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_losses(quantized: bool) -> None:
    """Cross-entropy and log-probabilities of an adapted unembedding, with gradients of the adapter."""
    w = adapted(8, OUTER, quantized=quantized)
    hidden = jnp.asarray(np.random.default_rng(1).standard_normal((6, 8)), jnp.float32)
    targets = jnp.arange(6)

    def loss(a: jax.Array, b: jax.Array, *, whole: bool) -> jax.Array:
        head = LowRankArray(w.base, a, b, None, w.scale)
        return linear_cross_entropy(hidden, head.dense() if whole else head, targets)

    ours, theirs = (jax.value_and_grad(loss, (0, 1))(w.a, w.b, whole=whole) for whole in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)
    got, wanted = token_logprobs(hidden, w, targets), token_logprobs(hidden, w.dense(), targets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, wanted)


def test_latent_attention() -> None:
    """Keys and values are expanded by adapted weights."""
    rng = np.random.default_rng(1)
    query, latent, rope_key = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((6, 2, 5), (6, 8), (6, 2)))
    expand = adapted(8, 2, 3), adapted(8, 2, 4, magnitude=True)
    mixer = DenseMixer.of(jnp.ones((1, 6), jnp.int32))
    got, wanted = (
        mixer.attend_latent(0, query, latent, rope_key, weights, scale=0.5)[0]
        for weights in (expand, tuple(w.dense() for w in expand))
    )
    np.testing.assert_allclose(got, wanted, atol=1e-4)


X, ROWS, SIZES = jnp.ones((5, INNER)), jnp.ones((9, INNER)), jnp.array([4, 5])
GRADIENTS: dict[str, tuple[Any, Callable[[Any, Any], jax.Array]]] = {
    "einsum": (adapted(INNER, OUTER), lambda x, w: einsum("td,df->tf", x, w)),
    "take": (adapted(OUTER, INNER), lambda x, w: x[:2] * take(w, jnp.array([1, 2]))),
    "ragged_dot": (adapted(2, INNER, OUTER, leading=1), lambda x, w: ragged_dot(x, w, SIZES)),
    "gated_linear_unit": (adapted(INNER, OUTER), lambda x, w: gated_linear_unit(x, w, w)),
}
MOVES = r"parameter|copy|bitcast|transpose|get-tuple-element|dynamic-slice|slice|reshape|tuple|while|call"


@pytest.mark.parametrize("name", GRADIENTS)
def test_no_gradient_of_the_base_is_made(name: str) -> None:
    """The compiled gradients of activations and thin arrays compute nothing of the base's size: it is read, no more."""
    w, run = GRADIENTS[name]
    sizes = ",".join(map(str, w.shape[-2:])), ",".join(map(str, w.shape[:-3:-1]))
    made = re.compile(rf"= f32\[(?:\d+,)?(?:{sizes[0]}|{sizes[1]})\]\S* (?!(?:{MOVES})\()(\S+)\(")

    def loss(x: jax.Array, a: jax.Array, b: jax.Array, base: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(run(x, LowRankArray(base, a, b, None, w.scale))))

    def found(argnums: Any) -> list[str]:
        x = ROWS if name == "ragged_dot" else X
        program = jax.jit(jax.grad(loss, argnums)).lower(x, w.a, w.b, w.base).compile()
        return made.findall(program.as_text())

    assert found((0, 1, 2)) == []
    assert found((0, 1, 2, 3))  # or this test sees nothing
