"""The gated delta rule against a float64 NumPy loop with gradients by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_kernels import configured, gated_delta_rule, gated_delta_step
from dovetail_kernels.delta_rule import inverse

SMALL = configured("blocked", chunk=5)


class Case(NamedTuple):
    """One call."""

    time: int
    heads: int = 2
    key_heads: int = 1
    key_dim: int = 4
    value_dim: int = 3
    scale: float | None = None
    state: bool = False
    packed: bool = False
    strength: float = 1.0
    batch: int = 2


CASES = {
    "one token": Case(1, state=True),
    "a chunk": Case(64, scale=-0.7),
    "a chunk and one": Case(65, heads=4, key_heads=2, state=True),
    "three chunks and some": Case(149, heads=3, key_heads=3, key_dim=1, value_dim=1),
    "packed": Case(70, heads=4, key_heads=2, packed=True),
    "packed after a state": Case(70, heads=4, key_heads=1, state=True, packed=True),
    "strong decays": Case(70, strength=3000.0, state=True, packed=True),
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
    """Return the operands, keys of length 1; a few decays are `strength` times as strong as the others."""
    rng = np.random.default_rng(seed)
    tokens = (case.batch, case.time)
    shapes = {
        "query": (*tokens, case.key_heads, case.key_dim),
        "key": (*tokens, case.key_heads, case.key_dim),
        "value": (*tokens, case.heads, case.value_dim),
        "log_decay": (*tokens, case.heads),
        "beta": (*tokens, case.heads),
        "state": (case.batch, case.heads, case.key_dim, case.value_dim),
    }
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    drawn["key"] /= np.linalg.norm(drawn["key"], axis=-1, keepdims=True)
    drawn["log_decay"] = -np.exp(drawn["log_decay"] - 2) * min(1, case.strength)
    drawn["log_decay"] *= np.where(rng.random((*tokens, case.heads)) < 0.1, max(1, case.strength), 1)
    drawn["beta"] = 1 / (1 + np.exp(drawn["beta"]))
    return {name: jnp.asarray(x, dtype) for name, x in drawn.items() if name != "state" or case.state}


def truth(operands: dict[str, Any], packed: Any, scale: float, d_out: Any, d_after: Any) -> dict[str, np.ndarray]:
    """Outputs, the last state and gradients, one row and token after the other."""
    wide = {name: np.asarray(value, np.float64) for name, value in operands.items()}
    query, key, value, decay, beta = (wide[name] for name in ("query", "key", "value", "log_decay", "beta"))
    (batch, time, heads, value_dim), (groups, key_dim) = value.shape, key.shape[2:]
    state = wide.get("state", np.zeros((batch, heads, key_dim, value_dim)))
    which = np.arange(heads) // (heads // groups)
    grads = {name: np.zeros_like(x) for name, x in wide.items()} | {"state": np.zeros_like(state)}
    out, after = np.zeros_like(value), np.zeros_like(state)
    for row in range(batch):
        now, last, trace = state[row], None, []
        for t in range(time):
            if packed is not None and packed[row, t] == 0:
                continue
            fresh = packed is not None and last is not None and packed[row, t] != last
            last = None if packed is None else packed[row, t]
            before = np.zeros_like(now) if fresh else now
            kept = np.exp(decay[row, t])[:, None, None] * before
            q, k = query[row, t, which], key[row, t, which]
            wrong = value[row, t] - np.einsum("hkv,hk->hv", kept, k)
            now = kept + np.einsum("h,hk,hv->hkv", beta[row, t], k, wrong)
            out[row, t] = scale * np.einsum("hkv,hk->hv", now, q)
            trace.append((t, fresh, before, kept, now, q, k, wrong))
        after[row], back = now, np.asarray(d_after[row], np.float64)
        for t, fresh, _, kept, now, q, k, wrong in reversed(trace):
            dy, strength = np.asarray(d_out[row, t], np.float64), beta[row, t]
            np.add.at(grads["query"][row, t], which, scale * np.einsum("hkv,hv->hk", now, dy))
            back = back + scale * np.einsum("hk,hv->hkv", q, dy)
            d_wrong = strength[:, None] * np.einsum("hkv,hk->hv", back, k)
            grads["beta"][row, t] = np.einsum("hkv,hk,hv->h", back, k, wrong)
            grads["value"][row, t] = d_wrong
            d_key = strength[:, None] * np.einsum("hkv,hv->hk", back, wrong) - np.einsum("hkv,hv->hk", kept, d_wrong)
            np.add.at(grads["key"][row, t], which, d_key)
            back = back - np.einsum("hk,hv->hkv", k, d_wrong)
            grads["log_decay"][row, t] = (back * kept).sum((1, 2))
            back = np.zeros_like(back) if fresh else np.exp(decay[row, t])[:, None, None] * back
        grads["state"][row] = back
    return {"out": out, "after": after, **{name: grads[name] for name in operands}}


def run(
    operands: dict[str, Any], packed: Any, scale: Any, cotangents: Any, implementation: Any
) -> dict[str, jax.Array]:
    """Outputs, the last state and gradients of one implementation."""

    @jax.jit
    def pulled(operands: dict[str, Any], packed: Any, cotangents: Any) -> dict[str, jax.Array]:
        def call(operands: dict[str, Any]) -> Any:
            return gated_delta_rule(**operands, scale=scale, segment_ids=packed, implementation=implementation)

        (out, after), pull = jax.vjp(call, operands)
        return {"out": out, "after": after, **pull(cotangents)[0]}

    return pulled(operands, packed, cotangents)


def compare(case: Case, implementation: Any, dtype: Any, tolerance: float) -> None:
    """Compare with the truth, relative to the largest value of each; gradients sum over more, with five times less."""
    operands = make(case, dtype)
    packed = ids(case.batch, case.time) if case.packed else None
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(operands["value"].shape), dtype)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    d_after = jnp.asarray(rng.standard_normal((case.batch, case.heads, case.key_dim, case.value_dim)), wide)
    got = run(operands, None if packed is None else jnp.asarray(packed), case.scale, (d_out, d_after), implementation)
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    expected = truth(operands, packed, scale, np.asarray(d_out, np.float64), np.asarray(d_after))
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
    """A layer trains and decodes wrongly if a chunk's decays, carries or resets are off by one token."""
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
        key_heads=groups,
        key_dim=data.draw(st.integers(1, 3)),
        value_dim=data.draw(st.integers(1, 3)),
        state=data.draw(st.booleans()),
        packed=data.draw(st.booleans()),
        batch=data.draw(st.integers(1, 3)),
    )
    compare(case, configured("blocked", chunk=data.draw(st.integers(1, 80))), jnp.float32, 1e-5)


