"""Penalties and biases of `dovetail_kernels` against the processors of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from dovetail_kernels import bias_logits, penalize


@pytest.mark.parametrize("penalty", [0.6, 1.0, 1.7])
def test_repetition(penalty: float) -> None:
    """A request's repetition penalty means something else here."""
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((4, 50)).astype(np.float32), rng.integers(0, 50, (4, 30))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), torch.from_numpy(logits)).numpy()
    given = jnp.asarray(ids, jnp.int32)
    got = penalize(jnp.asarray(logits), given[:, 10:], prompt=given[:, :10], repetition=penalty)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_bias() -> None:
    """A bias reaches another token, or is scaled."""
    logits = np.random.default_rng(0).standard_normal((2, 20)).astype(np.float32)
    processor = SequenceBiasLogitsProcessor({(3,): 2.5, (19,): -10.0})
    expected = processor(torch.zeros((2, 1), dtype=torch.long), torch.from_numpy(logits)).numpy()
    ids, values = jnp.asarray([[3, 19, -1]] * 2), jnp.asarray([[2.5, -10.0, 7.0]] * 2)
    np.testing.assert_allclose(bias_logits(jnp.asarray(logits), values, ids), expected, rtol=1e-6)
