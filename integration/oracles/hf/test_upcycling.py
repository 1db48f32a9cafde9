"""A dense checkpoint, upcycled, is the same model for transformers, with the experts of its own families."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import EAGER, load_theirs

from dovetail_models import upcycle

SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.LlamaConfig(**SIZES), "MixtralForCausalLM"),
        (transformers.MistralConfig(**SIZES, sliding_window=8), "MixtralForCausalLM"),
        (transformers.Qwen3Config(**SIZES, head_dim=12), "Qwen3MoeForCausalLM"),
    ],
    ids=["llama", "mistral", "qwen3"],
)
@pytest.mark.parametrize(("experts", "top_k", "granularity"), [(4, 2, 1), (64, 8, 8)])
def test_upcycled_logits(
    config: Any, expected: str, experts: int, top_k: int, granularity: int, tmp_path: Path
) -> None:
    """Mixtures of whole copies, and the reference case of 64 slices of which 8 are one copy."""
    torch.manual_seed(0)
    dense = transformers.AutoModelForCausalLM.from_config(config, **EAGER).float().eval()
    dense.save_pretrained(tmp_path / "dense")
    made = upcycle(tmp_path / "dense", experts=experts, top_k=top_k, granularity=granularity)
    made.save(tmp_path / "sparse")
    sparse = load_theirs(tmp_path / "sparse")
    assert type(sparse).__name__ == expected
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 48, (2, 20)))
    with torch.no_grad():
        torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=0)
