"""The grouped product against a float64 NumPy loop over groups with gradients by hand."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import configured, ragged_dot
from dovetail_protocols import QuantizedArray

LOOP = configured("blocked", slack=0.0, block=4)
MIXED = configured("blocked", slack=0.5, block=8)
IMPLEMENTATIONS = ["reference", "blocked", MIXED]
NAMES = ["reference", "blocked", "small blocks"]


class Case(NamedTuple):
    """One call; `sizes` are those of the groups."""

    rows: int
    sizes: tuple[int, ...]
    k: int = 5
    n: int = 7


CASES = {
    "one row": Case(1, (1,)),
    "one row of many groups": Case(1, (0, 0, 0, 1, 0, 0)),
    "more groups than rows": Case(9, (0, 2, 0, 0, 1, 0, 0, 3, 0, 0, 0, 0, 2, 0), k=1, n=1),
    "even": Case(61, (12, 12, 12, 12, 13)),
    "uneven": Case(61, (3, 0, 17, 1, 40)),
    "rows past the end": Case(61, (7, 0, 20, 2, 0)),
    "one group has all": Case(61, (0, 0, 61, 0, 0)),
    "no rows used": Case(61, (0, 0, 0, 0, 0)),
}


def make(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> tuple[jax.Array, ...]:
    """Return rows, matrices, sizes and the cotangent."""
    rng = np.random.default_rng(seed)
    shapes = (case.rows, case.k), (len(case.sizes), case.k, case.n), (case.rows, case.n)
    lhs, rhs, cotangent = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return lhs, rhs, jnp.asarray(case.sizes, jnp.int32), cotangent


def truth(*operands: Any) -> list[np.ndarray]:
    """Return result and gradients."""
    lhs, rhs, _, cotangent = (np.asarray(x, np.float64) for x in operands)
    out, d_lhs, d_rhs, start = np.zeros_like(cotangent), np.zeros_like(lhs), np.zeros_like(rhs), 0
    for group, size in enumerate(np.asarray(operands[2]).tolist()):
        mine = slice(start, start + size)
        out[mine], d_lhs[mine] = lhs[mine] @ rhs[group], cotangent[mine] @ rhs[group].T
        d_rhs[group] = lhs[mine].T @ cotangent[mine]
        start += size
    return [out, d_lhs, d_rhs]


@functools.partial(jax.jit, static_argnums=0)
def run(implementation: Any, lhs: Any, rhs: Any, sizes: Any, cotangent: Any) -> list[jax.Array]:
    """Return result and gradients of one implementation."""
    out, pull = jax.vjp(lambda a, b: ragged_dot(a, b, sizes, implementation=implementation), lhs, rhs)
    return [out, *pull(cotangent)]


def compare(got: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(got, expected, strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max(initial=0)
        assert error <= tolerance * max(1.0, np.abs(b).max(initial=0)), error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case: Case, implementation: Any) -> None:
    """A row that meets another expert's matrix, or is counted twice in its gradient, trains a wrong model."""
    operands = make(case)
    compare(run(implementation, *operands), truth(*operands), 1e-5)


@pytest.mark.parametrize("implementation", ["reference", MIXED], ids=["reference", "small blocks"])
def test_bfloat16(implementation: Any) -> None:
    """16-bit operands keep their dtype, summed in float32."""
    operands = make(CASES["uneven"], jnp.bfloat16)
    got = run(implementation, *operands)
    assert {x.dtype for x in got} == {jnp.dtype("bfloat16")}
    compare(got, truth(*operands), 1e-2)


@pytest.mark.parametrize("implementation", ["reference", MIXED], ids=["reference", "small blocks"])
def test_float64(implementation: Any) -> None:
    """Float64 inputs are not computed in float32 on the way."""
    with jax.enable_x64(True):
        operands = make(CASES["uneven"], jnp.float64)
        compare(run(implementation, *operands), truth(*operands), 1e-14)


