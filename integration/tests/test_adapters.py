"""Adapters from end to end: trained by the trainer and by groups of the optimizer, and nothing else with them."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dovetail_models import LORA, Llama, LlamaConfig, add_lora, merge, placements, split
from dovetail_optim import group
from dovetail_protocols import LMBatch, paths, split_rows
from dovetail_protocols.testing import FakeQuantized
from dovetail_runtime import FSDP, mesh
from dovetail_train import Trainer, next_token

CONFIG = LlamaConfig(vocab_size=48, features=16, hidden=32, layers=2, heads=8, kv_heads=2, init_std=0.3)
WEIGHTS = ["layers/**/mlp/*", "layers/**/attention/{query,value}"]


def batch() -> LMBatch:
    rows = np.random.default_rng(0).integers(0, 48, (8, 17)).astype(np.int32)
    return split_rows(rows, np.ones_like(rows))


def check(trainer: Trainer, params: Any) -> None:
    """Check that adapters learn, and that no other bit moves or has a state."""
    losses = [float(trainer.step(batch())["loss"]) for _ in range(8)]
    assert losses[-1] < losses[0] - 0.05, losses
    after, chosen = paths.flatten(trainer.params), set(paths.select(params, LORA))
    for address, before in paths.flatten(params).items():
        assert np.array_equal(after[address], before) == (address not in chosen), address
    moments = [leaf for leaf in jax.tree.leaves(trainer.state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(chosen)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("on_mesh", [False, True])
def test_adapters_of_a_quantized_base(scan: bool, on_mesh: bool) -> None:
    """Breaks when a base or its scales move, or on a mesh an adapter's state is not where the adapter is."""
    definition, params = split(Llama(CONFIG, rngs=nnx.Rngs(0), scan=scan))
    base = merge(definition, FakeQuantized.of(params, WEIGHTS).quantized)
    model = add_lora(base, WEIGHTS, rank=2, rngs=nnx.Rngs(0), dora=True)
    definition, params = split(model)
    places: dict[str, Any] = {}
    if on_mesh:
        grid = mesh(fsdp=-1)
        places = {"mesh": grid, "rules": FSDP, "shardings": placements(model, grid, FSDP)}
    check(Trainer(params, next_token(definition), optax.adam(0.02), trained=LORA, **places), params)


def test_groups_of_an_optimizer_freeze_as_well() -> None:
    """Breaks when the pattern of a mask chooses other parameters than the trainer's."""
    model = add_lora(Llama(CONFIG, rngs=nnx.Rngs(0)), WEIGHTS, rank=2, rngs=nnx.Rngs(0))
    definition, params = split(model)
    optimizer = group(params, {LORA: optax.adam(0.02), "**": None})
    check(Trainer(params, next_token(definition), optimizer), params)
