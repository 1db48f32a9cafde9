"""Write packages/kernels/tests/golden/rope.npz: rotary frequencies and rotated vectors of Hugging Face transformers.

Run inside the oracle environment `hf` (torch 2.13.0, transformers 5.23): ``python make_rope.py``.
"""

import json
import pathlib
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

OUT = pathlib.Path(__file__).parents[3] / "packages/kernels/tests/golden/rope.npz"
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: list[tuple[int, float, dict[str, Any]]] = [
    (8, 10000.0, {"rope_type": "default"}),
    (128, 500000.0, {"rope_type": "default"}),
    (64, 10000.0, {"rope_type": "linear", "factor": 4.0}),
    (128, 500000.0, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}),
    (64, 500000.0, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}),
    (16, 10000.0, {**LLAMA3, "factor": 2.0, "original_max_position_embeddings": 64}),
    (128, 10000.0, {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096}),
    (64, 1000000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16.0}),
    (64, 150000.0, {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}),
    (
        16,
        10000.0,
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    ),
]
POSITIONS = [0, 1, 2, 7, 100, 1023, 4095, 40000]


def main() -> None:
    arrays: dict[str, np.ndarray] = {"positions": np.array(POSITIONS, np.int32)}
    generator = torch.Generator().manual_seed(0)
    for i, (dim, theta, parameters) in enumerate(CASES):
        config = LlamaConfig(
            hidden_size=2 * dim,
            num_attention_heads=2,
            max_position_embeddings=131072,
            rope_parameters={**parameters, "rope_theta": theta},
        )
        rotary = LlamaRotaryEmbedding(config)
        x = torch.randn(1, len(POSITIONS), 2, dim, generator=generator)
        cos, sin = rotary(x, torch.tensor([POSITIONS]))
        rotated, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
        arrays[f"{i}/frequencies"] = rotary.inv_freq.numpy()
        arrays[f"{i}/factor"] = np.float64(rotary.attention_scaling)
        arrays[f"{i}/x"], arrays[f"{i}/rotated"] = x[0].numpy(), rotated[0].numpy()
    cases = json.dumps([{"dim": dim, "theta": theta, **parameters} for dim, theta, parameters in CASES])
    OUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(OUT, cases=np.array(cases), **arrays)


if __name__ == "__main__":
    main()
