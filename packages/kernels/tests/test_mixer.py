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


@pytest.mark.parametrize("how", ["plain", "segments", "window", "sinks and soft cap"])
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
        mixer = DenseMixer.of(ids, ids if how == "segments" else None, ring=ring)

        def loss(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, after = mixer.attend(0, *operands, scale=0.5, **options)
            assert after is mixer
            return jnp.sum(jnp.sin(out)), out

        grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        return grad(q, k, v), jax.jit(grad)(q, k, v)

    for got, expected in zip(jax.tree.leaves(run((mesh, "time"))), jax.tree.leaves(run(None)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)


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
    mixer, x = DenseMixer.of(tokens), jnp.ones((5, 2, 4))
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\); expected \[6, heads, dim\]"):
        mixer.attend(0, x, x, x, scale=1.0)
    with pytest.raises(ValueError, match=r"an input has shape \(5, 2, 4\); expected 6 tokens"):
        mixer.recur(0, None, (x,))
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\); expected \[6, heads, dim\]"):
        mixer.attend_latent(0, x, x[:, 0], x[:, 0, :1], (jnp.ones((4, 2, 3)), jnp.ones((4, 2, 3))), scale=1.0)
