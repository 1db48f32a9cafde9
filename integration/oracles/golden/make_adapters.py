"""Write packages/models/tests/golden/adapters: adapters of `peft` for some golden checkpoints, with their logits.

Run inside the oracle environment `hf` (torch 2.13.0, transformers 5.23, peft 0.21.2): ``python make_adapters.py``.
"""

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import peft
import torch
import transformers

GOLDEN = pathlib.Path(__file__).parents[3] / "packages/models/tests/golden"
ATTENTION, DENSE = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("gqa_llama3", {"target_modules": [*ATTENTION, *DENSE, "embed_tokens", "lm_head"]}),
    "rslora_patterns": (
        "qwen3_head_norms",
        {
            **{"target_modules": r".*\.(q_proj|up_proj|down_proj)", "use_rslora": True},
            **{"rank_pattern": {"q_proj": 1}, "alpha_pattern": {r"1\.mlp\.up_proj": 9}},
        },
    ),
    "dora_fused": ("phi3_longrope", {"target_modules": ["qkv_proj", "gate_up_proj", "embed_tokens"], "use_dora": True}),
    "fused": ("gpt2_learned_positions", {"target_modules": ["c_attn", "c_fc", "wpe"]}),
    "tied": ("gqa_tied_linear", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "experts": ("mixtral_experts", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


def make(name: str, checkpoint: str, options: dict[str, Any]) -> None:
    """Write one adapter, of random values that change the logits much."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / checkpoint, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=3, **options)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.mul_(0.5 + torch.rand(parameter.shape))
            elif "lora_" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 9)))
        logits = model(tokens).logits.numpy()
    folder = GOLDEN / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    values = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": checkpoint}
    (folder / "adapter_config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    np.savez(folder / "expected.npz", tokens=tokens.numpy().astype(np.int32), logits=logits, base=np.array(checkpoint))


if __name__ == "__main__":
    for name, (checkpoint, options) in ADAPTERS.items():
        make(name, checkpoint, options)
