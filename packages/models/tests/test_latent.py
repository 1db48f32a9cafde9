"""DeepSeek: heads that look ahead, in checkpoints and out of them; the scale of attention with a longer context."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_kernels import DenseMixer, YarnScaling
from dovetail_models import DeepseekV3, DeepseekV3Config, from_pretrained, save_pretrained
from dovetail_weights import open_directory, write_directory

CONFIG = DeepseekV3Config(
    vocab_size=24, features=8, hidden=12, layers=1, heads=2, query_rank=5, latent_dim=6, nope_dim=4, rope_dim=2,
    value_dim=3, experts=4, top_k=2, expert_hidden=5, shared_experts=1, first_dense=0, expert_groups=2, kept_groups=1,
    ahead=1, init_std=0.5,
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 24, (2, 6)), jnp.int32)
POSITIONS = jnp.tile(jnp.arange(6, dtype=jnp.int32), 2)


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    return DeepseekV3(CONFIG, rngs=nnx.Rngs(0))


@jax.jit
def ahead(model: DeepseekV3, tokens: jax.Array, following: jax.Array) -> jax.Array:
    mixer = DenseMixer.of(tokens)
    hidden, _, _ = model.hidden(tokens.reshape(-1), POSITIONS, mixer)
    states, _, _ = model.look_ahead(hidden, following.reshape(-1), POSITIONS, mixer)
    return model.unembed(states).reshape(*tokens.shape, -1)


def test_a_head_sees_the_tokens_so_far_and_the_next(model: Any) -> None:
    """It predicts the token after the next one: it may know the next one, and nothing later."""
    following = jnp.roll(TOKENS, -1, axis=1)
    base = ahead(model, TOKENS, following)
    others = (TOKENS.at[0, 3].add(1) % 24, following), (TOKENS, following.at[0, 3].add(1) % 24)
    for changed in (ahead(model, *other) for other in others):
        np.testing.assert_allclose(changed[0, :3], base[0, :3], atol=1e-5)
        np.testing.assert_allclose(changed[1], base[1], atol=1e-5)
        assert (jnp.abs(changed[0, 3:] - base[0, 3:]).max(-1) > 1e-4).all()
    with pytest.raises(ValueError, match="head=1; the model has 1 heads that look ahead"):
        model.look_ahead(jnp.zeros((2, 8)), TOKENS[0, :2], POSITIONS[:2], DenseMixer.of(TOKENS[:1, :2]), head=1)


def test_checkpoints_with_heads_and_without(model: Any, tmp_path: Path) -> None:
    """The hub's checkpoints repeat embedding and head for each; those that transformers saved have lost the heads."""
    tensors = open_directory(save_pretrained(model, tmp_path / "whole"))
    values = {name: tensors.read(name) for name in tensors}
    files = {"config.json": (tmp_path / "whole" / "config.json").read_text()}
    copies = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}
    repeated = {f"model.layers.1.{name}.weight": values[original] for name, original in copies.items()}
    write_directory(tmp_path / "hub", values | repeated, extra_files=files)
    kept = {name: value for name, value in values.items() if "layers.1." not in name}
    assert len(values) - len(kept) > 20
    write_directory(tmp_path / "lost", kept, extra_files=files)

    whole, lost = from_pretrained(tmp_path / "hub"), from_pretrained(tmp_path / "lost")
    assert (whole.config, lost.config.ahead) == (CONFIG, 0)
    following = jnp.roll(TOKENS, -1, axis=1)
    np.testing.assert_array_equal(ahead(whole, TOKENS, following), ahead(model, TOKENS, following))
    assert set(open_directory(save_pretrained(lost, tmp_path / "again"))) == set(kept)


def test_a_longer_context_warms_all_logits() -> None:
    """DeepSeek's checkpoints rely on it; the rotated features are warmed by the quotient besides."""
    scaling = YarnScaling(40.0, 4096, mscale=0.7, mscale_all_dim=0.9)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    np.testing.assert_allclose(CONFIG.attention_scale, 6**-0.5)
    np.testing.assert_allclose(config.attention_scale, 6**-0.5 * (0.09 * np.log(40) + 1) ** 2)


def test_a_loop_over_layers_keeps_the_heads(tmp_path: Path) -> None:
    """Stacked layers are read from the checkpoint of single ones, and the heads beside them stay single."""
    config = dataclasses.replace(CONFIG, layers=3, first_dense=1)
    alone = DeepseekV3(config, rngs=nnx.Rngs(1))
    looped = from_pretrained(save_pretrained(alone, tmp_path / "model"), scan=True)
    following = jnp.roll(TOKENS, -1, axis=1)
    np.testing.assert_allclose(ahead(looped, TOKENS, following), ahead(alone, TOKENS, following), atol=1e-4)
