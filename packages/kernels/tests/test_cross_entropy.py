"""Linear cross-entropy against its closed form in float64 NumPy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import linear_cross_entropy
from dovetail_protocols import QuantizedArray


class Case(NamedTuple):
    rows: int
    vocab: int
    features: int = 4
    chunk: int | None = None
    bias: bool = False
    softcap: float | None = None
    weighted: bool = False


CASES = [
    Case(5, 1),
    Case(1, 7),
    Case(10, 7, chunk=1, bias=True),
    Case(10, 7, chunk=3, weighted=True),
    Case(10, 7, chunk=10),
    Case(10, 7, chunk=99, softcap=2.0),
    Case(300, 2047, features=8, chunk=128, bias=True, weighted=True, softcap=3.0),
    Case(9, 32000, chunk=4, weighted=True),
    Case(90, 50257),
]


def make(case: Case, seed: int = 0) -> dict[str, np.ndarray | None]:
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.standard_normal((case.rows, case.features)),
        "weight": rng.standard_normal((case.features, case.vocab)),
        "bias": rng.standard_normal(case.vocab) if case.bias else None,
        "targets": rng.integers(0, case.vocab, case.rows).astype(np.int32),
        "loss_weights": rng.choice([0.0, 0.5, 1.0, 3.0], case.rows).astype(np.float32) if case.weighted else None,
    }


def truth(case: Case, x: dict[str, Any], upstream: float) -> dict[str, np.ndarray]:
    """Loss and gradients times `upstream`."""
    weights = np.ones(case.rows) if x["loss_weights"] is None else x["loss_weights"].astype(np.float64)
    raw = x["hidden"] @ x["weight"] + (0 if x["bias"] is None else x["bias"])
    z = raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)
    z = z - z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    at = np.arange(case.rows), x["targets"]
    dz = np.exp(log_p)
    dz[at] -= 1
    dz *= weights[:, None] * upstream
    if case.softcap is not None:
        dz /= np.cosh(raw / case.softcap) ** 2
    return {
        "loss": -(log_p[at] * weights).sum() * upstream,
        "hidden": dz @ x["weight"].T,
        "weight": x["hidden"].T @ dz,
        "bias": dz.sum(axis=0),
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(case: Case, x: dict[str, Any], upstream: jax.Array, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    floats = {k: x[k].astype(dtype) for k in ("hidden", "weight", "bias") if x[k] is not None}

    def loss(floats: dict[str, jax.Array]) -> jax.Array:
        options = {"loss_weights": x["loss_weights"], "softcap": case.softcap, "chunk": case.chunk}
        total = linear_cross_entropy(
            floats["hidden"], floats["weight"], x["targets"], bias=floats.get("bias"), **options
        )
        return total * upstream

    value, gradients = jax.value_and_grad(loss)(floats)
    return {"loss": value, **gradients}


def compare(case: Case, dtype: Any = jnp.float32, tolerance: float = 1e-5, seed: int = 0) -> None:
    x = make(case, seed)
    rounded = {
        k: np.asarray(jnp.asarray(v, dtype), np.float64) if v is not None and v.dtype == np.float64 else v
        for k, v in x.items()
    }
    arrays = {
        k: None if v is None else jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else v.dtype)
        for k, v in rounded.items()
    }
    got = run(case, arrays, jnp.float32(-2.5), dtype)
    expected = truth(case, rounded, -2.5)
    for name, value in got.items():
        want = expected[name]
        error = np.abs(np.asarray(value, np.float64) - want).max() / max(1.0, np.abs(want).max())
        assert error < tolerance, f"{name}: {error}"
        assert value.dtype == (jnp.float32 if name == "loss" else jnp.dtype(dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_closed_form(case: Case) -> None:
    """A wrong loss or gradient (scaled by an upstream cotangent) for some vocabulary, chunk or option."""
    compare(case)


@pytest.mark.parametrize("case", [Case(40, 100, chunk=16, bias=True, weighted=True), Case(6, 7, softcap=1.5)], ids=str)
def test_bfloat16(case: Case) -> None:
    """16-bit operands: float32 logits and loss, gradients in the operands' dtype."""
    compare(case, jnp.bfloat16, 2e-2)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        rows=st.integers(1, 12),
        vocab=st.integers(1, 9),
        features=st.integers(1, 3),
        chunk=st.none() | st.integers(1, 13),
        bias=st.booleans(),
        softcap=st.none() | st.floats(0.5, 30),
        weighted=st.booleans(),
    ),
    seed=st.integers(0, 99),
)
def test_any_shape(case: Case, seed: int) -> None:
    """Shapes and chunk sizes nobody thought of."""
    compare(case, seed=seed)


