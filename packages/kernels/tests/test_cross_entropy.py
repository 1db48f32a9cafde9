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

from dovetail_kernels import CrossEntropyOptions, configured, linear_cross_entropy
from dovetail_kernels._dtypes import exact
from dovetail_protocols import QuantizedArray


class Case(NamedTuple):
    rows: int
    vocab: int
    features: int = 4
    bias: bool = False
    softcap: float | None = None
    weighted: bool = False
    ignore: int | None = None
    smoothing: float = 0.0
    z_loss: float = 0.0
    per_token: bool = False

    @property
    def options(self) -> CrossEntropyOptions:
        return CrossEntropyOptions(self.smoothing, self.z_loss, self.per_token)


def blocks(chunk: int, bands: int = 1) -> Any:
    return configured("blocked", chunk=chunk, bands=bands)


EVERYTHING = Case(10, 7, bias=True, weighted=True, softcap=2.0, ignore=3, smoothing=0.1, z_loss=0.01)
CASES = [
    (Case(5, 1), "blocked"),
    (Case(5, 1, smoothing=0.5, z_loss=0.1), "reference"),
    (Case(1, 7), "blocked"),
    (Case(10, 7, bias=True), blocks(1)),
    (Case(10, 7, weighted=True), blocks(3, 2)),
    (Case(10, 7, features=6), blocks(10, 4)),
    (Case(10, 7, softcap=2.0), blocks(99)),
    (Case(10, 7, smoothing=0.3), blocks(4)),
    (Case(10, 7, smoothing=1.0, per_token=True), blocks(4)),
    (Case(10, 7, z_loss=0.1), blocks(4)),
    (EVERYTHING, blocks(4, 3)),
    (EVERYTHING, "reference"),
    (EVERYTHING._replace(per_token=True), blocks(4, 3)),
    (EVERYTHING._replace(per_token=True), "reference"),
    (EVERYTHING._replace(rows=300, vocab=2047, features=8), blocks(128, 2)),
    (Case(40, 5000), "blocked"),
    (Case(9, 32000, weighted=True), blocks(4, 4)),
    (Case(90, 50257), "blocked"),
    (Case(90, 50257, per_token=True), "blocked"),
    (Case(200, 30000, z_loss=1e-4), "blocked"),
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


def upstream(case: Case) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((case.rows,) if case.per_token else ())


def truth(case: Case, x: dict[str, Any]) -> dict[str, np.ndarray]:
    """Loss and gradients for the cotangent `upstream`."""
    weights = np.ones(case.rows) if x["loss_weights"] is None else x["loss_weights"].astype(np.float64)
    weights = np.where(x["targets"] == case.ignore, 0, weights)
    raw = x["hidden"] @ x["weight"] + (0 if x["bias"] is None else x["bias"])
    z = raw if case.softcap is None else case.softcap * np.tanh(raw / case.softcap)
    peak = z.max(axis=1, keepdims=True)
    lse = peak + np.log(np.exp(z - peak).sum(axis=1, keepdims=True))
    aim = np.full(z.shape, case.smoothing / case.vocab)
    aim[np.arange(case.rows), x["targets"]] += 1 - case.smoothing
    loss = ((lse - z) * aim).sum(1) + case.z_loss * lse[:, 0] ** 2
    p = np.exp(z - lse)
    dz = (p - aim + 2 * case.z_loss * lse * p) * (weights * upstream(case))[:, None]
    if case.softcap is not None:
        dz /= np.cosh(raw / case.softcap) ** 2
    return {
        "loss": loss * weights if case.per_token else (loss * weights).sum(),
        "hidden": dz @ x["weight"].T,
        "weight": x["hidden"].T @ dz,
        "bias": dz.sum(axis=0),
    }


def run(case: Case, implementation: Any, x: dict[str, Any], dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    @jax.jit
    def pulled(floats: dict[str, jax.Array], x: dict[str, Any], cotangent: jax.Array) -> dict[str, jax.Array]:
        def loss(floats: dict[str, jax.Array]) -> jax.Array:
            return linear_cross_entropy(
                floats["hidden"],
                floats["weight"],
                x["targets"],
                loss_weights=x["loss_weights"],
                ignore_index=case.ignore,
                bias=floats.get("bias"),
                softcap=case.softcap,
                options=case.options,
                implementation=implementation,
            )

        value, pull = jax.vjp(loss, floats)
        return {"loss": value, **pull(cotangent)[0]}

    floats = {k: jnp.asarray(x[k], dtype) for k in ("hidden", "weight", "bias") if x[k] is not None}
    rest = {k: x[k] for k in ("targets", "loss_weights")}
    return pulled(floats, rest, jnp.asarray(upstream(case), exact(dtype)))


def compare(
    case: Case, implementation: Any = None, dtype: Any = jnp.float32, tolerance: float = 1e-5, seed: int = 0
) -> None:
    x: dict[str, Any] = make(case, seed)
    for name in ("hidden", "weight", "bias"):
        x[name] = None if x[name] is None else np.asarray(jnp.asarray(x[name], dtype), np.float64)
    expected = truth(case, x)
    for name, value in run(case, implementation, x, dtype).items():
        want = expected[name]
        error = np.abs(np.asarray(value, np.float64) - want).max(initial=0) / max(1.0, np.abs(want).max(initial=0))
        assert error < tolerance, f"{name}: {error}"
        assert value.dtype == (exact(dtype) if name == "loss" else jnp.dtype(dtype))
        assert value.shape == want.shape


@pytest.mark.parametrize(("case", "implementation"), CASES, ids=str)
def test_closed_form(case: Case, implementation: Any) -> None:
    """A wrong loss or gradient for some vocabulary (a padded one among them), chunk or option."""
    compare(case, implementation)


@pytest.mark.parametrize("implementation", ["reference", blocks(4, 2)], ids=str)
@pytest.mark.parametrize("case", [EVERYTHING, Case(6, 7, softcap=1.5, per_token=True)], ids=str)
def test_bfloat16(case: Case, implementation: Any) -> None:
    """16-bit operands: float32 logits and loss, gradients in the operands' dtype."""
    compare(case, implementation, jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("implementation", ["reference", blocks(4, 2)], ids=str)
def test_float64(implementation: Any) -> None:
    """Float64 inputs are not computed in float32 on the way."""
    with jax.enable_x64(True):
        compare(EVERYTHING, implementation, jnp.float64, 1e-13)
        compare(EVERYTHING._replace(per_token=True), implementation, jnp.float64, 1e-13)


def test_bfloat16_over_many_tokens() -> None:
    """The sum over thousands of rows is made in float32: in bfloat16 it would stop growing at a few hundred."""
    hidden, weight = jnp.zeros((8192, 2), jnp.bfloat16), jnp.zeros((2, 11), jnp.bfloat16)
    targets = jnp.zeros((8192,), jnp.int32)
    loss = linear_cross_entropy(hidden, weight, targets, implementation=blocks(64))
    np.testing.assert_allclose(loss, 8192 * np.log(11), rtol=1e-5)
    ones = jnp.ones_like(hidden)
    gradient = jax.grad(linear_cross_entropy, argnums=1)(ones, weight, targets, implementation=blocks(64))
    np.testing.assert_allclose(np.asarray(gradient[0, 1:], np.float64), 8192 / 11, rtol=5e-3)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        rows=st.integers(1, 12),
        vocab=st.integers(1, 9),
        features=st.integers(1, 4),
        bias=st.booleans(),
        softcap=st.none() | st.floats(0.5, 30),
        weighted=st.booleans(),
        ignore=st.none() | st.integers(-1, 9),
        smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        z_loss=st.sampled_from([0.0, 0.1]),
        per_token=st.booleans(),
    ),
    seed=st.integers(0, 99),
    chunk=st.integers(1, 13),
    bands=st.integers(1, 5),
)
def test_any_shape(case: Case, seed: int, chunk: int, bands: int) -> None:
    """Shapes, options and chunk sizes nobody thought of."""
    compare(case, blocks(chunk, bands), seed=seed)


@pytest.mark.parametrize("implementation", [None, blocks(2), "reference"], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
def test_rows_of_weight_zero_may_hold_anything(implementation: Any, per_token: bool) -> None:
    """Padding with ids of -100, NaN or infinity must not touch the loss or any gradient."""
    case = Case(6, 11, bias=True, per_token=per_token, z_loss=0.1)
    x: dict[str, Any] = make(case)
    x["loss_weights"] = np.array([1, 0, 2, 0, 0, 1], np.float32)
    expected = truth(case, x)
    x["targets"][[1, 3, 4]] = -100, 2**31 - 1, 11
    x["hidden"][[1, 3, 4]] = [[np.nan], [np.inf], [1e38]]
    for name, value in run(case, implementation, x).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_ignored_targets(implementation: str) -> None:
    """Rows with the ignored target do not count, whatever they hold and whatever dtype ids have."""
    hidden, weight = jnp.array([[1.0, 2.0], [jnp.nan, 0.0], [0.0, 1.0]]), jnp.arange(10.0).reshape(2, 5)
    call = functools.partial(linear_cross_entropy, implementation=implementation)
    expected = call(hidden[::2], weight, jnp.array([2, 4], jnp.int32))
    for dtype, ignored in ((jnp.int32, -100), (jnp.int16, -100), (jnp.uint8, 255)):
        got = call(hidden, weight, jnp.array([2, ignored, 4], dtype), ignore_index=ignored)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    masked = call(hidden, weight, jnp.array([2, -100, 4]), loss_weights=jnp.array([True, False, True]))
    np.testing.assert_allclose(masked, expected, rtol=1e-6)
    assert call(hidden, weight, jnp.array([2, 0, 4], jnp.uint8), ignore_index=-100).shape == ()


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("target", [-1, -100, 11, 2**31 - 1])
def test_a_target_outside_the_vocabulary_shows(target: int, implementation: str) -> None:
    """A wrong tokenizer gives NaN at once, not a plausible loss of some other token."""
    targets = jnp.array([1, target], jnp.int32)
    call = functools.partial(linear_cross_entropy, jnp.ones((2, 3)), jnp.ones((3, 11)), targets)
    assert np.isnan(call(implementation=implementation))
    each = call(options=CrossEntropyOptions(label_smoothing=0.1, per_token=True), implementation=implementation)
    assert np.isnan(each).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_any_integer_targets(dtype: Any) -> None:
    """Narrow target dtypes work with vocabularies larger than their range."""
    hidden, weight = jnp.ones((2, 3)), jnp.arange(3 * 300.0).reshape(3, 300) / 300
    expected = linear_cross_entropy(hidden, weight, jnp.array([1, 100], jnp.int32))
    assert linear_cross_entropy(hidden, weight, jnp.array([1, 100], dtype)) == expected


def test_large_logits() -> None:
    """The loss is finite and right when logits are huge, and when a bias forbids a token."""
    hidden, weight = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0, 0.0, -1.0]])
    loss, gradient = jax.value_and_grad(linear_cross_entropy)(hidden, weight, jnp.array([0, 0]))
    assert loss == 2e4
    np.testing.assert_allclose(gradient, [[0], [-2]])
    bias = jnp.array([0.0, -jnp.inf, 0.0])
    loss, gradient = jax.value_and_grad(linear_cross_entropy)(hidden * 0, weight, jnp.array([0, 2]), bias=bias)
    np.testing.assert_allclose(loss, 2 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-1], [1]])


