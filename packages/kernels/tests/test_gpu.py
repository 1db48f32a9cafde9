"""What only a GPU can show; run by ``nox -s gpu``."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Mask, attention, causal, explain, lengths, segments, window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") == "cpu", reason="needs a GPU: nox -s gpu"),
]

LENGTHS = jnp.array([256, 0, 77, 3], jnp.int32)
MASKS: dict[str, Mask | None] = {
    "everything": None,
    "causal": causal(),
    "window": causal() & window(100),
    "lengths": lengths(LENGTHS, LENGTHS) & causal(),
}


def operands(dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = ((4, 256, 8, 64), (4, 256, 2, 64), (4, 256, 2, 64), (4, 256, 8, 64))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def pulled(mask: Mask | None, implementation: Any, given: list[jax.Array]) -> list[jax.Array]:
    """Output and gradients."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, mask, implementation=implementation)

    out, pull = jax.vjp(call, *given[:3])
    return [out, *pull(given[3])]


@pytest.mark.parametrize("implementation", [None, "blocked"])
@pytest.mark.parametrize("name", MASKS)
def test_attention_is_the_reference(name: str, implementation: Any) -> None:
    """cuDNN and our blocks agree with the textbook form in float32, rows that see nothing included."""
    given = operands()
    got = jax.jit(lambda *x: pulled(MASKS[name], implementation, list(x)))(*given)
    wide = [x.astype(jnp.float32) for x in given]
    expected = jax.jit(lambda *x: pulled(MASKS[name], "reference", list(x)))(*wide)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert error < 2e-2 * max(1.0, np.abs(np.asarray(b)).max())


def test_cudnn_is_chosen_for_structured_masks() -> None:
    """16-bit attention with a mask that cuDNN knows runs there; everything else says why not."""
    q = operands()[0]
    for mask, chosen in ((causal(), "cudnn"), (segments(jnp.ones((4, 256), jnp.int32)), "blocked")):
        (decision,) = explain(lambda q, mask=mask: attention(q, q, q, mask), q)
        assert decision.implementation.name == chosen
    (decision,) = explain(lambda q: attention(q, q, q), q.astype(jnp.float32))
    assert decision.implementation.name == "blocked"


def test_cudnn_under_vmap() -> None:
    """A model that is mapped over any axis, such as an ensemble's, runs there as well."""
    q, kv = (jnp.stack([x, 2 * x]) for x in operands()[:2])
    for axis in (0, 1, 4):

        def loss(q: jax.Array, kv: jax.Array, implementation: str) -> jax.Array:
            return jnp.sum(attention(q, kv, kv, causal(), implementation=implementation).astype(jnp.float32) ** 2)

        given = [jnp.moveaxis(x, 0, axis) for x in (q, kv)]
        got, expected = (
            jax.jit(jax.vmap(jax.grad(lambda *x, name=name: loss(*x, name), argnums=(0, 1)), axis, axis))(*given)
            for name in ("cudnn", "blocked")
        )
        for a, b in zip(got, expected, strict=True):
            error = np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()
            assert error < 4e-2 * np.abs(np.asarray(b, np.float32)).max()
