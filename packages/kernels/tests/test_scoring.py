"""Log-probabilities and entropies from hidden states against float64 NumPy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_kernels import configured, logprobs, token_logprobs
from dovetail_kernels._dtypes import exact
from dovetail_protocols import QuantizedArray

SMALL = configured("blocked", chunk=3, bands=2)


class Case(NamedTuple):
    rows: int
    vocab: int
    temperature: float = 1.0
    bias: bool = False
    softcap: float | None = None


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    floats = {"hidden": rng.standard_normal((case.rows, 4)), "weight": rng.standard_normal((4, case.vocab))}
    if case.bias:
        floats["bias"] = rng.standard_normal(case.vocab)
    return floats


def tokens(case: Case) -> np.ndarray:
    return np.random.default_rng(5).integers(0, case.vocab, case.rows).astype(np.int32)


def cotangents(case: Case) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, case.rows))


def truth(case: Case, x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    raw = x["hidden"] @ x["weight"] + x.get("bias", 0.0)
    z = (raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)) / case.temperature
    z = z - z.max(1, keepdims=True)
    every = z - np.log(np.exp(z).sum(1, keepdims=True))
    p, at = np.exp(every), (np.arange(case.rows), tokens(case))
    entropy = -(p * every).sum(1)
    hit = np.zeros(z.shape)
    hit[at] = 1
    first, second = cotangents(case)[..., None]
    dz = (first * (hit - p) - second * p * (every + entropy[:, None])) / case.temperature
    if case.softcap is not None:
        dz /= np.cosh(raw / case.softcap) ** 2
    found = {"logprobs": every[at], "entropy": entropy, "hidden": dz @ x["weight"].T, "weight": x["hidden"].T @ dz}
    return {**found, "bias": dz.sum(0)}


def compare(case: Case, implementation: Any, dtype: Any = jnp.float32, tolerance: float = 1e-5, seed: int = 0) -> None:
    operands = {name: jnp.asarray(x, dtype) for name, x in make(case, seed).items()}

    @jax.jit
    def run(operands: dict[str, jax.Array], ids: jax.Array, cotangents: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
        def call(operands: dict[str, jax.Array]) -> Any:
            how = {"temperature": case.temperature, "softcap": case.softcap, "entropy": True}
            return token_logprobs(**operands, tokens=ids, **how, implementation=implementation)

        found, pull = jax.vjp(call, operands)
        return {**found._asdict(), **pull(type(found)(*cotangents))[0]}

    wide = tuple(jnp.asarray(x, exact(dtype)) for x in cotangents(case))
    expected = truth(case, {name: np.asarray(x, np.float64) for name, x in operands.items()})
    for name, value in run(operands, jnp.asarray(tokens(case)), wide).items():
        error = np.abs(np.asarray(value, np.float64) - expected[name]).max() / max(1, np.abs(expected[name]).max())
        assert error < tolerance, f"{name}: {error}"
        assert value.dtype == (exact(dtype) if name in ("logprobs", "entropy") else jnp.dtype(dtype))


CASES = [
    (Case(1, 1), "blocked"),
    (Case(7, 9), SMALL),
    (Case(7, 9, 0.7, True, 2.0), SMALL),
    (Case(7, 9, 0.7, True, 2.0), "reference"),
    (Case(5, 2047, 1.3), "blocked"),
    (Case(90, 50257), "blocked"),
]


@pytest.mark.parametrize(("case", "implementation"), CASES, ids=str)
def test_closed_form(case: Case, implementation: Any) -> None:
    """Policy gradients and entropy bonuses pull in the wrong direction if a gradient is wrong."""
    compare(case, implementation)


@pytest.mark.parametrize("implementation", [SMALL, "reference"], ids=str)
def test_other_dtypes(implementation: Any) -> None:
    """16-bit operands are scored in float32, float64 ones in float64."""
    compare(Case(7, 9, 0.7, True, 2.0), implementation, jnp.bfloat16, 2e-2)
    with jax.enable_x64(True):
        compare(Case(7, 9, 0.7, True, 2.0), implementation, jnp.float64, 1e-13)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        st.integers(1, 12),
        st.integers(1, 9),
        st.floats(0.2, 5),
        st.booleans(),
        st.one_of(st.none(), st.floats(0.5, 5)),
    ),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 13),
)
def test_any_shape(case: Case, seed: int, chunk: int) -> None:
    """Shapes and chunk sizes nobody thought of."""
    compare(case, configured("blocked", chunk=chunk), seed=seed)


def operands(rows: int = 32, vocab: int = 20) -> tuple[jax.Array, jax.Array, jax.Array]:
    case = Case(rows, vocab)
    x = make(case)
    return jnp.asarray(x["hidden"], jnp.float32), jnp.asarray(x["weight"], jnp.float32), jnp.asarray(tokens(case))


@pytest.mark.parametrize("implementation", [SMALL, "reference"], ids=str)
def test_a_sampler_reports_the_same(implementation: Any) -> None:
    """Importance ratios of reinforcement learning are 1 where the policy is the one that sampled."""
    hidden, weight, ids = operands()
    for temperature in (1.0, 0.6):
        got = token_logprobs(hidden * 3, weight, ids, temperature=temperature, implementation=implementation)
        np.testing.assert_allclose(got, logprobs(hidden * 3 @ weight / temperature, ids), atol=1e-5)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_impossible_and_unknown_tokens(implementation: str) -> None:
    """A forbidden token has -inf and leaves the entropy finite; an unknown id gives NaN."""
    hidden, weight = jnp.zeros((3, 2)), jnp.ones((2, 4))
    bias, ids = jnp.array([0.0, -jnp.inf, 0.0, -jnp.inf]), jnp.array([0, 1, 9])

    found = token_logprobs(hidden, weight, ids, bias=bias, entropy=True, implementation=implementation)
    np.testing.assert_allclose(found.logprobs, [-np.log(2), -np.inf, np.nan], rtol=1e-6)
    np.testing.assert_allclose(found.entropy, np.full(3, np.log(2)), rtol=1e-6)


def test_empty_and_quantized() -> None:
    """No tokens have no numbers; a quantized layer counts as its values and has no gradient."""
    empty = token_logprobs(jnp.ones((0, 2)), jnp.ones((2, 3)), jnp.zeros((0,), jnp.int32), entropy=True)
    assert (empty.logprobs.shape, empty.entropy.shape) == ((0,), (0,))
    hidden, weight, ids = operands(6, 8)
    quantized = QuantizedArray.checked((weight * 20).astype(jnp.int8), jnp.full((1, 8), 0.05), None, jnp.float32)
    np.testing.assert_array_equal(
        token_logprobs(hidden, quantized, ids), token_logprobs(hidden, quantized.dequantize(), ids)
    )


def objective(hidden: jax.Array, weight: jax.Array, ids: jax.Array, axis: str | None = None) -> jax.Array:
    found = token_logprobs(hidden, weight, ids, entropy=True, vocab_axis=axis, implementation=SMALL)
    return jnp.sum(jnp.sin(found.logprobs) + found.entropy**2)


def test_composes() -> None:
    """Under remat, vmap, and over a mesh (rows and vocabulary sharded) the gradients are those of one device."""
    x = operands()
    gradient = jax.grad(objective, argnums=(0, 1))
    plain = jax.jit(gradient)(*x)
    remat = jax.jit(jax.grad(jax.checkpoint(objective), argnums=(0, 1)))(*x)

    def batched(hidden: jax.Array, weight: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(jax.vmap(objective, (0, None, 0))(hidden.reshape(4, 8, -1), weight, ids.reshape(4, 8)))

    mapped = jax.jit(jax.grad(batched, argnums=(0, 1)))(*x)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, vocab = jax.P("data"), jax.P(None, "model")
    own = jax.grad(functools.partial(objective, axis="model"), argnums=(0, 1))
    sharded = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(rows, vocab, rows), out_specs=(rows, vocab)))(*x)
    for other in (remat, mapped, sharded):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


def test_memory() -> None:
    """A long rollout is scored and trained on without its logits in memory."""
    shapes = (
        jax.ShapeDtypeStruct((4096, 8), jnp.float32),
        jax.ShapeDtypeStruct((8, 20000), jnp.float32),
        jax.ShapeDtypeStruct((4096,), jnp.int32),
    )

    def total(*operands: jax.Array) -> jax.Array:
        return jnp.sum(token_logprobs(*operands, implementation=configured("blocked", chunk=64)))

    analysis = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4096 * 20000 * 4 / 10


H, W, Y = jnp.ones((4, 3)), jnp.ones((3, 5)), jnp.zeros((4,), jnp.int32)
BAD: list[tuple[str, Any, dict[str, Any], Any, str]] = [
    ("features", (H, jnp.ones((2, 5)), Y), {}, ValueError, r"hidden \(4, 3\), weight \(2, 5\)"),
    ("token shape", (H, W, Y[:3]), {}, ValueError, r"tokens has shape \(3,\); expected \(4,\)"),
    ("token dtype", (H, W, jnp.ones(4)), {}, TypeError, "float32; expected integers"),
    ("temperature", (H, W, Y), {"temperature": 0.0}, ValueError, "temperature=0.0; expected a finite positive"),
    ("softcap", (H, W, Y), {"softcap": -1.0}, ValueError, "softcap=-1.0"),
    ("axis", (H, W, Y), {"vocab_axis": "model"}, ValueError, "vocab_axis='model'"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, error: Any, message: str) -> None:
    """A wrong shape, dtype or option is refused with its value."""
    with pytest.raises(error, match=message):
        token_logprobs(*arrays, **options)
