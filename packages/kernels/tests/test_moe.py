"""Routing, sorting and the way there and back against plain NumPy, and a whole layer against a loop over tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from dovetail_kernels import (
    Dispatch,
    ExpertGroups,
    combine,
    permute,
    ragged_dot,
    route,
    sort_by_expert,
)

TOKENS, EXPERTS, TOP = 23, 12, 3


def draw(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def scored(logits: np.ndarray, scoring: str) -> np.ndarray:
    e = np.exp(logits if scoring == "softmax" else -logits)
    return e / e.sum(1, keepdims=True) if scoring == "softmax" else 1 / (1 + e)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [None, ExpertGroups(4, 2), ExpertGroups(3, 2, best=1)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_route(scoring: Any, groups: ExpertGroups | None, biased: bool) -> None:
    """A token goes to its best experts within its best groups; a bias moves the choice but never the weights."""
    logits, bias = draw(TOKENS, EXPERTS), draw(EXPERTS, seed=1) if biased else None
    call = jax.jit(functools.partial(route, top_k=TOP, scoring=scoring, groups=groups, scale=2.5))
    routing = call(logits, bias=bias)
    scores = scored(np.asarray(logits, np.float64), scoring)
    for token, row in enumerate(scores):
        choice = row + (0 if bias is None else np.asarray(bias, np.float64))
        if groups is not None:
            split = np.sort(choice.reshape(groups.count, -1), 1)[:, -groups.best :].sum(1)
            outside = np.argsort(-split)[groups.keep :]
            choice.reshape(groups.count, -1)[outside] = -np.inf
        best = np.argsort(-choice)[:TOP]
        np.testing.assert_array_equal(routing.experts[token], best)
        np.testing.assert_allclose(routing.weights[token], 2.5 * row[best] / row[best].sum(), rtol=1e-5)
    np.testing.assert_allclose(routing.scores, scores, rtol=1e-5)
    plain = route(logits, TOP, scoring=scoring, renormalize=False)
    chosen = np.take_along_axis(scores, np.asarray(plain.experts), 1)
    np.testing.assert_allclose(plain.weights, chosen, rtol=1e-5)


def test_route_gradients() -> None:
    """The router learns from its weights alone: with renormalized softmax, that of a softmax over the chosen logits."""
    logits, factor = draw(TOKENS, EXPERTS), draw(TOKENS, TOP, seed=1)

    def through(logits: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(route(logits, TOP, bias=bias).weights * factor)

    got, d_bias = jax.jit(jax.grad(through, argnums=(0, 1)))(logits, jnp.zeros(EXPERTS))
    experts = np.asarray(route(logits, TOP).experts)
    p = scored(np.take_along_axis(np.asarray(logits, np.float64), experts, 1), "softmax")
    inner = p * (np.asarray(factor) - (p * np.asarray(factor)).sum(1, keepdims=True))
    expected = np.zeros((TOKENS, EXPERTS))
    np.put_along_axis(expected, experts, inner, 1)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert not np.asarray(d_bias).any()


def test_route_at_the_edges() -> None:
    """Equal, minus infinite and 16-bit logits give different experts in range, and finite float32 weights."""
    rows = jnp.array([[1.0] * 4, [-jnp.inf, 0, -jnp.inf, -jnp.inf], [1e4, -1e4, 0, 0]], jnp.bfloat16)
    for scoring in ("softmax", "sigmoid"):
        experts, weights, _ = route(rows, 3, scoring=scoring)
        assert [len(set(row)) for row in np.asarray(experts).tolist()] == [3, 3, 3]
        assert experts.dtype == jnp.int32
        assert weights.dtype == jnp.float32
        assert np.isfinite(weights).all()
    np.testing.assert_array_equal(route(rows, 3).experts[0], [0, 1, 2])
    assert route(jnp.zeros((0, 4)), 2).experts.shape == (0, 2)
    assert route(jnp.zeros((1, 1)), 1).weights.tolist() == [[1.0]]
    never = route(jnp.full((1, 4), -200.0), 2, scoring="sigmoid")  # every score is 0 in float32
    assert np.isfinite(never.weights).all()


def test_earlier_choices_keep_their_experts() -> None:
    """What a sampler chose is what is trained, with the weights that these experts have now."""
    order = np.random.default_rng(2).permuted(np.tile(np.arange(EXPERTS), (TOKENS, 1)), axis=1)
    earlier = order[:, :TOP].astype(np.int32)
    earlier[::4] = -1
    logits = draw(TOKENS, EXPERTS)
    routing = jax.jit(functools.partial(route, top_k=TOP))(logits, experts=jnp.asarray(earlier))
    expected = np.where(earlier < 0, route(logits, TOP).experts, earlier)
    np.testing.assert_array_equal(routing.experts, expected)
    scores = np.take_along_axis(scored(np.asarray(logits, np.float64), "softmax"), expected, axis=1)
    np.testing.assert_allclose(routing.weights, scores / scores.sum(1, keepdims=True), atol=1e-6)


def check_dispatch(experts: np.ndarray, live: np.ndarray, count: int, capacity: int | None, got: Dispatch) -> None:
    """Every choice has the row that a plain loop in the order of tokens gives it."""
    flat, ok = experts.reshape(-1), (live & (experts >= 0) & (experts < count)).reshape(-1)
    sizes = np.bincount(flat[ok], minlength=count)
    rows = flat.size if capacity is None else count * capacity
    begins = np.cumsum(sizes) - sizes if capacity is None else np.arange(count) * capacity
    places, source, seen = np.full(flat.size, rows), np.full(rows, flat.size), np.zeros(count, int)
    for index in np.flatnonzero(ok):
        expert = flat[index]
        if capacity is None or seen[expert] < capacity:
            places[index] = begins[expert] + seen[expert]
            source[places[index]] = index
            seen[expert] += 1
    np.testing.assert_array_equal(got.source, source)
    np.testing.assert_array_equal(got.places, places.reshape(experts.shape))
    np.testing.assert_array_equal(got.group_sizes, seen)
    np.testing.assert_array_equal(got.dropped, places.reshape(experts.shape) == rows)


sort_jitted = jax.jit(sort_by_expert, static_argnames=("num_experts", "capacity"))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_sort_by_expert(data: st.DataObject) -> None:
    """Rows are grouped by expert in the order of tokens, with and without room for all."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    shape, count, capacity = data.draw(st.sampled_from([((1, 1), 1, None), ((40, 4), 7, None), ((33, 1), 3, 5)]))
    experts = rng.integers(-1, count + 1, shape)
    live = rng.random((shape[0], 1)) < 0.8
    sort = functools.partial(sort_jitted, num_experts=count, capacity=capacity)
    check_dispatch(experts, live, count, capacity, sort(jnp.asarray(experts), where=jnp.asarray(live[:, 0])))


