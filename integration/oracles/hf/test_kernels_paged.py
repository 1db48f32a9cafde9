"""Paged attention against transformers' DeepSeek-V3 attention (latent, absorbed) and jax's own reference for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from dovetail_kernels import empty_pages, page_slots, paged_attention, paged_latent_attention, update_pages

HEADS, NOPE, ROPE, LATENT, VALUE, TIME, PAGE = 4, 8, 4, 16, 6, 21, 4


@pytest.mark.parametrize("new", [1, 3, TIME])
def test_absorbed_latents_are_deepseek_attention(new):
    """A DeepSeek model served from its latent cache answers otherwise than the model."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=None,
        kv_lora_rank=LATENT,
        qk_nope_head_dim=NOPE,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        num_hidden_layers=1,
        attn_implementation="eager",
    )
    layer = DeepseekV3Attention(config, 0).eval()
    x = torch.randn(1, TIME, 32)
    unturned = torch.ones(1, TIME, ROPE), torch.zeros(1, TIME, ROPE)  # positions do not matter here
    mask = torch.full((TIME, TIME), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = layer(x, position_embeddings=unturned, attention_mask=mask)[0][0].numpy()
        query = layer.q_proj(x)[0].reshape(TIME, HEADS, -1).numpy()
        joint = layer.kv_a_proj_with_mqa(x)[0]
        cached = torch.cat([layer.kv_a_layernorm(joint[:, :LATENT]), joint[:, LATENT:]], -1).numpy()
        expand = layer.kv_b_proj.weight.reshape(HEADS, NOPE + VALUE, LATENT).numpy()
        project = layer.o_proj.weight.numpy()
    query[..., NOPE:] = interleaved(query[..., NOPE:], config)
    cached[:, LATENT:] = interleaved(cached[:, LATENT:], config)
    absorbed = np.concatenate([np.einsum("thn,hnl->thl", query[..., :NOPE], expand[:, :NOPE]), query[..., NOPE:]], -1)
    tables = jnp.asarray(np.random.default_rng(0).permutation(9)[None], jnp.int32)
    at = jnp.arange(TIME, dtype=jnp.int32)
    pages = update_pages(
        empty_pages((9, PAGE, LATENT + ROPE), jnp.float32), jnp.asarray(cached), *page_slots(tables, at * 0, at, PAGE)
    )
    got = paged_latent_attention(
        jnp.asarray(absorbed[-new:]), pages, tables, jnp.array([TIME]), latent_dim=LATENT, scale=layer.scaling
    )
    mixed = np.einsum("thl,hvl->thv", np.asarray(got), expand[:, NOPE:]).reshape(new, -1)
    np.testing.assert_allclose(mixed @ project.T, expected[-new:], atol=1e-5)


def interleaved(x, config):
    """Return rotary parts in the order that the layer turns them in; products of two do not depend on it."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape) if config.rope_interleave else x


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0)])
def test_ragged_rows_are_those_of_the_reference_for_tpus(window, softcap):
    """Prefills and decodes of one batch differ from what the peer's kernels are tested against."""
    rng = np.random.default_rng(0)
    lengths, new = np.array([30, 5, 17]), np.array([1, 5, 9])
    kv_heads, dim, pages = 2, 8, 24
    starts = np.concatenate([[0], np.cumsum(new)])
    query = jnp.asarray(rng.standard_normal((new.sum(), HEADS, dim)), jnp.float32)
    joint = jnp.asarray(rng.standard_normal((pages, PAGE, 2 * kv_heads, dim)), jnp.float32)
    tables = jnp.asarray(rng.permutation(pages).reshape(3, 8), jnp.int32)
    counts = [jnp.asarray(x, jnp.int32) for x in (lengths, starts, [3])]
    expected = ref_ragged_paged_attention(
        query, joint, counts[0], tables, *counts[1:], sm_scale=0.3, sliding_window=window, soft_cap=softcap
    )
    rows = np.repeat(np.arange(3), new)
    positions = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, new, strict=True)])
    keys, values = (joint[:, :, i::2].transpose(0, 2, 1, 3) for i in range(2))
    got = jax.jit(paged_attention, static_argnames=("scale", "window", "softcap"))(
        query, keys, values, tables, counts[0], rows=jnp.asarray(rows), positions=jnp.asarray(positions), scale=0.3,
        window=window, softcap=softcap,
    )  # fmt: skip
    np.testing.assert_allclose(got, expected, atol=1e-5)
