import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_profile import cost

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
N = 8 * 16


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


OTHER = [
    ("add", lambda x: x + x, N),
    ("select, compare", lambda x: jnp.where(x > 0, x, -x), 3 * N),
    ("sum", lambda x: x.sum(), N - 1),
    ("row maximum", lambda x: x.max(1), 8 * 15),
    ("argmax", lambda x: jax.lax.argmax(x, 1, np.int32), 8 * 15),
    ("cumsum", lambda x: jax.lax.cumsum(x, 1), N),
    ("square", lambda x: x**2, N),
    ("power 7", lambda x: x**7, 4 * N),
    ("power -2", lambda x: jax.lax.integer_pow(x, -2), 2 * N),
    ("sort", lambda x: jax.lax.sort(x, dimension=1), 4 * N),
    ("top 4", lambda x: jax.lax.top_k(x, 4), 2 * N),
    ("pooling", lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 4), (2, 4), "VALID"), 4 * 4 * 7),
    ("own reduction", lambda x: jax.lax.reduce(x, 1.0, lambda a, b: a * b + 1, (1,)), 2 * 8 * 15),
    ("fft", jnp.fft.fft, 8 * 5 * 16 * 4),
    ("transpose", lambda x: x.T, 0),
    ("stack", lambda x: jnp.stack([x, x], 1), 0),
    ("cast", lambda x: x.astype(jnp.bfloat16), 0),
]


@pytest.mark.parametrize(("f", "flops"), [case[1:] for case in OTHER], ids=[case[0] for case in OTHER])
def test_other_flops_follow_the_stated_conventions(f, flops):
    found = cost(f, X)
    assert found.other_flops == flops
    assert found.matmul_flops == 0
    assert not found.uncounted


@pytest.mark.parametrize("f", [jnp.exp, jnp.tanh, jax.lax.rsqrt, jax.lax.logistic, jnp.sqrt, jax.lax.erf])
def test_transcendentals_are_counted_apart(f):
    found = cost(f, X)
    assert (found.flops, found.transcendentals) == (0, N)


@pytest.mark.parametrize("f", [lambda x: (x + x) * x, lambda x: (x * 2 + 1).sum(), lambda x: jnp.maximum(x, 0).max(0)])
def test_elementwise_work_and_reductions_agree_with_xla(f):
    assert cost(f, X).flops == jax.jit(f).lower(X).cost_analysis()["flops"]


