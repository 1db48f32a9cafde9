"""Random Llama configurations and models of transformers, with weights that make logits and their margins wide."""

import random
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["load_theirs", "random_config", "widened"]


def rope_of(rng: random.Random) -> dict[str, Any]:
    theta = rng.choice([1000.0, 10000.0, 500000.0])
    factor = rng.choice([1.5, 2.0, 8.0])
    original = rng.choice([16, 64])
    kinds: list[dict[str, Any]] = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": factor},
        {
            **{"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original},
            **{"low_freq_factor": rng.choice([1.0, 2.0]), "high_freq_factor": rng.choice([4.0, 8.0])},
        },
        {
            **{"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original},
            **rng.choice([{}, {"attention_factor": 1.2}, {"truncate": False}, {"beta_fast": 16.0, "beta_slow": 2.0}]),
        },
    ]
    return {"rope_theta": theta, **rng.choice(kinds)}


def random_config(seed: int) -> transformers.LlamaConfig:
    rng = random.Random(seed)
    kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    heads = kv_heads * group
    return transformers.LlamaConfig(
        vocab_size=rng.randint(20, 90),
        hidden_size=heads * rng.choice([4, 8]),
        intermediate_size=rng.randint(8, 50),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=rng.choice([None, 4, 10]),
        max_position_embeddings=rng.choice([64, 256]),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.4,
        attention_bias=rng.random() < 0.4,
        mlp_bias=rng.random() < 0.4,
        rope_parameters=rope_of(rng),
        eos_token_id=rng.choice([None, 2, [2, 5]]),
        attn_implementation="eager",
    )


def widened(config: transformers.LlamaConfig, seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            else:
                parameter.normal_(std=1.0 if "embed" in name else 1.3 * parameter.shape[1] ** -0.5)
    return model


def load_theirs(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
