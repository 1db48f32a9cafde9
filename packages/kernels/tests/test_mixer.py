"""DenseMixer against the mixer kit, and what it refuses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import DenseMixer, attention, causal
from dovetail_protocols import Mixer
from dovetail_protocols.testing import MixerCase, check_mixer


def test_conformance() -> None:
    """What models are promised about mixers."""
    check_mixer(lambda segments: DenseMixer.of(segments, segments))


def test_reference_implementation_conforms() -> None:
    """The implementation is handed on to attention."""
    cases = (MixerCase(heads=4, kv_heads=2, window=5),)
    check_mixer(lambda segments: DenseMixer.of(segments, segments, implementation="reference"), cases=cases)


def test_no_segments_is_one_segment_per_row() -> None:
    """Rows stay apart without segment ids, and flattening is row-major."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((6, 2, 4)), jnp.float32) for _ in range(3))
    mixer = DenseMixer.of(jnp.zeros((2, 3), jnp.int32))
    assert isinstance(mixer, Mixer)
    out, after = mixer.attend(0, q, k, v, scale=0.5)
    expected = attention(*(x.reshape(2, 3, 2, 4) for x in (q, k, v)), causal(), scale=0.5)
    np.testing.assert_array_equal(out, expected.reshape(6, 2, 4))
    assert after is mixer
    assert jax.tree.structure(after) == jax.tree.structure(mixer)


@pytest.mark.thin(3)
@pytest.mark.parametrize("how", ["plain", "segments", "together", "window", "sinks and soft cap"])
def test_rows_over_devices(how: str) -> None:
    """A ring gives values and gradients of whole rows, for calls outside of jit, too."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2 * 16, heads, 4)), jnp.float32) for heads in (4, 2, 2))
    ids = jnp.asarray(np.sort(rng.integers(0, 4, (2, 16)), axis=1), jnp.int32)
    options: dict[str, Any] = {"window": {"window": 5}, "sinks and soft cap": {"softcap": 2.0}}.get(how, {})
    if how == "sinks and soft cap":
        options["sinks"] = jnp.asarray(rng.standard_normal(4), jnp.float32)
    mesh = jax.make_mesh((2, 4), ("data", "time"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(ring: Any) -> Any:
        near = jnp.asarray(runs(2, 16, 0)) if how == "together" else None
        mixer = DenseMixer.of(ids, ids if how == "segments" else None, together=near, ring=ring)

        def loss(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, after = mixer.attend(0, *operands, scale=0.5, **options)
            assert after is mixer
            return jnp.sum(jnp.sin(out)), out

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return grad(q, k, v), jax.jit(grad)(q, k, v)

    for got, expected in zip(jax.tree.leaves(run((mesh, "time"))), jax.tree.leaves(run(None)), strict=True):
        rtol = 1e-6 if how == "together" else 1e-7  # values that many see have larger gradients
        np.testing.assert_allclose(got, expected, atol=1e-6, rtol=rtol)


def runs(batch: int, time: int, seed: int) -> np.ndarray:
    """Rows of plain tokens and of tokens that see each other, some of which stand apart."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 1 + time // 4, (batch, time))
    numbers = rng.choice([0, 0, 1, 2, 3], (batch, time))
    return np.stack([np.repeat(*row)[:time] for row in zip(numbers, lengths, strict=True)]).astype(np.int32)


def whole(q: Any, k: Any, v: Any, allowed: np.ndarray) -> jax.Array:
    """Attention with the mask as a matrix, [batch, query, key]."""
    logits = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, q.shape[2] // k.shape[2], 2)) * 0.3
    weights = jax.nn.softmax(jnp.where(allowed[:, None], logits, -jnp.inf))
    return jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, q.shape[2] // v.shape[2], 2))


@pytest.mark.thin(2)
@pytest.mark.parametrize("implementation", ["blocked", "reference"])
@pytest.mark.parametrize("cut", [False, True], ids=["rows", "segments"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("time", [21, 300])
def test_tokens_that_see_each_other(time: int, window: int | None, cut: bool, implementation: Any) -> None:
    """Places of an image see those after them; beyond the window, the segment or the row there is nothing to see."""
    rng = np.random.default_rng(time)
    q, k, v, weight = (rng.standard_normal((2, time, heads, 4)).astype(np.float32) for heads in (4, 2, 2, 4))
    together = runs(2, time, 0)
    ids = np.sort(rng.integers(1, 4, (2, time)), axis=1).astype(np.int32) if cut else np.ones((2, time), np.int32)
    allowed = np.zeros((2, time, time), bool)
    for row, i, j in np.ndindex(allowed.shape):
        same = together[row, i] == together[row, j] != 0
        near = window is None or i - j < window
        allowed[row, i, j] = (j <= i or same) and near and ids[row, i] == ids[row, j]
    assert (allowed & ~np.tril(np.ones((time, time), bool))).any()
    mixer = DenseMixer.of(
        jnp.zeros((2, time), jnp.int32),
        jnp.asarray(ids) if cut else None,
        together=jnp.asarray(together),
        implementation=implementation,
    )

    @jax.jit
    def run(mixer: DenseMixer, *operands: jax.Array) -> Any:
        def total(*operands: jax.Array) -> Any:
            flat = (x.reshape(2 * time, *x.shape[2:]) for x in operands)
            out = mixer.attend(0, *flat, scale=0.3, window=window)[0].reshape(weight.shape)
            return jnp.sum(out * weight), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*operands)

    @jax.jit
    def naive(*operands: jax.Array) -> Any:
        def total(*operands: jax.Array) -> Any:
            out = whole(*operands, allowed)
            return jnp.sum(out * weight), out

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*operands)

    gradients, out = run(mixer, q, k, v)
    expected_gradients, expected = naive(q, k, v)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("window", [None, 128])
