"""Routers in a training step: what they tell is in its metrics, and a correction follows the surplus once per step."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from dovetail_models import DeepseekV3, DeepseekV3Config, SparseTraining, split
from dovetail_optim import group
from dovetail_protocols import LMBatch
from dovetail_train import Trainer, next_token

RATE = 0.01
CONFIG = DeepseekV3Config(
    vocab_size=48, features=16, hidden=24, layers=2, heads=2, latent_dim=8, nope_dim=8, rope_dim=4, value_dim=8,
    query_rank=None, experts=8, top_k=2, expert_hidden=12, shared_experts=1, first_dense=1, expert_groups=2,
    kept_groups=2, balanced=True, init_std=0.3,
    training=SparseTraining(z_coef=1e-3, correct=True, statistics=True),
)  # fmt: skip


def batch(seed: int) -> LMBatch:
    rows = np.random.default_rng(seed).integers(0, 48, (8, 13)).astype(np.int32)
    ones = np.ones((8, 12), np.int32)
    positions = np.tile(np.arange(12, dtype=np.int32), (8, 1))
    return LMBatch(rows[:, :-1], rows[:, 1:], ones.astype(np.float32), positions, ones)


def trained(steps: int, *, accumulate: int = 1) -> tuple[Any, Any]:
    """Parameters and metrics after some steps."""
    definition, params = split(DeepseekV3(CONFIG, rngs=nnx.Rngs(0)))
    optimizer = group(params, {"**/router/correction": optax.sign_sgd(RATE), "**": optax.sgd(0.1)})
    trainer = Trainer(params, next_token(definition), optimizer, accumulate=accumulate)
    metrics = [trainer.step(batch(seed)) for seed in range(steps)]
    return jax.device_get(trainer.params), jax.device_get(metrics[-1])


def correction(params: Any) -> Any:
    return params["layers"][1]["mlp"]["router"]["correction"]


def test_metrics_and_correction() -> None:
    """A correction that moves with every micro-batch, or against the surplus, makes experts die."""
    params, metrics = trained(3)
    assert {"loss/balance", "loss/router_z", "loss/correction", "router/entropy"} < set(metrics)
    assert metrics["loss/correction"] == 0
    assert 0 < metrics["router/entropy"] < np.log(8)
    assert metrics["router/load_max_per_micro_batch"] >= 1
    moved = np.abs(correction(params)) / RATE
    np.testing.assert_allclose(moved, np.round(moved), atol=1e-4)
    assert 1 <= moved.max() <= 3
    parts, _ = trained(3, accumulate=4)
    np.testing.assert_array_equal(correction(parts), correction(params))