def test_the_z_loss_is_reported() -> None:
    """What is logged is the part of the loss, and logging it does not train on it twice."""
    x = make(Case(6, 8))
    operands = jnp.asarray(x["hidden"], jnp.float32), jnp.asarray(x["weight"], jnp.float32), jnp.asarray(x["targets"])
    for per_token in (False, True):
        how = CrossEntropyOptions(z_loss=0.1, per_token=per_token, return_z_loss=True)
        both = linear_cross_entropy(*operands, options=how)
        plain = linear_cross_entropy(*operands, options=CrossEntropyOptions(per_token=per_token))
        np.testing.assert_allclose(both.loss - both.z_loss, plain, rtol=1e-5)

        def total(weight: jax.Array, how: CrossEntropyOptions) -> jax.Array:
            found = linear_cross_entropy(operands[0], weight, operands[2], options=how)
            return jnp.sum(sum(found)) if how.return_z_loss else jnp.sum(found)

        without = CrossEntropyOptions(z_loss=0.1, per_token=per_token)
        a, b = (jax.grad(total)(operands[1], options) for options in (how, without))
        np.testing.assert_allclose(a, b, atol=1e-6)


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
    operands = jnp.ones((0, 3)), jnp.ones((3, 5)), jnp.zeros((0,), jnp.int32)
    value, gradient = jax.value_and_grad(linear_cross_entropy, argnums=1)(*operands)
    assert value == 0
    assert not np.asarray(gradient).any()
    assert linear_cross_entropy(*operands, options=CrossEntropyOptions(per_token=True)).shape == (0,)
    assert linear_cross_entropy(*operands, options=CrossEntropyOptions(return_z_loss=True)).z_loss == 0