@pytest.mark.parametrize("size", [1, 7, 8, 40, 64])
def test_inverse(size: int) -> None:
    """The corrections of a chunk stay exact for the worst keys, all the same: powers of the matrix would explode."""
    lower = np.tril(np.ones((size, size), np.float32), -1)
    expected = np.linalg.inv(np.eye(size) + lower.astype(np.float64))
    np.testing.assert_allclose(inverse(jnp.asarray(lower)[None])[0], expected, atol=1e-6)


def test_repeated_keys_overwrite() -> None:
    """With one key, full strength and no decay, the state holds the last value exactly."""
    key, value = jnp.ones((1, 100, 1, 1)), jnp.arange(100.0).reshape(1, 100, 1, 1)
    one = jnp.ones((1, 100, 1))
    out, state = gated_delta_rule(key, key, value, 0 * one, one, implementation="blocked")
    np.testing.assert_allclose(out, value, atol=1e-4)
    assert float(state[0, 0, 0, 0]) == pytest.approx(99, abs=1e-4)


def test_steps_continue_a_sequence() -> None:
    """Decoding token by token after a prefill gives what one pass over everything gives."""
    operands = make(Case(37, heads=4, key_heads=2, state=True))
    out, after = gated_delta_rule(**operands)
    start = operands.pop("state")
    head, state = gated_delta_rule(**{name: x[:, :33] for name, x in operands.items()}, state=start)
    found = [head]
    for t in range(33, 37):
        y, state = gated_delta_step(**{name: x[:, t] for name, x in operands.items()}, state=state)
        found.append(y[:, None])
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), out, atol=1e-5)
    np.testing.assert_allclose(state, after, atol=1e-5)


def test_every_derivative() -> None:
    """Forward mode and curvature pass through both implementations alike."""
    operands = make(Case(9))

    def curvature(implementation: Any) -> jax.Array:
        def objective(key: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(gated_delta_rule(**{**operands, "key": key}, implementation=implementation)[0]))

        tangent = jnp.ones_like(operands["key"])
        return jax.jit(lambda x: jax.jvp(jax.grad(objective), (x,), (tangent,))[1])(operands["key"])

    np.testing.assert_allclose(curvature(SMALL), curvature("reference"), atol=2e-4)


Q, V, G = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 4, 3)), jnp.ones((1, 4, 4))
BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("rank", (Q[0], Q, V, G, G), {}, r"query \(4, 2, 8\).*expected \[batch, time, key_heads, key_dim\]"),
    ("heads", (Q, Q, V[:, :, :3], G, G), {}, "heads 3 must be a multiple of key_heads 2"),
    ("no heads", (Q[:, :, :0], Q, V, G, G), {}, "key_heads 0"),
    ("key", (Q, Q[..., :3], V, G, G), {}, r"key has shape \(1, 4, 2, 3\)"),
    ("value", (Q, Q, V[:, :3], G, G), {}, r"value has shape \(1, 3, 4, 3\)"),
    ("log decay", (Q, Q, V, G[:, :3], G), {}, r"log_decay has shape .* \[batch, time, heads\] = \(1, 4, 4\)"),
    ("beta", (Q, Q, V, G, G[..., :1]), {}, r"beta has shape \(1, 4, 1\)"),
    ("state", (Q, Q, V, G, G), {"state": jnp.ones((1, 4, 3, 8))}, r"= \(1, 4, 8, 3\)"),
    ("ids", (Q, Q, V, G, G), {"segment_ids": jnp.ones((1, 3), int)}, r"\[batch, time\] = \(1, 4\)"),
    ("implementation", (Q, Q, V, G, G), {"implementation": "chunk"}, "'chunk'; expected one of"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(*arrays, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_types() -> None:
    """Integers are refused, and a step's state must fit."""
    with pytest.raises(TypeError, match="key has dtype int32; expected a float"):
        gated_delta_rule(Q, Q.astype(int), V, G, G)
    with pytest.raises(ValueError, match="state has shape"):
        gated_delta_step(Q[:, 0], Q[:, 0], V[:, 0], G[:, 0], G[:, 0], state=jnp.ones((1, 4, 3, 8)))
