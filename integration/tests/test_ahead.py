"""A model with heads that look ahead learns with them: DeepSeek-V3 under the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dovetail_kernels import DenseMixer
from dovetail_models import DeepseekV3, DeepseekV3Config, merge, split
from dovetail_protocols import split_rows
from dovetail_train import init_state, make_step, next_token

CONFIG = DeepseekV3Config(
    vocab_size=11, features=32, hidden=48, layers=1, heads=2, latent_dim=16, query_rank=None, nope_dim=8, rope_dim=8,
    value_dim=8, experts=4, top_k=2, expert_groups=2, kept_groups=2, expert_hidden=16, shared_experts=1, first_dense=0,
    ahead=2, init_std=0.2,
)  # fmt: skip


def batch_of(step: int):
    """Rows of two documents that count up, each from another number."""
    rng = np.random.default_rng(step)
    cut = 8
    starts = rng.integers(0, 11, (16, 2))
    rows = np.concatenate([starts[:, :1] + np.arange(cut), starts[:, 1:] + np.arange(13 - cut)], axis=1) % 11
    return split_rows(rows.astype(np.int32), np.repeat([1, 2], [cut, 13 - cut])[None].repeat(16, 0))


def test_each_head_learns_its_own_token():
    """Breaks when a head is trained for another place, or its loss does not reach its parameters."""
    definition, params = split(DeepseekV3(CONFIG, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_step(next_token(definition, ahead=(0.3, 0.3)), optimizer))
    state = init_state(params, optimizer)
    for i in range(60):
        state, metrics = step(state, batch_of(i))
        first = metrics if i == 0 else first
    for head in (0, 1):
        assert metrics[f"loss/ahead_{head}"] < 0.02 < 0.5 < first[f"loss/ahead_{head}"]

    tokens = jnp.asarray([[3, 4, 5, 6]], jnp.int32)
    model, positions, mixer = merge(definition, state.params), jnp.arange(4, dtype=jnp.int32), DenseMixer.of(tokens)
    hidden, _, _ = model.hidden(tokens[0], positions, mixer)
    for head in (0, 1):
        hidden, _, _ = model.look_ahead(hidden, tokens[0] + head + 1, positions, mixer, head=head)
        np.testing.assert_array_equal(model.unembed(hidden).argmax(-1)[1:], np.asarray(tokens[0] + head + 2)[1:])
