"""Dropout of attention: what is dropped, by every implementation and on every device."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dovetail_kernels import Dropout, attention, causal, configured


def test_dropout() -> None:
    """Weights vanish at the asked rate, the mean stays, and every implementation drops the same ones."""
    shape = (2, 96, 4, 1)
    q, v = jnp.zeros(shape), jnp.ones((2, 96, 2, 1))
    dropout = Dropout(jax.random.key(0), 0.25)

    def call(implementation: Any, q: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, v, v, causal(), dropout=dropout, implementation=implementation)

    @functools.partial(jax.jit, static_argnums=0)
    def pulled(implementation: Any) -> list[jax.Array]:
        out, pull = jax.vjp(functools.partial(call, implementation), q, v)
        return [out, *pull(jnp.ones_like(out) * 0.3)]

    expected = pulled("reference")
    for a, b in zip(pulled(configured("blocked", rows=16, chunk=24)), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    kept = np.asarray(expected[0])[:, 0, :, 0]  # the first row sees one key: 0 or 4 / 3
    assert set(np.unique(kept.round(4))) <= {0.0, np.float32(1.3333)}
    assert abs(float(expected[0].mean()) - 1) < 0.02
    other = attention(q, v, v, causal(), dropout=Dropout(jax.random.key(1), 0.25))
    assert (np.asarray(other) != np.asarray(expected[0])).mean() > 0.5
    plain = attention(q, v, v, causal())
    np.testing.assert_array_equal(attention(q, v, v, causal(), dropout=Dropout(jax.random.key(1), 0.0)), plain)


def test_dropout_in_shard_map() -> None:
    """With the index of the shard in its key every shard drops others; with one key all drop the same."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, rows = jnp.ones((8, 16, 1, 1)), PartitionSpec("data")

    def local(x: jax.Array, fold: bool) -> jax.Array:
        key = jax.random.key(0)
        key = jax.random.fold_in(key, jax.lax.axis_index("data")) if fold else key
        return attention(x, x, x, dropout=Dropout(key, 0.5))

    for fold in (False, True):
        mapped = jax.shard_map(functools.partial(local, fold=fold), mesh=mesh, in_specs=rows, out_specs=rows)
        patterns = np.asarray(jax.jit(mapped)(x)).reshape(8, -1)
        assert len(np.unique(patterns, axis=0)) == (8 if fold else 1)


def test_a_rate_out_of_range() -> None:
    """Dropping everything would divide by zero."""
    with pytest.raises(ValueError, match=r"rate=1.0; expected at least 0 and less than 1"):
        Dropout(jax.random.key(0), 1.0)
