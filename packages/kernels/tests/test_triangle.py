"""Triangle multiplication against loops in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jax.test_util import check_grads

from dovetail_kernels import TriangleWeights, triangle_multiplication

N, C, H, D = 5, 3, 4, 6


def make() -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    rng = np.random.default_rng(0)
    draw = rng.standard_normal
    weights = {
        "norm_in": (draw(C), draw(C)),
        "project_in": draw((C, 2, H)),
        "gate_in": draw((C, 2, H)),
        "norm_out": (draw(H), draw(H)),
        "project_out": draw((H, D)),
        "gate_out": draw((C, D)),
    }
    return draw((N, N, C)), weights, rng.random((N, N)) < 0.7


def norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * scale + bias


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def truth(pairs: np.ndarray, w: dict[str, Any], mask: np.ndarray, outgoing: bool) -> np.ndarray:
    out = np.zeros((N, N, D))
    z = np.array([[norm(pairs[i, j], *w["norm_in"]) for j in range(N)] for i in range(N)])
    for i, j in np.ndindex(N, N):
        total = np.zeros(H)
        for k in range(N):
            ends = ((i, k), (j, k)) if outgoing else ((k, i), (k, j))
            a, b = (
                mask[e] * sigmoid(z[e] @ w["gate_in"][:, side]) * (z[e] @ w["project_in"][:, side])
                for side, e in enumerate(ends)
            )
            total += a * b
        out[i, j] = norm(total, *w["norm_out"]) @ w["project_out"] * sigmoid(z[i, j] @ w["gate_out"])
    return out


@pytest.mark.parametrize("outgoing", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_is_the_loop(outgoing: bool, masked: bool) -> None:
    """Structure models read edges the wrong way round."""
    pairs, w, mask = make()
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w)
    got = jax.jit(lambda p, w, m: triangle_multiplication(p, TriangleWeights(**w), m, outgoing=outgoing))(
        jnp.asarray(pairs, jnp.float32), wide, jnp.asarray(mask) if masked else None
    )
    expected = truth(pairs, w, mask if masked else np.ones((N, N), bool), outgoing)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients() -> None:
    """Every parameter trains, also in float64 and twice differentiated; masked edges get nothing."""
    pairs, w, mask = make()
    with jax.enable_x64(True):
        weights = TriangleWeights(**jax.tree.map(jnp.asarray, w))
        x, kept = jnp.asarray(pairs), jnp.asarray(mask)

        def loss(x: Any, weights: Any) -> jax.Array:
            x, weights = jax.tree.map(jnp.asarray, (x, weights))  # check_grads steps in NumPy
            return jnp.sum(jnp.sin(triangle_multiplication(x, weights, kept)))

        check_grads(jax.jit(loss), (x, weights), order=2, modes=["rev"], atol=1e-4, rtol=1e-4)


def test_pairs_have_their_own_dtype() -> None:
    """16-bit activations with float32 parameters come out wider than they went in."""
    pairs, w, mask = make()
    weights = TriangleWeights(**jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w))
    got = triangle_multiplication(jnp.asarray(pairs, jnp.bfloat16), weights, jnp.asarray(mask))
    assert got.dtype == jnp.bfloat16
    expected = truth(pairs, w, mask, True)
    assert np.abs(np.asarray(got, np.float64) - expected).max() < 0.05 * np.abs(expected).max()


def test_composes() -> None:
    """Under vmap, checkpoint and shard_map a batch has the gradients of one after the other."""
    _, w, mask = make()
    weights = TriangleWeights(**jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w))
    batch = jnp.asarray(np.random.default_rng(1).standard_normal((8, N, N, C)), jnp.float32)

    def loss(weights: TriangleWeights, pairs: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(triangle_multiplication(pairs, weights, jnp.asarray(mask))))

    gradient = jax.jit(jax.grad(loss))
    expected = jax.tree.map(lambda *x: sum(x), *(gradient(weights, pairs) for pairs in batch))

    def each(weights: TriangleWeights, batch: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(jax.checkpoint(loss), (None, 0))(weights, batch))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(jax.grad(each), mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    for function in (jax.grad(each), mapped):
        found = jax.jit(function)(weights, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_empty() -> None:
    """No pairs is a clean result."""
    _, w, _ = make()
    weights = TriangleWeights(**jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w))
    assert triangle_multiplication(jnp.ones((0, 0, C)), weights).shape == (0, 0, D)


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """Shapes that would broadcast are refused."""
    pairs, w, _ = make()
    x = jnp.asarray(pairs, jnp.float32)
    weights = TriangleWeights(**jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), w))
    with pytest.raises(TypeError, match="pairs have dtype int32"):
        triangle_multiplication(x.astype(jnp.int32), weights)
    with pytest.raises(ValueError, match=r"\(5, 4, 3\); expected \[n, n, features\]"):
        triangle_multiplication(x[:, :4], weights)
    with pytest.raises(ValueError, match=r"norm_in has shape .*expected \(2,\)"):
        triangle_multiplication(x[..., :2], weights)
    with pytest.raises(TypeError, match="expected bool"):
        triangle_multiplication(x, weights, jnp.ones((5, 5)))
    with pytest.raises(ValueError, match=r"mask has shape \(5, 4\)"):
        triangle_multiplication(x, weights, jnp.ones((5, 4), bool))
