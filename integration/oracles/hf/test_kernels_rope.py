"""Rotary embeddings of `dovetail_kernels` against transformers: all of ROPE_INIT_FUNCTIONS, and several axes."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2VLTextConfig, Qwen3VLTextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl

from dovetail_kernels import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    rope,
    rope_axes,
    rope_frequencies,
    rope_table,
)

SHORT, LONG = tuple(np.linspace(1, 3, 8)), tuple(np.linspace(1, 40, 8))
ORIGINAL = "original_max_position_embeddings"
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "linear": ({"factor": 4.0}, LinearScaling(4.0), {}),
    "dynamic": ({"factor": 2.0}, DynamicScaling(2.0, 128), {}),
    "yarn": ({"factor": 8.0, ORIGINAL: 128}, YarnScaling(8.0, 128), {}),
    "longrope": (
        {"short_factor": SHORT, "long_factor": LONG, ORIGINAL: 64, "factor": 2.0},
        LongRopeScaling(SHORT, LONG, 64, factor=2.0),
        {},
    ),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 128},
        Llama3Scaling(8.0, 1.0, 4.0, 128),
        {},
    ),
    "proportional": ({"partial_rotary_factor": 0.5}, None, {"rotated": 8}),
}


def test_every_kind_is_here() -> None:
    """transformers has a kind of rotary embedding that we do not know of."""
    assert set(ROPE_INIT_FUNCTIONS) - {"default"} == set(CASES)


@pytest.mark.parametrize("length", [None, 100, 1000])
@pytest.mark.parametrize("kind", CASES)
def test_frequencies(kind: str, length: int | None) -> None:
    """Checkpoints trained elsewhere read positions wrongly if a scaling differs, at any length."""
    parameters, scaling, options = CASES[kind]
    config = LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **parameters},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    got, ours = rope_frequencies(16, 10000.0, scaling, length=length, **options)
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-6)
    np.testing.assert_allclose(ours, factor, rtol=1e-9)


AXES = {
    "Qwen2-VL": (Qwen2VLTextConfig, modeling_qwen2_vl, "Qwen2VLRotaryEmbedding", False),
    "Qwen3-VL": (Qwen3VLTextConfig, modeling_qwen3_vl, "Qwen3VLTextRotaryEmbedding", True),
}


@pytest.mark.parametrize(("make", "module", "name", "interleaved"), AXES.values(), ids=AXES)
def test_several_axes(make: Any, module: Any, name: str, interleaved: bool) -> None:
    """Images and videos are read in another order if a frequency follows another axis."""
    sections = [3, 3, 2]
    rotation = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    config = make(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, rope_parameters=rotation)
    rng = np.random.default_rng(0)
    positions, x = rng.integers(0, 90, (5, 3)), rng.standard_normal((5, 2, 16)).astype(np.float32)
    turn = getattr(module, name)(config)
    cosines, sines = turn(torch.zeros(1), torch.from_numpy(positions.T[:, None]))
    heads = torch.from_numpy(x).transpose(0, 1)[None]
    expected, _ = module.apply_rotary_pos_emb(heads, heads, cosines, sines)
    frequencies, _ = rope_frequencies(16, 10000.0)
    axes = rope_axes(sections, interleaved=interleaved)
    got = rope(jnp.asarray(x), rope_table(jnp.asarray(positions, jnp.int32), frequencies, axes=axes))
    np.testing.assert_allclose(got, expected[0].transpose(0, 1).numpy(), atol=1e-5)
