"""What `dovetail_profile` counts of the kernels that training runs, whose loops depend on the batch."""

import jax
import jax.numpy as jnp
import pytest

from dovetail_kernels import attention, causal, ragged_dot, segments, window
from dovetail_profile import cost

TIME, DIM, BLOCK = 512, 8, 128
PRODUCTS = 7 * 2 * BLOCK * BLOCK * DIM  # of a block of queries with one of keys, forward and backward


@pytest.mark.parametrize(("width", "blocks"), [(TIME, 10), (BLOCK + 1, 8)])
def test_attention_over_packed_rows(width, blocks):
    """A trainer reports the rate of its products, and nobody's run ends for it; blocks above the diagonal cost none.

    With a window every block of queries has one tile of two blocks of keys, the first one, too.
    """
    x = jax.ShapeDtypeStruct((1, TIME, 1, DIM), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, TIME), jnp.int32)

    def loss(x, ids):
        return jnp.sum(attention(x, x * 2, x * 3, causal() & window(width) & segments(ids)))

    assert cost(jax.grad(loss), x, ids).matmul_flops == blocks * PRODUCTS
    scopes = {scope for scope, _ in cost(jax.jit(jax.grad(loss)), x, ids).entries}
    assert not any("trips" in scope for scope in scopes)


def test_grouped_products():
    """Groups of equal size need no more than the padded batch of products."""
    rows, matrices = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((4, 8, 16), jnp.float32)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    found = cost(jax.grad(lambda *x: jnp.sum(ragged_dot(*x)), (0, 1)), rows, matrices, sizes).matmul_flops
    plain = 3 * 2 * 64 * 8 * 16
    assert plain <= found <= 1.5 * plain
