import itertools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dovetail_profile import CostError, cost


def spec(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


D, L = 16, 5
UNIT = 2 * D**3
W, X = spec(D, D), spec(D, D)


def layer(x, w):
    return jnp.tanh(x @ w)


def scanned(w, x):
    return jax.lax.scan(lambda c, _: (layer(c, w), None), x, None, length=L)[0].sum()


def unrolled(w, x):
    for _ in range(L):
        x = layer(x, w)
    return x.sum()


def looped(w, x):
    return jax.lax.fori_loop(0, L, lambda _, c: layer(c, w), x).sum()


@pytest.mark.parametrize("f", [scanned, unrolled, looped])
def test_a_stack_of_layers_costs_its_layers_and_its_gradient_three_times_that(f):
    """XLA's cost_analysis counts a scan body once: utilisation would be wrong by the number of layers."""
    assert cost(f, W, X).matmul_flops == L * UNIT
    assert cost(jax.value_and_grad(f, (0, 1)), W, X).matmul_flops == 3 * L * UNIT
    assert cost(f, W, X).transcendentals == L * D * D


def test_scanned_equals_unrolled_in_everything_but_the_sum_of_gradients():
    a, b = cost(scanned, W, X), cost(unrolled, W, X)
    assert (a.matmul_flops, a.other_flops, a.transcendentals) == (b.matmul_flops, b.other_flops, b.transcendentals)
    assert a.io_bytes == b.io_bytes == 2 * D * D * 4 + 4


def test_nested_scans_multiply():
    def f(x):
        inner = lambda c: jax.lax.scan(lambda c, _: (c @ c, None), c, None, length=3)[0]  # noqa: E731
        return jax.lax.scan(lambda c, _: (inner(c), None), x, None, length=4)[0]

    assert cost(f, X).matmul_flops == 12 * UNIT


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.jit(f))])
def test_wrapping_does_not_change_the_forward_cost(wrap):
    def f(w):
        return layer(w, w).sum(-1)

    assert cost(wrap(f), W).total == cost(f, W).total
    assert cost(jax.vmap(wrap(f)), spec(3, D, D)).total == (3 * cost(f, W)).total


def test_a_function_with_a_rule_for_vmap_is_walked():
    """Experts are multiplied under such a rule."""

    def f(w):
        return layer(w, w)

    ruled = jax.custom_batching.custom_vmap(f)
    ruled.def_vmap(lambda size, batched, w: (jax.vmap(f)(w), True))
    found = cost(ruled, W)
    assert found.total == cost(f, W).total
    assert not found.uncounted


@pytest.mark.parametrize("f", [scanned, unrolled])
def test_jit_changes_nothing_under_a_gradient_either(f):
    """Inside jit, jax removes dead forward work itself; outside it is still in the trace and must not count."""
    grad = jax.grad(f, (0, 1))
    inside = cost(jax.grad(jax.jit(f), (0, 1)), W, X)
    assert cost(grad, W, X).matmul_flops == cost(jax.jit(grad), W, X).matmul_flops == inside.matmul_flops


def test_dead_code_is_free():
    def f(w, x):
        _ = x @ w
        return jax.lax.scan(lambda c, _: (c + 1, c @ w), x, None, length=4)[0]

    assert cost(f, W, X).matmul_flops == 0
    assert cost(jax.grad(lambda w, x: (x @ w).sum()), W, X).matmul_flops == UNIT


def test_recomputation_counts():
    """Hardware flops of a rematerialised block are four times the forward ones."""
    block = jax.checkpoint(lambda w, x: layer(layer(x, w), w))

    def f(w, x):
        return jax.lax.scan(lambda c, _: (block(w, c), None), x, None, length=L)[0].sum()

    # Two products forward, four backward; the second one's result is not needed again.
    assert cost(jax.value_and_grad(f, (0, 1)), W, X).matmul_flops == (2 + 4 + 2) * L * UNIT


def test_attention_and_mlp_have_their_textbook_cost():
    batch, time, heads, dim, hidden = 2, 8, 4, 4, 48

    def attention(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    qkv = spec(batch, time, heads, dim)
    assert cost(attention, qkv, qkv, qkv).matmul_flops == 4 * batch * heads * time * time * dim

    def mlp(up, down, x):
        return jax.nn.gelu(x @ up) @ down

    args = spec(D, hidden), spec(hidden, D), spec(batch * time, D)
    forward = 4 * batch * time * D * hidden
    assert cost(mlp, *args).matmul_flops == forward
    step = jax.value_and_grad(lambda *a: (mlp(*a) ** 2).sum(), (0, 1, 2))
    assert cost(step, *args).matmul_flops == 3 * forward


def test_the_most_expensive_branch_counts():
    def branch(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    def switch(i, x):
        return jax.lax.switch(i, [lambda: x, lambda: x @ x, lambda: x + 1])

    assert cost(branch, W, X).matmul_flops == 2 * UNIT
    assert cost(switch, spec(dtype=jnp.int32), X).matmul_flops == UNIT


def test_while_loops_need_a_trip_count():
    """A guess would be silently wrong."""

    def f(x):
        with jax.named_scope("newton"):
            return jax.lax.while_loop(lambda c: c.sum() < 1e9, lambda c: c @ c, x)

    with pytest.raises(CostError, match=r"'newton'.*while_trips"):
        cost(f, X)
    assert cost(f, X, while_trips=7).matmul_flops == 7 * UNIT
    assert cost(f, X, while_trips=7).by_primitive["lt"].flops == 8
    assert cost(f, X, while_trips=0).matmul_flops == 0
    for bad in (-1, True):
        with pytest.raises(ValueError, match="while_trips"):
            cost(f, X, while_trips=bad)


def test_custom_derivatives_are_walked():
    @jax.custom_vjp
    def f(x):
        return x @ x

    f.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g + g @ g,))
    assert cost(f, X).matmul_flops == UNIT
    assert cost(jax.value_and_grad(lambda x: f(x).sum()), X).matmul_flops == 4 * UNIT
    assert cost(jax.nn.silu, X).transcendentals == D * D


