"""DenseMixer against the mixer kit, and what it refuses."""

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


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """Shapes that belong to another batch are refused, not reshaped into it."""
    tokens = jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match=r"\(6,\); expected \[batch, time\]"):
        DenseMixer.of(tokens.reshape(-1))
    with pytest.raises(ValueError, match=r"segment_ids have shape \(3, 2\)"):
        DenseMixer.of(tokens, tokens.reshape(3, 2))
    mixer, x = DenseMixer.of(tokens), jnp.ones((5, 2, 4))
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\); expected \[6, heads, dim\]"):
        mixer.attend(0, x, x, x, scale=1.0)
    with pytest.raises(ValueError, match=r"an input has shape \(5, 2, 4\); expected 6 tokens"):
        mixer.recur(0, None, (x,))
    with pytest.raises(ValueError, match=r"query has shape \(5, 2, 4\); expected \[6, heads, dim\]"):
        mixer.attend_latent(0, x, x[:, 0], x[:, 0, :1], (jnp.ones((4, 2, 3)), jnp.ones((4, 2, 3))), scale=1.0)
