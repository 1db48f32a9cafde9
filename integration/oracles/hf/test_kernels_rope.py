"""Rotary frequencies of `dovetail_kernels` against every entry of transformers' ROPE_INIT_FUNCTIONS."""

from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dovetail_kernels import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    rope_frequencies,
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