@pytest.mark.parametrize("chunk", [None, 2])
def test_rows_of_weight_zero_may_hold_anything(chunk: int | None) -> None:
    """Padding with ids of -100, NaN or infinity must not touch the loss or any gradient."""
    case = Case(6, 11, bias=True, chunk=chunk)
    x: dict[str, Any] = make(case)
    x["loss_weights"] = np.array([1, 0, 2, 0, 0, 1], np.float32)
    expected = truth(case, x, 1.0)
    arrays = {k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else v.dtype) for k, v in x.items()}
    arrays["targets"] = arrays["targets"].at[jnp.array([1, 3, 4])].set(jnp.array([-100, 2**31 - 1, 11], jnp.int32))
    arrays["hidden"] = arrays["hidden"].at[1].set(jnp.nan).at[3].set(jnp.inf).at[4].set(1e38)
    got = run(case, arrays, jnp.float32(1))
    for name, value in got.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("target", [-1, -100, 11, 2**31 - 1])
def test_a_target_outside_the_vocabulary_shows(target: int) -> None:
    """A wrong tokenizer gives NaN at once, not a plausible loss of some other token."""
    loss = linear_cross_entropy(jnp.ones((2, 3)), jnp.ones((3, 11)), jnp.array([1, target], jnp.int32))
    assert np.isnan(loss)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_any_integer_targets(dtype: Any) -> None:
    """Narrow target dtypes work with vocabularies larger than their range."""
    hidden, weight = jnp.ones((2, 3)), jnp.arange(3 * 300.0).reshape(3, 300) / 300
    expected = linear_cross_entropy(hidden, weight, jnp.array([1, 100], jnp.int32))
    assert linear_cross_entropy(hidden, weight, jnp.array([1, 100], dtype)) == expected


def test_large_logits() -> None:
    """The loss is finite and right when logits are huge."""
    hidden, weight = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0, 0.0, -1.0]])
    loss, gradient = jax.value_and_grad(linear_cross_entropy)(hidden, weight, jnp.array([0, 0]))
    assert loss == 2e4
    np.testing.assert_allclose(gradient, [[0], [-2]])