@pytest.mark.parametrize("axes", [{"data"}, {"data", "tensor"}])
def test_shard_map_counts_globally(axes):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names=axes)
    times = 2 if "tensor" in axes else 1  # replicated over tensor: both halves of the devices do all of it
    assert cost(f, X, W).matmul_flops == times * UNIT


def test_pallas_counts_its_estimate_or_its_body_times_its_grid():
    def call(**kwargs):
        def kernel(x, o):
            o[...] = jnp.dot(x[...], x[...])

        block = pl.BlockSpec((D, D), lambda i: (i, 0))
        out = jax.ShapeDtypeStruct((4 * D, D), jnp.float32)
        return pl.pallas_call(kernel, grid=(4,), in_specs=[block], out_specs=block, out_shape=out, **kwargs)

    x = spec(4 * D, D)
    found = cost(call(), x)
    assert (found.matmul_flops, found.bytes, found.uncounted) == (4 * UNIT, 2 * 4 * D * D * 4, frozenset())
    estimate = pl.CostEstimate(flops=11, transcendentals=3, bytes_accessed=5)
    known = cost(call(cost_estimate=estimate), x)
    assert (known.flops, known.transcendentals, known.bytes) == (11, 3, 5)


def test_scopes_collect_forward_and_backward_work():
    def f(w, x):
        with jax.named_scope("mlp"):
            with jax.named_scope("up"):
                x = x @ w
            x = jax.jit(lambda x: jnp.tanh(x @ w))(x)

        def body(c, _):
            with jax.named_scope("layer"):
                return jax.checkpoint(layer)(c, w), None

        with jax.named_scope("stack"):
            x = jax.lax.scan(body, x, None, length=L)[0]
        return (x @ w).sum()

    found = cost(f, W, X).by_scope()
    assert {k: v.matmul_flops // UNIT for k, v in found.items()} == {"stack/layer": L, "mlp": 1, "mlp/up": 1, "": 1}
    step = cost(jax.value_and_grad(f, (0, 1)), W, X)
    found = step.by_scope(depth=1)
    assert {k: v.matmul_flops // UNIT for k, v in found.items()} == {"stack": 4 * L, "mlp": 6, "": 3}
    assert set(step.by_scope()) <= {"", "mlp", "mlp/up", "stack", "stack/layer"}


def test_unknown_primitives_are_named():
    """Silence would look like an exact count."""
    assert cost(jnp.linalg.eigh, X).uncounted == {"eigh"}
    assert cost(scanned, W, X).uncounted == frozenset()


PROGRAMS = [
    (lambda x, w: x @ w, spec(24, 16), spec(16, 8)),
    (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), spec(3, 8, 16), spec(3, 16, 4)),
    (lambda x, w: (x @ w) @ (w.T @ x.T), spec(8, 16), spec(16, 8)),
    (lambda x, w: jax.lax.conv(x, w, (2, 1), "SAME"), spec(2, 3, 9, 8), spec(4, 3, 3, 2)),
    (lambda x, w: jax.lax.conv_transpose(x, w, (2, 2), "SAME"), spec(2, 5, 5, 3), spec(3, 3, 3, 4)),
]


@pytest.mark.parametrize(("f", "a", "b"), PROGRAMS)
def test_products_and_convolutions_agree_with_xla(f, a, b):
    """An independent count of programs without loops, elementwise work or padding."""
    compiled = jax.jit(f).lower(a, b).cost_analysis()
    assert cost(f, a, b).matmul_flops == compiled["flops"]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(1, 4), st.booleans())
def test_any_chain_of_layers_matches_its_closed_form(widths, batch, scan):
    def f(ws, x):
        for w in ws:
            x = jax.nn.relu(x @ w)
        return x.sum()

    ws = [spec(a, b) for a, b in itertools.pairwise(widths)]
    forward = sum(2 * batch * a * b for a, b in itertools.pairwise(widths))
    x = spec(batch, widths[0])
    step = jax.value_and_grad(f, (0, 1))
    if scan:
        assert cost(lambda ws, xs: jax.lax.map(lambda x: step(ws, x), xs), ws, spec(3, *x.shape)).matmul_flops == (
            9 * forward
        )
    assert cost(step, ws, x).matmul_flops == 3 * forward


def test_keyword_arguments_and_pytrees_pass_through():
    found = cost(lambda p, *, x: p["w"] @ x, {"w": W}, x=X)
    assert found.matmul_flops == UNIT


def test_loops_that_state_their_iterations():
    """A loop whose bounds depend on data counts what its scope says, on average, and the scope's name stays out."""
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def loop(x, n):
        with jax.named_scope("layer"), jax.named_scope("trips=2.5"):
            return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

    found = cost(loop, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert found.matmul_flops == 2.5 * 2 * 4**3
    assert {scope for scope, _ in found.entries} == {"layer"}
