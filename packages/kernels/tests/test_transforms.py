"""Small functions under jax's transformations; the large ones have tests of their own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dovetail_kernels import (
    einsum,
    gated_linear_unit,
    group_norm,
    layer_norm,
    rms_norm,
    rope,
    rope_table,
    take,
)

Function = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Of a parameter, of rows ``[batch, 3, 2, 4]``, and of numbers below 5 of ``[batch, 3]`` tokens."""
CASES: dict[str, tuple[tuple[int, ...], Function]] = {
    "rms_norm": ((4,), lambda w, x, n: rms_norm(x, w)),
    "layer_norm": ((4,), lambda w, x, n: layer_norm(x, w, w, residual=x)[0]),
    "group_norm": ((4,), lambda w, x, n: group_norm(x, 2, w)),
    "rope": ((4,), lambda w, x, n: rope(x * w, rope_table(n, [1.0, 0.1]))),
    "einsum": ((4, 5), lambda w, x, n: einsum("bthd,df->bthf", x, w)),
    "take": ((5, 4), lambda w, x, n: x[:, :, 0] * take(w, n)),
    "take 16": ((5, 4), lambda w, x, n: x[:, :, 0] * take(w.astype(jnp.bfloat16), n).astype(jnp.float32)),
    "gated_linear_unit": ((4, 2, 5), lambda w, x, n: gated_linear_unit(x, w)),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_under_transformations(name: str) -> None:
    """A model under vmap, checkpoint or shard_map, with its checks on, has the gradients of the plain one."""
    shape, function = CASES[name]
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, (8, 3, 2, 4)))
    n = jnp.asarray(rng.integers(0, 5, (8, 3)), jnp.int32)

    def loss(w: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(function(w, x, n)))

    gradient = jax.grad(loss, argnums=(0, 1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    @jax.jit
    def all_ways(w: jax.Array, x: jax.Array, n: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        d_w, d_x = jax.vmap(gradient, (None, 0, 0))(w, x.reshape(4, 2, 3, 2, 4), n.reshape(4, 2, 3))
        sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, rows, rows), out_specs=(whole, rows))
        remat = jax.grad(jax.checkpoint(loss), argnums=(0, 1))
        return [gradient(w, x, n), remat(w, x, n), (d_w.sum(0), d_x.reshape(x.shape)), sharded(w, x, n)]

    plain, *others = all_ways(w, x, n)
    for other in others:
        for a, b in zip(other, plain, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-2 if name == "take 16" else 1e-5)