OPTIONS = {"sum": CrossEntropyOptions(z_loss=0.01), "per token": CrossEntropyOptions(z_loss=0.01, per_token=True)}


def total(hidden: jax.Array, weight: jax.Array, targets: jax.Array, options: CrossEntropyOptions) -> jax.Array:
    loss = linear_cross_entropy(hidden, weight, targets, options=options, implementation=blocks(4, 2))
    return jnp.sum(loss * (targets + 1).astype(jnp.float32)) if options.per_token else -2.5 * loss


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_composes(options: CrossEntropyOptions) -> None:
    """Under vmap, remat, the partitioner and shard_map (weights replicated) gradients are those of plain jit."""
    x = make(Case(32, 11))
    operands = [jnp.asarray(x["hidden"], jnp.float32), jnp.asarray(x["weight"], jnp.float32), jnp.asarray(x["targets"])]
    own = functools.partial(total, options=options)

    def split(hidden: jax.Array, weight: jax.Array, targets: jax.Array) -> jax.Array:
        parts = (hidden.reshape(4, 8, -1), weight, targets.reshape(4, 8))
        return jnp.sum(jax.vmap(own, in_axes=(0, None, 0))(*parts))

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(operands, (rows, whole, rows), strict=True)]
    gradient = jax.grad(own, argnums=(0, 1))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, whole))
    plain = jax.jit(gradient)(*operands)
    others = {
        "remat": jax.jit(jax.grad(jax.checkpoint(own), argnums=(0, 1)))(*operands),
        "partitioner": jax.jit(gradient)(*placed),
        "shard_map": jax.jit(mapped)(*operands),
        "vmap": jax.jit(jax.grad(split, argnums=(0, 1)))(*operands),
    }
    for name, other in others.items():
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, err_msg=name)