def test_sort_of_nothing() -> None:
    """A batch without tokens has experts without rows, and the way there and back ends with no token."""
    none = jnp.zeros((0, 2), jnp.int32)
    check_dispatch(np.asarray(none), np.zeros((0, 1), bool), 3, None, sort_by_expert(none, 3))
    for capacity, rows in ((None, 0), (2, 6)):
        dispatch = sort_by_expert(none, 3, capacity=capacity)
        spread, pull = jax.vjp(lambda x, d=dispatch: permute(x, d), jnp.ones((0, 4)))
        np.testing.assert_array_equal(spread, np.zeros((rows, 4)))
        assert pull(spread)[0].shape == (0, 4)
        back, pull = jax.vjp(lambda y, w, d=dispatch: combine(y, w, d), spread, jnp.ones((0, 2)))
        assert back.shape == (0, 4)
        assert [x.shape for x in pull(back)] == [(rows, 4), (0, 2)]


def test_ids_of_any_width() -> None:
    """Narrow ids cannot say where many experts end, and drop everything; wide ones become other experts."""
    assert sort_by_expert(jnp.array([[1], [100], [-1]], jnp.int8), 200).places[:, 0].tolist() == [0, 1, 3]
    with jax.enable_x64(True):
        beyond = jnp.asarray([[2**32 + 1, 3, 1 - 2**32]])
        assert sort_by_expert(beyond, 4).group_sizes.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("capacity", [None, 4])
