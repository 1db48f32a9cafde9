"""The Mamba-2 recurrence against a float64 NumPy loop with gradients by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_kernels import configured, ssd, ssd_step

SMALL = configured("blocked", chunk=5)
AXES = ("x", "dt", "a", "b", "c", "d", "state")


class Case(NamedTuple):
    """One call."""

    time: int
    heads: int = 2
    groups: int = 1
    dim: int = 3
    size: int = 4
    d: bool = False
    state: bool = False
    packed: bool = False
    strength: float = 1.0
    batch: int = 2


CASES = {
    "one token": Case(1, state=True),
    "a chunk": Case(64, d=True),
    "a chunk and one": Case(65, heads=4, groups=2, state=True),
    "three chunks and some": Case(149, heads=3, groups=3, dim=1, size=1, d=True),
    "packed": Case(70, heads=4, groups=2, d=True, packed=True),
    "packed after a state": Case(70, heads=4, groups=1, d=True, state=True, packed=True),
    "strong decays": Case(70, strength=300.0, state=True, packed=True),
    "no decay": Case(80, strength=0.0, state=True),
}

RUNS = [
    *((name, SMALL) for name in CASES if name != "three chunks and some"),
    ("three chunks and some", "blocked"),
    ("packed after a state, in 64s", "blocked"),
    ("packed after a state, by token", "reference"),
    ("strong decays, by token", "reference"),
]


def ids(batch: int, time: int, seed: int = 3) -> np.ndarray:
    """Segments in any order of ids, with padding between and inside of them; one row is all padding."""
    rng = np.random.default_rng(seed)
    found = np.repeat(rng.permutation(np.arange(1, time + 1)), rng.integers(1, 40, time))[:time]
    found = np.tile(found, (batch, 1))
    found[rng.random((batch, time)) < 0.2] = 0
    found[-1, :] = 0 if batch > 2 else found[-1]
    return found.astype(np.int32)


def make(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> dict[str, jax.Array]:
    """Return the operands; a few steps are `strength` times as long as the others."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (case.batch, case.time, case.heads, case.dim),
        "dt": (case.batch, case.time, case.heads),
        "a": (case.heads,),
        "b": (case.batch, case.time, case.groups, case.size),
        "c": (case.batch, case.time, case.groups, case.size),
        "d": (case.heads,),
        "state": (case.batch, case.heads, case.dim, case.size),
    }
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    drawn["dt"] = np.log1p(np.exp(drawn["dt"] - 1))
    drawn["a"] = -np.exp(drawn["a"]) * (case.strength if case.strength < 1 else 1)
    drawn["dt"] = np.where(rng.random(drawn["dt"].shape) < 0.1, drawn["dt"] * max(1, case.strength), drawn["dt"])
    wanted = [name for name in AXES if name not in ("d", "state") or getattr(case, name)]
    return {name: jnp.asarray(drawn[name], dtype) for name in wanted}


def truth(operands: dict[str, Any], packed: Any, d_out: Any, d_after: Any) -> dict[str, np.ndarray]:
    """Outputs, the last state and gradients, one row and token after the other."""
    wide = {name: np.asarray(value, np.float64) for name, value in operands.items()}
    x, dt, a = wide["x"], wide["dt"], wide["a"]
    (batch, time, heads, dim), (groups, size) = x.shape, wide["b"].shape[2:]
    skip = wide.get("d", np.zeros(heads))
    state = wide.get("state", np.zeros((batch, heads, dim, size)))
    which = np.arange(heads) // (heads // groups)
    grads = {name: np.zeros_like(value) for name, value in wide.items()}
    grads.setdefault("state", np.zeros_like(state)), grads.setdefault("d", np.zeros(heads))
    out, after = np.zeros_like(x), np.zeros_like(state)
    for row in range(batch):
        now, last, trace = state[row], None, []
        for t in range(time):
            if packed is not None and packed[row, t] == 0:
                continue
            fresh = packed is not None and last is not None and packed[row, t] != last
            last = None if packed is None else packed[row, t]
            before = np.zeros_like(now) if fresh else now
            kept = np.exp(dt[row, t] * a)[:, None, None]
            b, c = wide["b"][row, t, which], wide["c"][row, t, which]
            now = kept * before + dt[row, t, :, None, None] * x[row, t, :, :, None] * b[:, None]
            out[row, t] = (now * c[:, None]).sum(-1) + skip[:, None] * x[row, t]
            trace.append((t, fresh, before, now, kept, b, c))
        after[row], back = now, np.asarray(d_after[row], np.float64)
        for t, fresh, before, now, kept, b, c in reversed(trace):
            dy = np.asarray(d_out[row, t], np.float64)
            back = back + dy[:, :, None] * c[:, None]
            np.add.at(grads["c"][row, t], which, (now * dy[:, :, None]).sum(1))
            grads["d"] += (dy * x[row, t]).sum(1)
            grads["x"][row, t] = skip[:, None] * dy + dt[row, t, :, None] * (back * b[:, None]).sum(-1)
            np.add.at(grads["b"][row, t], which, dt[row, t, :, None] * (back * x[row, t, :, :, None]).sum(1))
            through = (back * kept * before).sum((1, 2))
            grads["dt"][row, t] = a * through + (back * x[row, t, :, :, None] * b[:, None]).sum((1, 2))
            grads["a"] += dt[row, t] * through
            back = np.zeros_like(back) if fresh else kept * back
        grads["state"][row] = back
    return {"out": out, "after": after, **{name: grads[name] for name in operands}}