VOCABULARIES = {
    "sum": CrossEntropyOptions(vocab_axis="model"),
    "everything": CrossEntropyOptions(0.1, 0.01, return_z_loss=True, vocab_axis="model"),
    "per token": CrossEntropyOptions(0.1, 0.01, per_token=True, vocab_axis="model"),
}


@pytest.mark.parametrize(
    ("options", "data"), list(zip(VOCABULARIES.values(), (1, 2, 1), strict=True)), ids=VOCABULARIES
)
def test_sharded_vocabulary(options: CrossEntropyOptions, data: int) -> None:
    """Tensor parallelism: each device holds a quarter of the vocabulary; loss and gradients are those of the whole."""
    x = make(Case(24, 20, bias=True))
    hidden, weight, bias = (jnp.asarray(x[k], jnp.float32) for k in ("hidden", "weight", "bias"))
    targets = jnp.asarray(x["targets"])
    weights = jnp.asarray(np.random.default_rng(1).choice([0.0, 1.0, 2.5], 24), jnp.float32)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((data, 4), ("data", "model"), axis_types=auto, devices=jax.devices()[: 4 * data])
    specs = (PartitionSpec("data"), PartitionSpec(None, "model"), PartitionSpec("model"), *[PartitionSpec("data")] * 2)

    def loss(hidden: Any, weight: Any, bias: Any, targets: Any, weights: Any, axis: str | None) -> jax.Array:
        how = CrossEntropyOptions(
            options.label_smoothing, options.z_loss, options.per_token, options.return_z_loss, axis
        )
        found = linear_cross_entropy(
            hidden, weight, targets, loss_weights=weights, bias=bias, softcap=3.0, options=how,
            implementation=blocks(5, 2) if axis else "reference",
        )  # fmt: skip
        parts = jax.tree.leaves(found)
        summed = jnp.sum(jnp.sin(parts[0])) if options.per_token else parts[0]
        return summed + sum(jnp.sum(part) for part in parts[1:])

    def sharded(*operands: Any) -> Any:
        value, gradients = jax.value_and_grad(functools.partial(loss, axis="model"), argnums=(0, 1, 2))(*operands)
        return jax.lax.psum(value, "data"), gradients

    got = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(), specs[:3])))(
        hidden, weight, bias, targets, weights
    )
    expected = jax.jit(jax.value_and_grad(functools.partial(loss, axis=None), argnums=(0, 1, 2)))(
        hidden, weight, bias, targets, weights
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5)


def test_reference_has_every_derivative() -> None:
    """Curvature goes through the reference; blocked refuses forward mode rather than being wrong."""
    x = make(Case(3, 5))
    hidden, weight, targets = (jnp.asarray(x[name]) for name in ("hidden", "weight", "targets"))
    reference = functools.partial(linear_cross_entropy, implementation="reference")
    p = jax.nn.softmax(hidden @ weight)
    expected = jnp.einsum("tv,dv,ev->tde", p, weight, weight) - jnp.einsum("td,te->tde", p @ weight.T, p @ weight.T)
    got = jax.hessian(lambda h: reference(h, weight, targets))(hidden)
    np.testing.assert_allclose(jnp.einsum("tdte->tde", got), expected, atol=1e-5)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda h: linear_cross_entropy(h, weight, targets), (hidden,), (hidden,))