def test_there_and_back(capacity: int | None, dtype: Any) -> None:
    """Tokens and gradients arrive at the right rows; nothing comes from what was dropped, and nothing from padding."""
    experts = route(draw(TOKENS, EXPERTS), TOP).experts
    where = jnp.arange(TOKENS) % 5 != 0
    dispatch = sort_by_expert(experts, EXPERTS, capacity=capacity, where=where)
    rows, choices = dispatch.source.shape[0], TOKENS * TOP
    x, weights, d_out = draw(TOKENS, 4, dtype=dtype), draw(TOKENS, TOP, seed=1), draw(TOKENS, 4, seed=2, dtype=dtype)
    y, d_rows = draw(rows, 4, seed=3, dtype=dtype), draw(rows, 4, seed=4, dtype=dtype)
    y = jnp.where((dispatch.source == choices)[:, None], jnp.asarray(jnp.nan, dtype), y)
    there = np.zeros((rows, choices))
    filled = np.flatnonzero(np.asarray(dispatch.source) < choices)
    there[filled, np.asarray(dispatch.source)[filled]] = 1
    token = np.repeat(np.eye(TOKENS), TOP, 0)
    f64 = functools.partial(np.asarray, dtype=np.float64)
    spread, pull = jax.vjp(jax.jit(lambda x: permute(x, dispatch)), x)
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_array_equal(f64(spread), there @ token @ f64(x))
    np.testing.assert_allclose(f64(pull(d_rows)[0]), (there @ token).T @ f64(d_rows), **tolerance)
    out, pull = jax.vjp(jax.jit(lambda y, w: combine(y, w, dispatch)), y, weights)
    assert out.dtype == dtype
    mixed = token.T * f64(weights).reshape(-1) @ there.T
    clean = np.nan_to_num(f64(y))
    np.testing.assert_allclose(f64(out), mixed @ clean, **tolerance)
    d_y, d_weights = pull(d_out)
    np.testing.assert_allclose(f64(d_y), mixed.T @ f64(d_out), **tolerance)
    expected = ((token @ f64(d_out)) * (there.T @ clean)).sum(1).reshape(TOKENS, TOP)
    np.testing.assert_allclose(f64(d_weights), expected, **tolerance)
    assert {d_y.dtype, d_weights.dtype} == {jnp.dtype(dtype), jnp.dtype("float32")}


def layer(x: Any, router: Any, up: Any, down: Any, capacity: int | None = None) -> jax.Array:
    """A whole mixture of experts."""
    routing = route(x @ router, TOP)
    dispatch = sort_by_expert(routing.experts, router.shape[1], capacity=capacity)
    rows = permute(x, dispatch)
    if capacity is None:
        rows = ragged_dot(jnp.tanh(ragged_dot(rows, up, dispatch.group_sizes)), down, dispatch.group_sizes)
    else:
        batch = rows.reshape(router.shape[1], capacity, -1)
        rows = jnp.einsum("ecf,efd->ecd", jnp.tanh(jnp.einsum("ecd,edf->ecf", batch, up)), down)
        rows = rows.reshape(-1, x.shape[1])
    return combine(rows, routing.weights, dispatch)


def by_token(x: Any, router: Any, up: Any, down: Any) -> jax.Array:
    """The same, every token through every expert, and those it did not choose times 0."""
    logits = x @ router
    experts = jnp.argsort(-logits, axis=1)[:, :TOP]
    chosen = jnp.any(experts[:, :, None] == jnp.arange(router.shape[1]), axis=1)
    weights = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf), axis=1)
    out = jnp.stack([jnp.tanh(x @ up[e]) @ down[e] for e in range(router.shape[1])], axis=1)
    return jnp.sum(weights[:, :, None] * out, axis=1)


def operands(dtype: Any = jnp.float32, tokens: int = TOKENS) -> list[jax.Array]:
    shapes = (tokens, 6), (6, EXPERTS), (EXPERTS, 6, 5), (EXPERTS, 5, 6)
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def loss(function: Any, *given: Any) -> jax.Array:
    return jnp.sum(jnp.sin(function(*given)))


@pytest.mark.parametrize("capacity", [None, TOKENS], ids=["dropless", "capacity"])
def test_layer_is_a_loop_over_tokens(capacity: int | None) -> None:
    """A layer of these parts trains as the textbook's does: value and every gradient in float64."""
    with jax.enable_x64(True):
        given = operands(jnp.float64)
        own = functools.partial(loss, functools.partial(layer, capacity=capacity))
        got = jax.jit(jax.value_and_grad(own, argnums=(0, 1, 2, 3)))(*given)
        expected = jax.jit(jax.value_and_grad(functools.partial(loss, by_token), argnums=(0, 1, 2, 3)))(*given)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


