"""The causal depthwise convolution against a float64 NumPy loop with gradients by hand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import causal_conv1d, causal_conv1d_step


class Case(NamedTuple):
    """One call."""

    time: int
    channels: int = 3
    width: int = 4
    bias: bool = True
    activation: Any = "silu"
    state: bool = False
    packed: bool = False
    batch: int = 3


CASES = {
    "one token": Case(1, state=True),
    "shorter than the window": Case(2, width=5, state=True, activation=None),
    "one tap": Case(9, width=1, state=True, packed=True),
    "plain": Case(40, channels=1, bias=False),
    "packed": Case(60, packed=True),
    "packed after a state": Case(60, packed=True, state=True),
}


def ids(case: Case) -> np.ndarray:
    """Segments of one to eight tokens with padding anywhere; the last row is padding only."""
    rng = np.random.default_rng(3)
    found = np.repeat(rng.permutation(np.arange(1, case.time + 1)), rng.integers(1, 9, case.time))[: case.time]
    found = np.where(rng.random((case.batch, case.time)) < 0.3, 0, found)
    found[-1] = 0
    return found.astype(np.int32)


def make(case: Case, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Return the operands."""
    rng = np.random.default_rng(0)
    shapes = {
        "x": (case.batch, case.time, case.channels),
        "weight": (case.channels, case.width),
        "bias": (case.channels,),
        "state": (case.batch, case.width - 1, case.channels),
    }
    wanted = [name for name in shapes if name not in ("bias", "state") or getattr(case, name)]
    return {name: jnp.asarray(rng.standard_normal(shapes[name]), dtype) for name in wanted}


def truth(case: Case, operands: Any, packed: Any, d_out: Any, d_after: Any) -> dict[str, np.ndarray]:
    """Outputs, the last inputs and gradients; a window is a list of places, negative ones in the state."""
    wide = {name: np.asarray(value, np.float64) for name, value in operands.items()}
    x, weight, before = wide["x"], wide["weight"], case.width - 1
    state = wide.get("state", np.zeros((case.batch, before, case.channels)))
    grads = {"x": np.zeros_like(x), "weight": np.zeros_like(weight), "bias": np.zeros(case.channels)}
    grads["state"] = np.zeros_like(state)
    out, after = np.zeros_like(x), np.zeros_like(state)

    def at(row: int, place: int | None) -> np.ndarray:
        if place is None:
            return np.zeros(case.channels)
        return x[row, place] if place >= 0 else state[row, place]

    def give(row: int, place: int | None, gradient: np.ndarray) -> None:
        if place is not None:
            grads["x" if place >= 0 else "state"][row, place] += gradient

    for row in range(case.batch):
        window, last = [*range(-before, 0)], None
        for t in range(case.time):
            if packed is not None and packed[row, t] == 0:
                continue
            if packed is not None and last not in (None, packed[row, t]):
                window = [None] * before
            last = None if packed is None else packed[row, t]
            window = [*window[len(window) - before :], t]
            z = wide.get("bias", 0.0) + sum(weight[:, i] * at(row, place) for i, place in enumerate(window))
            gate = 1 / (1 + np.exp(-z))
            out[row, t] = z * gate if case.activation else z
            slope = gate * (1 + z * (1 - gate)) if case.activation else 1.0
            dz = np.asarray(d_out[row, t], np.float64) * slope
            grads["bias"] += dz
            for i, place in enumerate(window):
                give(row, place, dz * weight[:, i])
                grads["weight"][:, i] += dz * at(row, place)
        for i, place in enumerate(window[len(window) - before :] if before else []):
            after[row, i] = at(row, place)
            give(row, place, np.asarray(d_after[row, i], np.float64))
    return {"out": out, "after": after, **{name: grads[name] for name in operands}}


def compare(case: Case, dtype: Any, tolerance: float) -> None:
    """Compare values and gradients with the truth, relative to the largest value of each."""
    operands = make(case, dtype)
    packed = ids(case) if case.packed else None
    rng = np.random.default_rng(1)
    d_out = jnp.asarray(rng.standard_normal(operands["x"].shape), dtype)
    d_after = jnp.asarray(rng.standard_normal((case.batch, case.width - 1, case.channels)), dtype)

    @jax.jit
    def pulled(operands: Any, packed: Any, cotangents: Any) -> dict[str, jax.Array]:
        def call(operands: Any) -> Any:
            return causal_conv1d(**operands, activation=case.activation, segment_ids=packed)

        (out, after), pull = jax.vjp(call, operands)
        return {"out": out, "after": after, **pull(cotangents)[0]}

    got = pulled(operands, None if packed is None else jnp.asarray(packed), (d_out, d_after))
    for name, b in truth(case, operands, packed, d_out, d_after).items():
        assert got[name].dtype == jnp.dtype(dtype)
        assert got[name].shape == b.shape
        error = np.abs(np.asarray(got[name], np.float64) - b).max(initial=0)
        assert error < tolerance * max(1.0, np.abs(b).max(initial=0)), f"{name}: {error}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case: Case) -> None:
    """A layer reads the wrong tokens, across documents or through padding, if a window is off by one."""
    compare(case, jnp.float32, 2e-6)


def test_dtypes() -> None:
    """16-bit operands keep their dtype with sums in float32; float64 is not computed in float32 on the way."""
    compare(CASES["packed after a state"], jnp.bfloat16, 2e-2)
    with jax.enable_x64(True):
        compare(CASES["packed after a state"], jnp.float64, 1e-14)


def test_steps_continue_a_sequence() -> None:
    """Decoding token by token after a prefill gives what one pass over everything gives."""
    operands = make(Case(20, state=True))
    out, after = causal_conv1d(**operands, activation="silu")
    x, start = operands.pop("x"), operands.pop("state")
    head, state = causal_conv1d(x[:, :17], **operands, state=start, activation="silu")
    found = [head]
    for t in range(17, 20):
        y, state = causal_conv1d_step(x[:, t], **operands, state=state, activation="silu")
        found.append(y[:, None])
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), out, atol=1e-6)
    np.testing.assert_array_equal(state, after)


X, W = jnp.ones((1, 4, 3)), jnp.ones((3, 4))
BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("rank", (X[0], W), {}, r"x \(4, 3\).*expected \[batch, time, channels\]"),
    ("no taps", (X, W[:, :0]), {}, r"width >= 1"),
    ("weight", (X, W[:2]), {}, r"weight has shape \(2, 4\); expected \[channels, width\] = \(3, 4\)"),
    ("bias", (X, W, jnp.ones(2)), {}, r"bias has shape \(2,\)"),
    ("state", (X, W), {"state": jnp.ones((1, 4, 3))}, r"expected \[batch, width - 1, channels\] = \(1, 3, 3\)"),
    ("activation", (X, W), {"activation": "gelu"}, r"activation='gelu'; expected one of \[None, 'silu'\]"),
    ("ids", (X, W), {"segment_ids": jnp.ones((1, 3), int)}, r"\[batch, time\] = \(1, 4\)"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(ValueError, match=message):
        causal_conv1d(*arrays, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_types() -> None:
    """Integers are refused."""
    with pytest.raises(TypeError, match="x has dtype int32; expected a float"):
        causal_conv1d(X.astype(int), W)
