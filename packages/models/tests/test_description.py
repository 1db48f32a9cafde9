"""What a model is made of and what it costs, against the checkpoints' own tensors and closed forms."""

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

from dovetail_models import DecoderConfig, Llama, LlamaConfig, MistralConfig, describe, from_pretrained, merge, split
from dovetail_protocols.testing import FakeQuantized
from dovetail_weights import open_directory

MATRIX: dict[str, Any] = tomllib.loads((Path(__file__).parent / "matrix.toml").read_text())
CONFIG = LlamaConfig(vocab_size=96, features=32, hidden=64, layers=3, heads=4, kv_heads=2)


@pytest.mark.parametrize("name", MATRIX)
def test_parameters_are_those_of_the_checkpoint(name: str, golden: Path) -> None:
    """Every tensor of a checkpoint is in one group, of every family."""
    tensors = open_directory(golden / name)
    found = describe(from_pretrained(golden / name), time=8)
    assert found.parameters == sum(math.prod(tensor.shape) for tensor in tensors.values())
    assert found.bytes == 4 * found.parameters
    assert found.forward.matmul_flops > 0
    assert not found.forward.uncounted
    assert found.cache_bytes_per_token + found.cache_bytes_at_most > 0


def test_a_llama_by_hand() -> None:
    """Groups and matrix products against what one counts on paper."""
    found = describe(CONFIG, time=10)
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert {name: group.parameters for name, group in found.groups.items()} == {
        "embedding": 96 * 32,
        "head": 96 * 32,
        "layers/*/attention": 3 * attention,
        "layers/*/attention_norm": 3 * 32,
        "layers/*/mlp": 3 * 3 * 32 * 64,
        "layers/*/mlp_norm": 3 * 32,
        "norm": 32,
    }
    weights = 3 * (attention + 3 * 32 * 64) + 96 * 32
    mixing = 3 * 2 * 4 * 8 * 10  # logits and weighted values of every pair, masked ones included
    assert found.forward.matmul_flops == 10 * 2 * (weights + mixing)
    assert found.flops_per_token == found.forward.flops / 10
    assert (found.cache_bytes_per_token, found.cache_bytes_at_most) == (3 * 2 * 16 * 4, 0)


def test_windows_do_not_grow() -> None:
    """A cache of windows ends with the window."""
    sizes = {f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(DecoderConfig)}
    found = describe(MistralConfig(**sizes, window=7), time=8)
    assert (found.cache_bytes_per_token, found.cache_bytes_at_most) == (0, 7 * 3 * 2 * 16 * 4)


def test_dtypes() -> None:
    """Half the bytes, the same numbers; of quantized parameters the bytes that are stored."""
    model = Llama(CONFIG, rngs=nnx.Rngs(0))
    whole, half = describe(model, time=4), describe(CONFIG, time=4, param_dtype=jnp.bfloat16)
    assert (half.parameters, 2 * half.bytes) == (whole.parameters, whole.bytes)
    definition, params = split(model)
    quantized = merge(definition, FakeQuantized.of(params, "layers/*/mlp/*").quantized)
    found = describe(quantized, time=4)
    assert found.parameters == whole.parameters
    assert found.groups["layers/*/mlp"].bytes < whole.groups["layers/*/mlp"].bytes / 2


def test_nothing_is_allocated() -> None:
    """A model that fits no machine can be planned."""
    config = LlamaConfig(vocab_size=128256, features=16384, hidden=53248, layers=2, heads=128, kv_heads=8)
    found = describe(config, param_dtype=jnp.bfloat16)
    assert found.bytes > 16e9
    assert found.time == 2048
    text = str(found)
    assert "layers/*/mlp " in text
    assert f"parameters: {found.parameters:,}" in text
    assert "  kv_heads: 8" in text


def test_refused() -> None:
    """A foreign configuration, an absurd one, and a row without tokens."""
    with pytest.raises(ValueError, match="time=0"):
        describe(CONFIG, time=0)
    with pytest.raises(ValueError, match="layers=1000000000"):
        describe(dataclasses.replace(CONFIG, layers=10**9))

    class Foreign(LlamaConfig):
        """Of no family."""

    with pytest.raises(TypeError, match="of no family"):
        describe(Foreign(**{f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(CONFIG)}))
