"""Distillation losses against float64 NumPy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_kernels import Teacher, TopLogprobs, configured, distillation_loss
from dovetail_kernels._dtypes import exact
from dovetail_protocols import QuantizedArray

SMALL = configured("blocked", chunk=3, bands=2)


class Case(NamedTuple):
    beta: float
    top: int | None = None
    rows: int = 7
    vocab: int = 9
    temperature: float = 1.0
    softcap: float | None = None
    bias: bool = False
    weighted: bool = False
    per_token: bool = False


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0).sum(1)


def divergence(beta: float, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    if beta in (0, 1):
        return kl(p, q) if beta == 0 else kl(q, p)
    return beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)


def slope(beta: float, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Derivative by q."""
    if beta == 0:
        return -p / q
    return np.log(q / p) + 1 if beta == 1 else (1 - beta) * np.log(q / (beta * p + (1 - beta) * q))


def make(case: Case, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the student's operands and the teacher's."""
    rng = np.random.default_rng(seed)
    student = {"hidden": rng.standard_normal((case.rows, 4)), "weight": rng.standard_normal((4, case.vocab))}
    if case.bias:
        student["bias"] = rng.standard_normal(case.vocab)
    return student, {
        "hidden": rng.standard_normal((case.rows, 3)),
        "weight": rng.standard_normal((3, case.vocab)),
        "bias": rng.standard_normal(case.vocab),
    }


def weights(case: Case) -> np.ndarray | None:
    return np.random.default_rng(3).choice([0.0, 1.0, 2.5], case.rows) if case.weighted else None


def upstream(case: Case) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((case.rows,) if case.per_token else ())


def taught(case: Case, teacher: dict[str, np.ndarray]) -> np.ndarray:
    raw = teacher["hidden"] @ teacher["weight"] + teacher["bias"]
    return softmax(5 * np.tanh(raw / 5) / case.temperature)


def best(case: Case, p: np.ndarray) -> np.ndarray:
    return np.argsort(-p, axis=1)[:, : case.top].astype(np.int32)


def truth(case: Case, student: dict[str, np.ndarray], p: np.ndarray) -> dict[str, np.ndarray]:
    raw = student["hidden"] @ student["weight"] + student.get("bias", 0.0)
    z = (raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)) / case.temperature
    q = softmax(z)
    outcomes = q
    if case.top is not None:  # a matrix per row that adds up the outcomes
        ids, merge = best(case, p), np.zeros((case.rows, case.vocab, case.top + 1))
        merge[:, :, -1] = 1
        for row in range(case.rows):
            merge[row, ids[row]] = 0
            merge[row, ids[row], np.arange(case.top)] = 1
        p, outcomes = (np.einsum("tv,tvo->to", x, merge) for x in (p, q))
    rows = np.ones(case.rows) if weights(case) is None else weights(case)
    loss = divergence(case.beta, p, outcomes) * rows
    with np.errstate(all="ignore"):
        dq = np.nan_to_num(slope(case.beta, p, outcomes))
    if case.top is not None:
        dq = np.einsum("to,tvo->tv", dq, merge)
    dz = q * (dq - (q * dq).sum(1, keepdims=True)) * (rows * upstream(case))[:, None] / case.temperature
    if case.softcap is not None:
        dz /= np.cosh(raw / case.softcap) ** 2
    found = {"loss": loss if case.per_token else loss.sum(), "bias": dz.sum(0)}
    return {**found, "hidden": dz @ student["weight"].T, "weight": student["hidden"].T @ dz}


def compare(case: Case, implementation: Any, dtype: Any = jnp.float32, tolerance: float = 1e-5, seed: int = 0) -> None:
    student, teacher = ({k: jnp.asarray(v, dtype) for k, v in part.items()} for part in make(case, seed))
    p = taught(case, {k: np.asarray(v, np.float64) for k, v in teacher.items()})
    expected = truth(case, {k: np.asarray(v, np.float64) for k, v in student.items()}, p)
    top = None
    if case.top is not None:
        ids = best(case, p)
        top = TopLogprobs(jnp.asarray(np.log(np.take_along_axis(p, ids, 1)), exact(dtype)), jnp.asarray(ids))

    @jax.jit
    def run(student: Any, teacher: Any, top: Any, weights: Any, cotangent: jax.Array) -> dict[str, jax.Array]:
        def call(student: dict[str, jax.Array]) -> jax.Array:
            return distillation_loss(
                student["hidden"],
                student["weight"],
                Teacher(**teacher, softcap=5.0) if top is None else top,
                beta=case.beta,
                temperature=case.temperature,
                loss_weights=weights,
                bias=student.get("bias"),
                softcap=case.softcap,
                per_token=case.per_token,
                implementation=implementation,
            )

        loss, pull = jax.vjp(call, student)
        return {"loss": loss, **pull(cotangent)[0]}

    rows = None if weights(case) is None else jnp.asarray(weights(case), exact(dtype))
    for name, value in run(student, teacher, top, rows, jnp.asarray(upstream(case), exact(dtype))).items():
        error = np.abs(np.asarray(value, np.float64) - expected[name]).max() / max(1, np.abs(expected[name]).max())
        assert error < tolerance, f"{name}: {error}"
        assert value.dtype == (exact(dtype) if name == "loss" else jnp.dtype(dtype))
        assert value.shape == expected[name].shape


def everything(beta: float, top: int | None, per_token: bool = False) -> Case:
    return Case(beta, top, 7, 9, 1.7, 3.0, True, True, per_token)


CASES = [(everything(beta, top), SMALL) for beta in (0.0, 0.3, 1.0) for top in (None, 3)] + [
    (everything(0.3, None, per_token=True), SMALL),
    (everything(1.0, 3, per_token=True), SMALL),
    (everything(0.3, None), "reference"),
    (everything(0.0, 3, per_token=True), "reference"),
    (Case(0.0, rows=1, vocab=1), "blocked"),
    (Case(0.5, 1, rows=1), "blocked"),
    (Case(0.3, 9), "blocked"),
    (Case(1.0, 9), "reference"),
    (Case(0.0, rows=300, vocab=20001), "blocked"),
    (Case(0.5, 5, rows=20, vocab=2047), "blocked"),
]


@pytest.mark.parametrize(("case", "implementation"), CASES, ids=str)
def test_closed_form(case: Case, implementation: Any) -> None:
    """The student learns the wrong distribution if a loss or gradient is wrong for a divergence or kind of teacher."""
    compare(case, implementation)


@pytest.mark.parametrize("implementation", [SMALL, "reference"], ids=str)
@pytest.mark.parametrize("top", [None, 3])
def test_other_dtypes(top: int | None, implementation: Any) -> None:
    """16-bit operands: float32 loss; float64 ones are not computed in float32 on the way."""
    compare(everything(0.3, top), implementation, jnp.bfloat16, 2e-2)
    with jax.enable_x64(True):
        compare(everything(1.0, top), implementation, jnp.float64, 1e-12)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        beta=st.sampled_from([0.0, 1.0]) | st.floats(0.05, 0.95),
        top=st.none() | st.integers(1, 4),
        rows=st.integers(1, 9),
        vocab=st.integers(4, 9),
        temperature=st.floats(0.5, 3),
        softcap=st.none() | st.floats(0.5, 5.0),
        per_token=st.booleans(),
    ),
    chunk=st.integers(1, 10),
)
def test_any_shape(case: Case, chunk: int) -> None:
    """Shapes, divergences and chunk sizes nobody thought of."""
    compare(case, configured("blocked", chunk=chunk), tolerance=2e-5)


H, W = jnp.ones((4, 3)), jnp.arange(15.0).reshape(3, 5) / 9
OTHER = Teacher(jnp.ones((4, 2)), jnp.arange(10.0).reshape(2, 5))
TOP = TopLogprobs(jnp.log(jnp.full((4, 2), 0.3)), jnp.array([[0, 1]] * 4))


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_rows_of_weight_zero_may_hold_anything(beta: float, implementation: str) -> None:
    """Padding in student or teacher must not touch the loss or any gradient."""
    bad = jnp.array([[1.0], [jnp.nan], [1.0], [jnp.inf]])
    mask = jnp.array([True, False, True, False])
    for teacher, broken in (
        (OTHER, OTHER._replace(hidden=OTHER.hidden * bad)),
        (TOP, TopLogprobs(TOP.logprobs * bad, jnp.where(jnp.isfinite(bad), TOP.ids, -100))),
    ):

        def loss(hidden: jax.Array, weight: jax.Array, teacher: Any, mask: Any) -> jax.Array:
            return distillation_loss(
                hidden, weight, teacher, beta=beta, loss_weights=mask, implementation=implementation
            )

        value = jax.value_and_grad(loss, argnums=(0, 1))
        got, expected = value(H * bad, W, broken, mask), value(H, W, teacher, mask)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        assert got[1][0][1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_extreme_logits(beta: float) -> None:
    """Certain teachers and students give finite gradients, and the loss that follows."""
    weight = jnp.array([[1.0, 0.0, -1.0]])
    teacher = Teacher(jnp.array([[300.0], [-300.0]]), weight)
    value = jax.value_and_grad(functools.partial(distillation_loss, beta=beta))
    loss, gradient = value(jnp.array([[300.0], [300.0]]), weight, teacher)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    assert abs(loss - {0.0: 600, 1.0: 600}.get(beta, -0.4 * np.log(0.4) - 0.6 * np.log(0.6))) < 1e-3
    exactly = TopLogprobs(jnp.array([[0.0], [0.0]]), jnp.array([[0], [2]]))
    loss, gradient = value(jnp.array([[300.0], [300.0]]), weight, exactly)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_unknown_ids_show(implementation: str) -> None:
    """A teacher with another tokenizer gives NaN in the rows that show it."""
    teacher = TOP._replace(ids=jnp.array([[0, 1], [0, 5], [-1, 2], [3, 2]]))
    loss = distillation_loss(H, W, teacher, per_token=True, implementation=implementation)
    assert np.isnan(loss).tolist() == [False, True, True, False]


def test_teachers_do_not_learn() -> None:
    """A quantized teacher works, and no gradient reaches a teacher, in either implementation."""
    quantized = QuantizedArray.checked(OTHER.weight.astype(jnp.int8), jnp.full((1, 5), 1.0), None, jnp.float32)
    a, b = (distillation_loss(H, W, OTHER._replace(weight=weight)) for weight in (OTHER.weight, quantized))
    assert a == b
    for implementation in ("blocked", "reference"):
        own = functools.partial(distillation_loss, H, W, implementation=implementation)
        gradients = jax.grad(lambda h, w, own=own: own(Teacher(h, w)), argnums=(0, 1))(OTHER.hidden, OTHER.weight)
        assert not any(np.asarray(g).any() for g in gradients)


def objective(hidden: jax.Array, weight: jax.Array, teacher: jax.Array, per_token: bool) -> jax.Array:
    loss = distillation_loss(
        hidden, weight, Teacher(teacher, OTHER.weight), beta=0.3, per_token=per_token, implementation=SMALL
    )
    return jnp.sum(loss)


@pytest.mark.parametrize("per_token", [False, True])
def test_composes(per_token: bool) -> None:
    """Under remat, vmap and shard_map the gradients are those of one device."""
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((16, 3), (3, 5), (16, 2))]
    own = functools.partial(objective, per_token=per_token)
    gradient = jax.grad(own, argnums=(0, 1))
    plain = jax.jit(gradient)(*x)

    def batched(hidden: jax.Array, weight: jax.Array, teacher: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(own, (0, None, 0))(hidden.reshape(4, 4, -1), weight, teacher.reshape(4, 4, -1)))

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    rows, whole = jax.P("data"), jax.P()
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, whole))
    others = (
        jax.jit(jax.grad(jax.checkpoint(own), argnums=(0, 1)))(*x),
        jax.jit(jax.grad(batched, argnums=(0, 1)))(*x),
        jax.jit(mapped)(*x),
    )
    for other in others:
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_and_empty() -> None:
    """Neither model's logits are in memory; no rows have no loss."""
    rows, vocab = 2048, 20000
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((rows, 8), (8, vocab), (rows, 4), (4, vocab))]

    def loss(hidden: Any, weight: Any, *teacher: Any) -> jax.Array:
        how = configured("blocked", chunk=32)
        return distillation_loss(hidden, weight, Teacher(*teacher), beta=0.5, implementation=how)

    analysis = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < rows * vocab * 4 / 5
    assert distillation_loss(H[:0], W, OTHER._replace(hidden=OTHER.hidden[:0])) == 0
    assert distillation_loss(H[:0], W, TopLogprobs(TOP.logprobs[:0], TOP.ids[:0]), per_token=True).shape == (0,)