def run(operands: dict[str, Any], packed: Any, cotangents: Any, implementation: Any) -> dict[str, jax.Array]:
    """Outputs, the last state and gradients of one implementation."""

    @jax.jit
    def pulled(operands: dict[str, Any], packed: Any, cotangents: Any) -> dict[str, jax.Array]:
        def call(operands: dict[str, Any]) -> Any:
            return ssd(**operands, segment_ids=packed, implementation=implementation)

        (out, after), pull = jax.vjp(call, operands)
        return {"out": out, "after": after, **pull(cotangents)[0]}

    return pulled(operands, packed, cotangents)


def compare(case: Case, implementation: Any, dtype: Any, tolerance: float) -> None:
    """Compare with the truth, relative to the largest value of each; gradients sum over more, with five times less."""
    operands = make(case, dtype)
    packed = ids(case.batch, case.time) if case.packed else None
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(operands["x"].shape), dtype)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    d_after = jnp.asarray(rng.standard_normal((case.batch, case.heads, case.dim, case.size)), wide)
    got = run(operands, None if packed is None else jnp.asarray(packed), (d_out, d_after), implementation)
    expected = truth(operands, packed, np.asarray(d_out, np.float64), np.asarray(d_after))
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a = got[name]
        assert a.dtype == (wide if name == "after" else jnp.dtype(dtype))
        assert a.shape == b.shape
        error = np.abs(np.asarray(a, np.float64) - b).max()
        bound = tolerance * (1 if name in ("out", "after") else 5)
        assert error < bound * max(1.0, np.abs(b).max()), f"{name}: {error}"