LINALG = [
    (jax.lax.linalg.cholesky, (spec(2, 9, 9),), 2 * 9**3 // 3),
    (lambda x: jax.lax.linalg.lu(x)[0], (spec(9, 9),), 2 * 9**3 // 3),
    (lambda x: jax.lax.linalg.lu(x)[0], (spec(12, 9),), 81 * (36 - 9) // 3),
    (lambda a, b: jax.lax.linalg.triangular_solve(a, b, left_side=True), (spec(9, 9), spec(9, 4)), 81 * 4),
]


@pytest.mark.parametrize(("f", "args", "flops"), LINALG)
def test_factorisations_have_their_leading_terms(f, args, flops):
    assert flops in [counts.other_flops for counts in cost(f, *args).by_primitive.values()]


def test_complex_products_count_four_real_ones():
    a = spec(4, 5, dtype=jnp.complex64)
    assert cost(lambda a: a @ a.T, a).matmul_flops == 8 * 4 * 4 * 5


def test_ragged_products_count_every_row_once():
    """The gradient of a grouped product is two more of the same size."""
    rows, groups, k, n = 12, 3, 4, 5
    args = spec(rows, k), spec(groups, k, n), spec(groups, dtype=jnp.int32)
    assert cost(jax.lax.ragged_dot, *args).matmul_flops == 2 * rows * k * n
    step = jax.value_and_grad(lambda *a: (jax.lax.ragged_dot(*a) ** 2).sum(), (0, 1))
    assert cost(step, *args).matmul_flops == 3 * 2 * rows * k * n


CONVOLUTIONS = [
    # strides, padding, lhs dilation, rhs dilation, groups
    ((1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 1),
    ((2, 1), ((1, 1), (2, 0)), (1, 1), (1, 1), 1),
    ((1, 2), ((2, 2), (1, 2)), (1, 1), (2, 1), 2),
    ((1, 1), ((1, 1), (1, 1)), (2, 3), (1, 1), 4),
]


@pytest.mark.parametrize(("strides", "padding", "holes", "dilation", "groups"), CONVOLUTIONS)
def test_convolutions_count_the_products_of_real_elements(strides, padding, holes, dilation, groups):
    """Brute force: convolve ones with ones, each output is its number of products."""

    def f(x, w):
        kwargs = {"lhs_dilation": holes, "rhs_dilation": dilation, "feature_group_count": groups}
        return jax.lax.conv_general_dilated(x, w, strides, padding, **kwargs)

    x, w = jnp.ones((2, 4, 7, 6)), jnp.ones((8, 4 // groups, 3, 2))
    assert cost(f, x, w).matmul_flops == 2 * int(f(x, w).sum())


@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_the_gradient_of_a_convolution_costs_two_more(strides):
    """Also with strides, where the gradient runs over holes."""

    def f(x, w):
        return (jax.lax.conv(x, w, strides, "VALID") ** 2).sum()

    x, w = spec(2, 3, 9, 9), spec(4, 3, 3, 3)
    assert cost(jax.value_and_grad(f, (0, 1)), x, w).matmul_flops == 3 * cost(f, x, w).matmul_flops


I8 = spec(8, dtype=jnp.int32)
I0 = spec(dtype=jnp.int32)
BYTES = [
    ("product", lambda a, b: a @ b, (spec(3, 4), spec(4, 5)), 4 * (12 + 20 + 15)),
    ("add", lambda a: a + a, (X,), 4 * 3 * N),
    ("literals", lambda a: a + 1, (X,), 4 * 2 * N),
    ("reshape", lambda a: a.reshape(-1), (X,), 0),
    ("slice", lambda a: a[2:4], (X,), 4 * 2 * 32),
    ("dynamic slice", lambda a, i: jax.lax.dynamic_slice_p.bind(a, i, i, slice_sizes=(1, 2)), (X, I0), 4 * (2 * 2 + 2)),
    ("update", lambda a, u: jax.lax.dynamic_update_slice(a, u, (0, 0)), (X, spec(1, 2)), 4 * 2 * 2),
    ("half", lambda a: a * a, (spec(8, dtype=jnp.bfloat16),), 2 * 3 * 8),
    ("int4", lambda a: a.astype(jnp.int8), (spec(8, dtype=jnp.int4),), 4 + 8),
]


@pytest.mark.parametrize(("f", "args", "moved"), [case[1:] for case in BYTES], ids=[case[0] for case in BYTES])
def test_bytes_are_operands_and_results(f, args, moved):
    assert cost(f, *args).bytes == moved


def test_lookups_and_scatters_move_what_they_touch():
    """A lookup in a large table reads rows, not the table."""
    table = spec(1000, 16)
    gather = cost(lambda t, i: t.at[i].get(mode="promise_in_bounds"), table, I8).by_primitive["gather"]
    assert gather.bytes == 4 * (2 * 8 * 16 + 8)
    scatter = cost(lambda t, i, u: t.at[i].add(u, mode="promise_in_bounds"), table, I8, spec(8, 16))
    assert scatter.by_primitive["scatter-add"].bytes == 4 * (3 * 8 * 16 + 8)
    assert scatter.by_primitive["scatter-add"].flops == 8 * 16


def test_random_keys_have_a_size():
    found = cost(lambda k: jax.random.normal(k, (8,)), jax.random.key(0))
    assert found.io_bytes == 8 + 32
    assert not found.uncounted