def test_quantized_weight() -> None:
    """A quantized unembedding gives the loss of its dequantized values and a gradient of the hidden states."""
    x = make(Case(6, 8))
    qvalue = jnp.asarray(np.round(np.asarray(x["weight"]) * 20), jnp.float32).astype(jnp.int8)
    weight = QuantizedArray.checked(qvalue, jnp.full((1, 8), 0.05), None, jnp.float32)
    hidden, targets = jnp.asarray(x["hidden"], jnp.float32), jnp.asarray(x["targets"])
    value = jax.value_and_grad(linear_cross_entropy)
    for got, expected in zip(value(hidden, weight, targets), value(hidden, weight.dequantize(), targets), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_mixed_dtypes() -> None:
    """Activations in bfloat16 with float32 parameters: each gradient has its operand's dtype."""
    hidden, weight = jnp.ones((3, 2), jnp.bfloat16), jnp.ones((2, 5))
    bias = jnp.zeros((5,))

    def loss(h: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        return linear_cross_entropy(h, w, jnp.array([0, 1, 2]), bias=b)

    value, (dh, dw, db) = jax.value_and_grad(loss, argnums=(0, 1, 2))(hidden, weight, bias)
    np.testing.assert_allclose(value, 3 * np.log(5), rtol=1e-6)
    assert (dh.dtype, dw.dtype, db.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


def test_empty() -> None:
    """No rows have no loss, and zero gradients."""
    value, gradient = jax.value_and_grad(linear_cross_entropy, argnums=1)(
        jnp.ones((0, 3)), jnp.ones((3, 5)), jnp.zeros((0,), jnp.int32)
    )
    assert value == 0
    assert not np.asarray(gradient).any()


def total(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
    return linear_cross_entropy(hidden, weight, targets, chunk=4)


def test_composes() -> None:
    """Under vmap, remat, the partitioner and shard_map (weights replicated) gradients are those of plain jit."""
    x = make(Case(32, 11))
    operands = [jnp.asarray(x["hidden"], jnp.float32), jnp.asarray(x["weight"], jnp.float32), jnp.asarray(x["targets"])]
    gradient = jax.grad(total, argnums=(0, 1))
    plain = jax.jit(gradient)(*operands)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(operands, (rows, whole, rows), strict=True)]
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, whole))

    def batched(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
        split = (hidden.reshape(4, 8, -1), weight, targets.reshape(4, 8))
        return jnp.sum(jax.vmap(total, in_axes=(0, None, 0))(*split))

    others = {
        "remat": jax.jit(jax.grad(jax.checkpoint(total), argnums=(0, 1)))(*operands),
        "partitioner": jax.jit(gradient)(*placed),
        "shard_map": jax.jit(mapped)(*operands),
        "vmap": jax.jit(jax.grad(batched, argnums=(0, 1)))(*operands),
    }
    for name, other in others.items():
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)


def test_memory() -> None:
    """The full logits are never in memory: temporaries of the gradient stay far below them."""
    rows, features, vocab = 4096, 8, 20000
    shapes = (
        jax.ShapeDtypeStruct((rows, features), jnp.float32),
        jax.ShapeDtypeStruct((features, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )
    gradient = jax.jit(jax.grad(functools.partial(linear_cross_entropy, chunk=64), argnums=(0, 1)))
    analysis = gradient.lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < rows * vocab * 4 / 10


def test_devices_share_the_chunks() -> None:
    """With rows over devices each computes its share of every chunk's logits, not all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    gradient = jax.jit(jax.grad(functools.partial(linear_cross_entropy, chunk=64), argnums=(0, 1)))

    def flops(rows: NamedSharding, whole: NamedSharding) -> float:
        shapes = (
            jax.ShapeDtypeStruct((1024, 16), jnp.float32, sharding=rows),
            jax.ShapeDtypeStruct((16, 100), jnp.float32, sharding=whole),
            jax.ShapeDtypeStruct((1024,), jnp.int32, sharding=rows),
        )
        return gradient.lower(*shapes).compile().cost_analysis()["flops"]

    whole = NamedSharding(mesh, PartitionSpec())
    assert flops(NamedSharding(mesh, PartitionSpec("data")), whole) < flops(whole, whole) / 6


H, W, Y = jnp.ones((4, 3)), jnp.ones((3, 5)), jnp.zeros((4,), jnp.int32)
BAD: list[tuple[str, Any, dict[str, Any], Any, str]] = [
    ("rank", (H[0], W, Y), {}, ValueError, r"hidden \(3,\)"),
    ("features", (H, jnp.ones((2, 5)), Y), {}, ValueError, r"hidden \(4, 3\), weight \(2, 5\)"),
    ("no vocabulary", (H, jnp.ones((3, 0)), Y), {}, ValueError, "vocab > 0"),
    ("target shape", (H, W, Y[:3]), {}, ValueError, r"targets has shape \(3,\); expected \(4,\)"),
    ("target dtype", (H, W, jnp.ones(4)), {}, TypeError, "float32; expected integers"),
    ("weights", (H, W, Y), {"loss_weights": jnp.ones(5)}, ValueError, "loss_weights"),
    ("bias", (H, W, Y), {"bias": jnp.ones(4)}, ValueError, r"bias has shape \(4,\); expected \(5,\)"),
    ("chunk", (H, W, Y), {"chunk": 0}, ValueError, "chunk=0"),
    ("softcap", (H, W, Y), {"softcap": 0.0}, ValueError, "softcap=0"),
    ("softcap nan", (H, W, Y), {"softcap": float("nan")}, ValueError, "softcap=nan"),
    ("hidden dtype", (H.astype(jnp.int32), W, Y), {}, TypeError, "hidden has dtype int32"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, error: Any, message: str) -> None:
    """A wrong shape, dtype or option is refused with its value."""
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arrays, **options)