@pytest.mark.thin(2)
@pytest.mark.parametrize(("name", "implementation"), RUNS, ids=[name for name, _ in RUNS])
def test_values_and_gradients(name: str, implementation: Any) -> None:
    """A Mamba layer trains and decodes wrongly if a chunk's decays, carries or resets are off by one token."""
    compare(CASES[name.split(",", maxsplit=1)[0]], implementation, jnp.float32, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", SMALL], ids=["reference", "blocked"])
def test_bfloat16(implementation: Any) -> None:
    """16-bit operands keep their dtype; the state and the sums are float32."""
    compare(CASES["packed after a state"], implementation, jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("implementation", ["reference", SMALL], ids=["reference", "blocked"])
def test_float64(implementation: Any) -> None:
    """Float64 inputs are not computed in float32 on the way."""
    with jax.enable_x64(True):
        compare(CASES["packed after a state"], implementation, jnp.float64, 1e-12)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Shapes and chunks nobody thought of agree with the truth."""
    groups = data.draw(st.integers(1, 2))
    case = Case(
        time=data.draw(st.integers(1, 70)),
        heads=groups * data.draw(st.integers(1, 2)),
        groups=groups,
        dim=data.draw(st.integers(1, 3)),
        size=data.draw(st.integers(1, 3)),
        d=data.draw(st.booleans()),
        state=data.draw(st.booleans()),
        packed=data.draw(st.booleans()),
        batch=data.draw(st.integers(1, 3)),
    )
    compare(case, configured("blocked", chunk=data.draw(st.integers(1, 80))), jnp.float32, 1e-5)


def test_decays_after_strong_ones_keep_their_precision() -> None:
    """One token that forgets everything must not blur the decays of its chunk: sums of logarithms are exact."""
    time = 64
    dt = np.full((1, time, 1), 1e-3, np.float32)
    dt[0, 5:9] = 3e4
    x, b = np.ones((1, time, 1, 1), np.float32), np.ones((1, time, 1, 1), np.float32)
    operands = {"x": x, "dt": dt, "a": np.float32([-1.0]), "b": b, "c": b}
    expected = truth(operands, None, x, np.zeros((1, 1, 1, 1)))["out"]
    got, _ = ssd(*map(jnp.asarray, operands.values()), implementation="blocked")
    np.testing.assert_allclose(got, expected, rtol=2e-6)


def test_steps_continue_a_sequence() -> None:
    """Decoding token by token after a prefill gives what one pass over everything gives."""
    case = Case(40, heads=4, groups=2, d=True, state=True)
    operands = make(case)
    out, after = ssd(**operands)
    parts = {name: operands[name] for name in ("x", "dt", "b", "c")}
    found, state = ssd(
        **{name: x[:, :33] for name, x in parts.items()}, **{n: operands[n] for n in ("a", "d", "state")}
    )
    found = [found]
    for t in range(33, 40):
        now = {name: x[:, t] for name, x in parts.items()}
        y, state = ssd_step(**now, a=operands["a"], d=operands["d"], state=state)
        found.append(y[:, None])
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), out, atol=1e-5)
    np.testing.assert_allclose(state, after, atol=1e-5)


def test_every_derivative() -> None:
    """Forward mode and curvature pass through both implementations alike."""
    operands = make(Case(9))

    def curvature(implementation: Any) -> jax.Array:
        def objective(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(ssd(**{**operands, "b": x}, implementation=implementation)[0]))

        return jax.jit(lambda x: jax.jvp(jax.grad(objective), (x,), (jnp.ones_like(x),))[1])(operands["b"])

    np.testing.assert_allclose(curvature(SMALL), curvature("reference"), atol=2e-4)


def test_training_memory_is_chunks_not_states_of_every_token() -> None:
    """Long sequences train: the backward pass does not keep a state per token as the plain recurrence does."""

    def temporaries(implementation: str) -> int:
        shapes = {name: x.shape for name, x in make(Case(512, dim=32, size=32)).items()}

        def loss(operands: Any) -> jax.Array:
            return jnp.sum(ssd(**operands, implementation=implementation)[0])

        operands = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return jax.jit(jax.grad(loss)).lower(operands).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("blocked") * 2 < temporaries("reference")


X, DT, A, B = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4, 4)), -jnp.ones(4), jnp.ones((1, 4, 2, 3))
BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("rank", (X[0], DT, A, B, B), {}, r"x \(4, 4, 8\).*expected \[batch, time, heads, dim\]"),
    ("groups", (X, DT, A, jnp.ones((1, 4, 3, 3)), B), {}, "heads 4 must be a multiple of groups 3"),
    ("no groups", (X, DT, A, B[:, :, :0], B), {}, "groups 0"),
    ("dt", (X, DT[:, :3], A, B, B), {}, r"dt has shape \(1, 3, 4\); expected \[batch, time, heads\] = \(1, 4, 4\)"),
    ("a", (X, DT, A[:2], B, B), {}, r"a has shape \(2,\)"),
    ("b", (X, DT, A, B[:, :3], B), {}, r"b has shape \(1, 3, 2, 3\)"),
    ("c", (X, DT, A, B, B[..., :2]), {}, r"c has shape \(1, 4, 2, 2\)"),
    ("d", (X, DT, A, B, B), {"d": jnp.ones(3)}, r"d has shape \(3,\)"),
    ("state", (X, DT, A, B, B), {"state": jnp.ones((1, 4, 3, 8))}, r"= \(1, 4, 8, 3\)"),
    ("ids", (X, DT, A, B, B), {"segment_ids": jnp.ones((1, 3), int)}, r"\[batch, time\] = \(1, 4\)"),
    ("implementation", (X, DT, A, B, B), {"implementation": "chunk"}, "'chunk'; expected one of"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(ValueError, match=message):
        ssd(*arrays, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_types() -> None:
    """Integers and float ids are refused."""
    with pytest.raises(TypeError, match="x has dtype int32; expected a float"):
        ssd(X.astype(int), DT, A, B, B)
    with pytest.raises(TypeError, match="segment_ids have dtype float32"):
        ssd(X, DT, A, B, B, segment_ids=jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="state has shape"):
        ssd_step(X[:, 0], DT[:, 0], A, B[:, 0], B[:, 0], state=jnp.ones((1, 4, 3, 8)))