def test_what_nobody_sees_is_skipped(window: int | None) -> None:
    """Blocks of keys after the last image of a block of queries, or before its window, cost nothing."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((512, 1, 4)).astype(np.float32) for _ in range(3))
    together = np.zeros((1, 512), np.int32)
    together[0, 100:140], together[0, 300:310] = 1, 2
    mixer = DenseMixer.of(jnp.zeros((1, 512), jnp.int32), together=jnp.asarray(together), implementation="blocked")
    run = jax.jit(lambda *operands: mixer.attend(0, *operands, scale=0.5, window=window)[0])
    expected = run(q, k, v)
    k[256:] = v[256:] = np.nan
    np.testing.assert_array_equal(run(q, k, v)[:128], expected[:128])
    if window is not None:
        k, v = (rng.standard_normal((512, 1, 4)).astype(np.float32) for _ in range(2))
        expected = run(q, k, v)
        k[:128] = v[:128] = np.nan
        np.testing.assert_array_equal(run(q, k, v)[384:], expected[384:])


def test_nobody_sees_ahead_by_default() -> None:
    """The program of plain rows is attention with a causal mask, and nothing more."""
    x = jnp.ones((6, 2, 4))
    mixer = DenseMixer.of(jnp.zeros((2, 3), jnp.int32))

    def plain(q: jax.Array) -> jax.Array:
        rows = (q.reshape(2, 3, 2, 4) for _ in range(3))
        return attention(*rows, causal(), scale=0.5).reshape(6, 2, 4)

    programs = (jax.make_jaxpr(run)(x) for run in (lambda q: mixer.attend(0, q, q, q, scale=0.5)[0], plain))
    assert str(next(programs)) == str(next(programs))


@pytest.mark.parametrize("traced", [False, True])
def test_choices_of_a_layer_are_its_own(traced: bool) -> None:
    """A layer beyond the last, as that of a head that looks ahead, is not to be forced onto another's experts."""
    choices = jnp.asarray(np.random.default_rng(0).integers(0, 8, (3, 6, 2)), jnp.int32)
    mixer = DenseMixer.of(jnp.zeros((2, 3), jnp.int32), choices=choices)
    now = jnp.full((6, 2), 5, jnp.int32)

    def choose(layer: Any) -> Any:
        return mixer.choose(layer, now)[0]

    for layer in range(5):
        got = jax.jit(choose)(jnp.int32(layer)) if traced else choose(layer)
        np.testing.assert_array_equal(got, choices[layer] if layer < 3 else -jnp.ones_like(now))


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """Shapes that belong to another batch are refused, not reshaped into it."""
    tokens = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"\(6,\); expected \[batch, time\]"):
        DenseMixer.of(tokens.reshape(-1))
    with pytest.raises(ValueError, match=r"segment_ids have shape \(3, 2\)"):
        DenseMixer.of(tokens, tokens.reshape(3, 2))
    mesh = jax.make_mesh((8,), ("time",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="rows of 3 tokens over 8 devices of the ring; expected a multiple"):
        DenseMixer.of(tokens, ring=(mesh, "time"))
    with pytest.raises(ValueError, match=r"together have shape \(3, 2\); expected that of tokens, \(2, 3\)"):
        DenseMixer.of(tokens, together=tokens.reshape(3, 2))
    with pytest.raises(ValueError, match=r"choices have shape \(3, 5, 2\); expected \[layers, 6, k\]"):
        DenseMixer.of(tokens, choices=jnp.zeros((3, 5, 2), jnp.int32))
    with pytest.raises(TypeError, match="choices have dtype float32; expected integers"):
        DenseMixer.of(tokens, choices=jnp.zeros((3, 6, 2)))
    mixer, x = DenseMixer.of(tokens), jnp.ones((5, 2, 4))
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\); expected \[6, heads, dim\]"):
        mixer.attend(0, x, x, x, scale=1.0)
    with pytest.raises(ValueError, match=r"an input has shape \(5, 2, 4\); expected 6 tokens"):
        mixer.recur(0, None, (x,))
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\); expected \[6, heads, dim\]"):
        mixer.attend_latent(0, x, x[:, 0], x[:, 0, :1], (jnp.ones((4, 2, 3)), jnp.ones((4, 2, 3))), scale=1.0)