def test_layer_composes() -> None:
    """Under vmap, checkpoint and shard_map a layer has the gradients of one sequence after the other."""
    x, *rest = operands(tokens=8 * 6)
    gradient = jax.grad(functools.partial(loss, layer), argnums=(0, 1, 2, 3))
    expected = jax.jit(gradient)(x, *rest)
    remat = jax.grad(jax.checkpoint(functools.partial(loss, layer)), argnums=(0, 1, 2, 3))
    mapped = jax.jit(jax.vmap(gradient, (0, None, None, None)))(x.reshape(8, 6, -1), *rest)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    specs = (rows, whole, whole, whole)
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))
    joined = (mapped[0].reshape(x.shape), *(g.sum(0) for g in mapped[1:]))
    for other in (jax.jit(remat)(x, *rest), joined, sharded(x, *rest)):
        for a, b in zip(other, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_moving_rows_only_gathers() -> None:
    """No scatter of features in either pass: it is what makes the textbook's backward pass slow."""
    dispatch = sort_by_expert(route(draw(TOKENS, EXPERTS), TOP).experts, EXPERTS)

    def both(x: Any, w: Any) -> jax.Array:
        return jnp.sum(jnp.sin(combine(permute(x, dispatch), w, dispatch)))

    text = str(jax.make_jaxpr(jax.grad(both, argnums=(0, 1)))(draw(TOKENS, 4), draw(TOKENS, TOP)))
    assert "gather" in text
    assert "scatter" not in text


def test_permute_has_higher_orders() -> None:
    """Penalties on gradients differentiate through the way there twice."""
    dispatch = sort_by_expert(jnp.array([[0, 1], [1, 2]]), 3)
    x = draw(2, 3)
    inner = jax.grad(lambda x: jnp.sum(permute(x, dispatch) ** 3))
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(inner(x)))(x), 2 * 6 * x, rtol=1e-5)


E2 = jnp.zeros((4, 2), jnp.int32)
DISPATCH = sort_by_expert(E2, 3)
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("integer logits", lambda: route(E2, 1), TypeError, "int32; expected a float"),
    ("logits' rank", lambda: route(jnp.ones(3), 1), ValueError, r"\(3,\); expected \[tokens, experts\]"),
    ("top_k", lambda: route(jnp.ones((2, 3)), 4), ValueError, "top_k=4; expected between 1 and the 3"),
    ("no top_k", lambda: route(jnp.ones((2, 3)), 0), ValueError, "top_k=0"),
    ("scoring", lambda: route(jnp.ones((2, 3)), 1, scoring="max"), ValueError, "scoring='max'"),
    ("bias", lambda: route(jnp.ones((2, 3)), 1, bias=jnp.ones(2)), ValueError, r"\(2,\); expected \(3,\)"),
    ("groups", lambda: route(jnp.ones((2, 6)), 1, groups=ExpertGroups(4, 1)), ValueError, "divides 6 experts"),
    ("kept", lambda: route(jnp.ones((2, 6)), 1, groups=ExpertGroups(2, 3)), ValueError, "keep=3"),
    ("best", lambda: route(jnp.ones((2, 6)), 1, groups=ExpertGroups(6, 3)), ValueError, "groups have 1 experts"),
    ("too few kept", lambda: route(jnp.ones((2, 6)), 3, groups=ExpertGroups(3, 1)), ValueError, "the 2 experts"),
    ("float experts", lambda: sort_by_expert(jnp.ones((4, 2)), 3), TypeError, "float32; expected integers"),
    ("experts' rank", lambda: sort_by_expert(E2[0], 3), ValueError, r"expected \[tokens, k\]"),
    ("no experts", lambda: sort_by_expert(E2, 0), ValueError, "num_experts=0"),
    ("capacity", lambda: sort_by_expert(E2, 3, capacity=0), ValueError, "capacity=0"),
    ("where", lambda: sort_by_expert(E2, 3, where=jnp.ones(2, bool)), ValueError, r"\(2,\); expected \(4,\)"),
    ("tokens", lambda: permute(jnp.ones((3, 2)), DISPATCH), ValueError, r"x has shape \(3, 2\); expected \[4, feat"),
    ("rows", lambda: combine(jnp.ones((3, 2)), jnp.ones((4, 2)), DISPATCH), ValueError, r"expected \[8, features\]"),
    ("weights", lambda: combine(jnp.ones((8, 2)), jnp.ones((4, 1)), DISPATCH), ValueError, r"expected \(4, 2\)"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("call", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(error, match=message):
        call()