BAD: list[tuple[str, Any, dict[str, Any], Any, str]] = [
    ("features", (H, jnp.ones((2, 5)), OTHER), {}, ValueError, r"hidden \(4, 3\), weight \(2, 5\)"),
    ("teacher's rows", (H[:3], W, OTHER), {}, ValueError, r"expected 3 tokens and a vocabulary of 5"),
    ("teacher's vocabulary", (H, W[:, :4], OTHER), {}, ValueError, r"expected 4 tokens and a vocabulary of 4"),
    ("top rows", (H[:3], W, TOP), {}, ValueError, r"expected both \[3, top\]"),
    ("top size", (H, W[:, :1], TOP), {}, ValueError, "expected from 1 to 1 tokens per row"),
    ("ids", (H, W, TOP._replace(ids=TOP.logprobs)), {}, TypeError, "float32; expected integers"),
    ("teacher", (H, W, H), {}, TypeError, "expected Teacher or TopLogprobs"),
    ("beta", (H, W, OTHER), {"beta": 1.5}, ValueError, "beta=1.5; expected a number from 0 to 1"),
    ("temperature", (H, W, OTHER), {"temperature": 0.0}, ValueError, "temperature=0.0"),
    ("weights", (H, W, OTHER), {"loss_weights": jnp.ones(3)}, ValueError, r"loss_weights has shape \(3,\)"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, error: Any, message: str) -> None:
    """A wrong shape, dtype or option is refused with its value."""
    with pytest.raises(error, match=message):
        distillation_loss(*arrays, **options)