def test_wider_and_narrower_results() -> None:
    """The result's dtype is what was asked for, and loses nothing on the way to it; matrices may have their own."""
    lhs, rhs, sizes, cotangent = make(CASES["uneven"], jnp.bfloat16)

    def call(lhs: Any, rhs: Any) -> Any:
        return ragged_dot(lhs, rhs, sizes, "highest", jnp.float32, implementation=MIXED)

    for weights in (rhs, rhs.astype(jnp.float32)):
        out, pull = jax.vjp(jax.jit(call), lhs, weights)
        assert out.dtype == jnp.float32
        expected = truth(lhs, weights, sizes, cotangent)
        compare([out], expected[:1], 1e-6)
        d_lhs, d_rhs = pull(cotangent.astype(jnp.float32))
        assert (d_lhs.dtype, d_rhs.dtype) == (lhs.dtype, weights.dtype)
        compare([d_lhs, d_rhs], expected[1:], 1e-2)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(data: st.DataObject) -> None:
    """Sizes and configurations nobody thought of agree with the truth."""
    cuts = sorted(data.draw(st.lists(st.integers(0, 61), min_size=5, max_size=5)))
    operands = make(Case(61, tuple(np.diff([0, *cuts]).tolist())))
    implementation = data.draw(st.sampled_from(["blocked", LOOP, MIXED]))
    compare(run(implementation, *operands), truth(*operands), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
def test_rows_of_no_group_may_hold_anything(implementation: Any) -> None:
    """Padding is exactly 0 there and back, and NaN in it reaches nobody: buffers need no clearing."""
    case = CASES["rows past the end"]
    lhs, rhs, sizes, cotangent = make(case)
    expected, used = truth(lhs, rhs, sizes, cotangent), sum(case.sizes)
    got = run(implementation, lhs.at[used:].set(jnp.nan), rhs, sizes, cotangent.at[used:].set(jnp.inf))
    compare(got, expected, 1e-5)
    for x in got[:2]:
        assert not np.asarray(x)[used:].any()


@pytest.mark.parametrize("implementation", ["blocked", LOOP, MIXED], ids=["blocked", "loop", "small blocks"])
def test_groups_do_not_touch_each_other(implementation: Any) -> None:
    """A broken expert or token shows in its own rows and its own gradient only."""
    case = CASES["uneven"]
    lhs, rhs, sizes, cotangent = make(case)
    got = run(implementation, lhs.at[5].set(jnp.nan), rhs.at[4].set(jnp.inf), sizes, cotangent)
    expected = truth(lhs, rhs, sizes, cotangent)
    others = np.r_[0:5, 6:21]  # neither the broken row nor those of the broken matrix
    compare([x[others] for x in got[:2]], [x[others] for x in expected[:2]], 1e-5)
    compare([got[2][np.r_[0, 1, 3, 4]]], [expected[2][np.r_[0, 1, 3, 4]]], 1e-5)  # row 5 is of group 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
def test_sizes_that_reach_too_far(implementation: Any) -> None:
    """Sizes past the rows are cut off, negative ones are empty: nothing is read out of bounds, and no sum wraps."""
    lhs, rhs, _, cotangent = make(CASES["even"])
    most = 2**31 - 1
    for sizes, meant in (
        ((5, 0, 60, 7, 1), (5, 0, 56, 0, 0)),
        ((-3, 15, -9, 2, 30), (0, 15, 0, 2, 30)),
        ((2, most, most, 3, most), (2, 59, 0, 0, 0)),
    ):
        got = run(implementation, lhs, rhs, jnp.array(sizes, jnp.int32), cotangent)
        compare(got, truth(lhs, rhs, jnp.array(meant), cotangent), 1e-5)


def test_sizes_of_64_bits() -> None:
    """A size past 32 bits becomes a small one, and rows meet the wrong matrix."""
    lhs, rhs, _, cotangent = make(CASES["uneven"])
    with jax.enable_x64(True):
        out = ragged_dot(lhs, rhs, jnp.asarray([3, 0, 2**32 + 1, -(2**32) + 1, 5]))
    compare([out], truth(lhs, rhs, jnp.array([3, 0, 58, 0, 0]), cotangent)[:1], 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_empty_axes_give_zeros(implementation: str) -> None:
    """No rows, groups or features is a clean result, not a crash in a loop over nothing."""
    for rows, groups, k, n in ((0, 2, 3, 4), (3, 0, 3, 4), (3, 2, 0, 4), (3, 2, 3, 0)):
        operands = jnp.ones((rows, k)), jnp.ones((groups, k, n))
        sizes = jnp.ones((groups,), jnp.int32)
        call = functools.partial(ragged_dot, group_sizes=sizes, implementation=implementation)
        out, pull = jax.vjp(call, *operands)
        assert out.shape == (rows, n)
        assert not any(np.asarray(x).any() for x in (out, *pull(out)))


def quantize(rhs: jax.Array, scale_shape: tuple[int, ...], zero: bool) -> QuantizedArray:
    rng = np.random.default_rng(1)
    scale = jnp.asarray(0.1 + rng.random(scale_shape), rhs.dtype)
    values = jnp.asarray(rng.integers(-8, 8, rhs.shape), jnp.int8)
    zero_point = jnp.asarray(rng.integers(-3, 3, scale_shape), rhs.dtype) if zero else None
    return QuantizedArray.checked(values, scale, zero_point, rhs.dtype)


@pytest.mark.parametrize(
    ("scale", "implementation"),
    [((1, 1, 1), "blocked"), ((2, 1, 6), "reference"), ((4, 2, 3), MIXED)],
    ids=["one scale", "reference", "blocks of scales"],
)
def test_quantized_matrices(scale: tuple[int, ...], implementation: Any) -> None:
    """Quantized experts give what their dequantized ones give, with a gradient for the rows."""
    lhs, rhs, sizes, cotangent = make(Case(50, (7, 0, 20, 2), k=4, n=6))
    weights = quantize(rhs, scale, zero=scale[0] != 1)

    def call(lhs: jax.Array) -> jax.Array:
        return ragged_dot(lhs, weights, sizes, implementation=implementation)

    out, pull = jax.vjp(jax.jit(call), lhs)
    compare([out, *pull(cotangent)], truth(lhs, weights.dequantize(), sizes, cotangent)[:2], 1e-5)


def test_quantized_matrices_are_not_expanded_at_once() -> None:
    """A quantized layer fits where its float form does not: a few experts at a time are dequantized."""
    groups, k, n = 64, 128, 128
    weights = QuantizedArray(
        jax.ShapeDtypeStruct((groups, k, n), jnp.int8), jax.ShapeDtypeStruct((groups, 1, n), jnp.float32)
    )
    operands = jax.ShapeDtypeStruct((128, k), jnp.float32), weights, jax.ShapeDtypeStruct((groups,), jnp.int32)
    compiled = jax.jit(ragged_dot).lower(*operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < groups * k * n * 4 / 2


def objective(lhs: Any, rhs: Any, sizes: Any, implementation: Any = None) -> jax.Array:
    return jnp.sum(jnp.sin(ragged_dot(lhs, rhs, sizes, implementation=implementation)))


@pytest.mark.parametrize("axes", [(0, None, 0), (0, 0, None), (None, None, 0)], ids=str)
def test_vmap(axes: tuple[Any, ...]) -> None:
    """A batch over any of the operands, inside and outside the gradient, is as one after the other."""
    rng = np.random.default_rng(0)
    cases = [make(Case(20, tuple(rng.multinomial(18 - i, np.ones(4) / 4))), seed=i) for i in range(3)]
    every = [jnp.stack(x) for x in list(zip(*cases, strict=True))[:3]]
    given = [x if axis == 0 else x[0] for x, axis in zip(every, axes, strict=True)]
    cotangents = jnp.stack([case[3] for case in cases])
    expected = list[Any]()
    for i in range(3):
        one = [x[i] if axis == 0 else x for x, axis in zip(given, axes, strict=True)]
        expected.append(truth(*one, cotangents[i]))
    out, d_lhs, d_rhs = (np.stack(x) for x in zip(*expected, strict=True))
    inside = jax.jit(jax.vmap(functools.partial(run, MIXED), (*axes, 0)))(*given, cotangents)
    compare(inside, [out, d_lhs, d_rhs], 1e-5)
    mapped = jax.vmap(functools.partial(ragged_dot, implementation=MIXED), axes)
    pulled = jax.jit(lambda a, b, s, c: jax.vjp(lambda a, b: mapped(a, b, s), a, b)[1](c))(*given, cotangents)
    summed = [x if axis == 0 else x.sum(0) for x, axis in zip((d_lhs, d_rhs), axes[:2], strict=True)]
    compare(pulled, summed, 1e-5)


def test_nested_vmap_folds_into_rows() -> None:
    """Two batch axes, of rows and of matrices, still run one loop over real blocks; quantized matrices as well."""
    rng = np.random.default_rng(0)
    lhs, rhs = jnp.asarray(rng.standard_normal((2, 3, 20, 4)), jnp.float32), jnp.zeros((2, 4, 4, 6))
    sizes = jnp.asarray(rng.multinomial(18, np.ones(4) / 4, size=(2, 3)), jnp.int32)
    weights = quantize(rhs, (2, 2, 1, 6), zero=True)
    call = functools.partial(ragged_dot, implementation=MIXED)
    for w in (weights, weights.dequantize()):
        got = jax.jit(jax.vmap(jax.vmap(call, (0, None, 0))))(lhs, w, sizes)
        for i, j in itertools.product(range(2), range(3)):
            dense = weights.dequantize()[i]
            compare([got[i, j]], truth(lhs[i, j], dense, sizes[i, j], jnp.zeros((20, 6)))[:1], 1e-5)


def test_composes_with_remat() -> None:
    """A checkpointed layer trains with the same gradients."""
    lhs, rhs, sizes, _ = make(CASES["uneven"])
    own = functools.partial(objective, sizes=sizes, implementation=MIXED)
    plain, remat = (jax.jit(jax.grad(f, argnums=(0, 1)))(lhs, rhs) for f in (own, jax.checkpoint(own)))
    compare(remat, [np.asarray(x) for x in plain], 1e-6)


def test_composes_with_shardings() -> None:
    """Rows over devices, by the partitioner and by shard_map with groups of their own, give one device's gradients."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    rng = np.random.default_rng(0)
    rhs = make(Case(1, (0, 0, 0)))[1]
    lhs = jnp.asarray(rng.standard_normal((160, 5)), jnp.float32)
    sizes = jnp.asarray(rng.multinomial(17, np.ones(3) / 3, size=8), jnp.int32)
    gradient = jax.grad(functools.partial(objective, implementation=MIXED), argnums=(0, 1))
    single = jax.jit(gradient)
    one = [single(lhs[20 * i : 20 * i + 20], rhs, sizes[i]) for i in range(8)]
    expected = [np.concatenate([x[0] for x in one]), np.sum([x[1] for x in one], axis=0)]
    mapped = jax.shard_map(
        lambda a, b, s: gradient(a, b, s[0]), mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, whole)
    )
    compare(jax.jit(mapped)(lhs, rhs, sizes), expected, 1e-5)
    expected = [np.asarray(x) for x in single(lhs, rhs, sizes[0])]
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in ((lhs, rows), (rhs, whole))]
    compare(jax.jit(gradient)(*placed, sizes[0]), expected, 1e-5)


def test_reference_has_every_derivative() -> None:
    """Forward mode and curvature go through the reference; blocked refuses forward mode rather than being wrong."""
    lhs, rhs, sizes, _ = make(Case(6, (2, 0, 3)))
    reference = functools.partial(objective, sizes=sizes, implementation="reference")
    gradient, step = jax.jit(jax.grad(reference)), jnp.full_like(lhs, 1e-2)
    compare([jax.jit(jax.jacfwd(reference))(lhs, rhs)], [np.asarray(gradient(lhs, rhs))], 1e-6)
    curvature = jax.jit(lambda x: jax.jvp(lambda x: gradient(x, rhs), (x,), (step,))[1])(lhs)
    compare([curvature], [np.asarray(gradient(lhs + step / 2, rhs) - gradient(lhs - step / 2, rhs))], 1e-3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: objective(x, rhs, sizes), (lhs,), (step,))


def compiled(function: Any, rows: int, groups: int) -> Any:
    def both(lhs: Any, rhs: Any, sizes: Any) -> Any:
        out, pull = jax.vjp(lambda a, b: function(a, b, sizes), lhs, rhs)
        return out, pull(out)

    shapes = (rows, 32), (groups, 32, 64)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(both).lower(*given, jax.ShapeDtypeStruct((groups,), jnp.int32)).compile()


def test_work_does_not_grow_with_groups() -> None:
    """64 experts cost what 4 cost, by XLA's count, 256 what rounding 8 rows each up to 16 costs, and not 64 times."""
    flops = [compiled(ragged_dot, 2048, groups).cost_analysis()["flops"] for groups in (4, 64, 256)]
    least = 3 * 2 * 2048 * 32 * 64
    assert least <= flops[0] < 1.4 * least
    assert abs(flops[1] / flops[0] - 1) < 0.01
    assert flops[2] < 2.1 * least


def test_memory_does_not_grow_with_groups() -> None:
    """Temporaries are a few copies of the rows, and an eighth of those of `jax.lax.ragged_dot` and less."""
    for groups, factor in ((16, 8), (64, 20)):
        temp = [
            compiled(f, 1024, groups).memory_analysis().temp_size_in_bytes for f in (ragged_dot, jax.lax.ragged_dot)
        ]
        assert temp[0] * factor <= temp[1], temp


LHS, RHS, SIZES = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([1, 2])
BAD: list[tuple[str, Any, dict[str, Any], type[Exception], str]] = [
    ("rank", (LHS[0], RHS, SIZES), {}, ValueError, r"lhs \(3,\), rhs \(2, 3, 5\); expected \[rows, k\]"),
    ("k", (jnp.ones((4, 2)), RHS, SIZES), {}, ValueError, r"lhs \(4, 2\)"),
    ("sizes", (LHS, RHS, jnp.array([1])), {}, ValueError, r"\(1,\); expected \(2,\), one per matrix"),
    ("float sizes", (LHS, RHS, jnp.ones(2)), {}, TypeError, "float32; expected integers"),
    ("integers", (LHS.astype(int), RHS, SIZES), {}, TypeError, "lhs has dtype int32"),
    ("integer matrices", (LHS, RHS.astype(int), SIZES), {}, TypeError, "rhs has dtype int32"),
    ("result", (LHS, RHS, SIZES), {"preferred_element_type": int}, TypeError, "preferred_element_type has dtype"),
    ("implementation", (LHS, RHS, SIZES), {"implementation": "block"}, ValueError, "did you mean 'blocked'"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("operands", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(operands: Any, options: Any, error: type[Exception], message: str) -> None:
    """A wrong shape or dtype is refused with the value, never broadcast into something plausible."""
    with pytest.raises(error, match=message):
        ragged_dot(*operands, **options)
