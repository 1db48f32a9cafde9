"""Write packages/models/tests/golden: tiny random checkpoints of every family with their logits and gradients.

The configurations are those of packages/models/tests/matrix.toml. Run inside the oracle environment `hf` (torch 2.13.0,
transformers 5.23): ``python make_models.py [names]``, by default all. Logits and gradients are computed in float64.
"""

import json
import pathlib
import shutil
import sys
import tempfile
import tomllib
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

TESTS = pathlib.Path(__file__).parents[3] / "packages/models/tests"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.125,
}
GRADIENTS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.q_proj.bias",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.k_norm.weight",
    "model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.1.self_attn.o_proj.bias",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.mlp.gate_proj.bias",
    "model.layers.0.self_attn.sinks",
    "model.layers.0.self_attn.q_a_proj.weight",
    "model.layers.0.self_attn.q_a_layernorm.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.bias",
    "model.layers.1.self_attn.kv_a_layernorm.weight",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.mlp.shared_experts.up_proj.weight",
    "model.layers.1.mlp.router.weight",
    "model.layers.1.mlp.router.bias",
    "model.layers.1.mlp.experts.gate_up_proj",
    "model.layers.1.mlp.experts.down_proj_bias",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.experts.1.down_proj.weight",
    "model.layers.1.block_sparse_moe.gate.weight",
    "model.layers.1.block_sparse_moe.experts.1.w1.weight",
    *(f"model.layers.0.linear_attn.{name}" for name in ("in_proj_qkvz.weight", "in_proj_ba.weight", "conv1d.weight")),
    *(f"model.layers.0.linear_attn.{name}" for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight")),
    *(f"model.layers.1.mlp.{name}.weight" for name in ("shared_expert.up_proj", "shared_expert_gate")),
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.self_attn.qkv_proj.weight",
    "model.layers.1.mlp.gate_up_proj.weight",
    *(f"transformer.{name}.weight" for name in ("wte", "wpe", "ln_f")),
    *(f"transformer.h.0.{name}" for name in ("attn.c_attn.weight", "attn.c_attn.bias", "ln_1.bias")),
    *(f"transformer.h.1.{name}" for name in ("attn.c_proj.weight", "mlp.c_fc.bias", "mlp.c_proj.weight")),
    "backbone.embeddings.weight",
    *(f"backbone.layers.0.mixer.{name}" for name in ("A_log", "D", "dt_bias", "in_proj.bias", "norm.weight")),
    *(f"backbone.layers.1.mixer.{name}" for name in ("conv1d.weight", "conv1d.bias", "out_proj.weight")),
)


def widen(model: torch.nn.Module) -> None:
    """Draw parameters that make logits and their margins wide, and biases and norms that matter."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("linear_attn.A_log"):
                parameter.uniform_(-1.5, -0.5)
            elif "norm" in name or name.endswith(("A_log", ".D")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias") or parameter.ndim == 1:
                parameter.normal_(std=0.3)
            else:
                inputs = parameter.shape[-1 if "conv" in name else 1]
                parameter.normal_(std=1.0 if "embed" in name else 1.3 * inputs**-0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.normal_(std=0.1)


def old_style(folder: pathlib.Path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    values["torch_dtype"] = values.pop("dtype")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def stored_gradients(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Return some gradients under the names of a checkpoint, in which experts stand one by one; spoils the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        stored = load_file(pathlib.Path(folder) / "model.safetensors")
    return {name: tensor for name, tensor in stored.items() if name in GRADIENTS}


def make(name: str, case: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    store = case.get("store", {})
    values = {
        name: None if value is False and name.endswith(("_id", "_rank")) else value
        for name, value in case["hf"].items()
    }
    known = transformers.CONFIG_MAPPING[case["family"]]
    sizes = {name: value for name, value in SIZES.items() if hasattr(known, name)}
    config = known(**(sizes | values))
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER).float().eval()
    widen(model)
    if "dtype" in store:
        model = model.to(getattr(torch, store["dtype"]))
    folder = TESTS / "golden" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=store.get("shard", "5GB"))
    if store.get("old_style"):
        old_style(folder)

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **EAGER)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 21))
    targets = torch.randint(0, SIZES["vocab_size"], (2, 21))
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    gradients = stored_gradients(model)
    arrays = {"tokens": tokens.numpy().astype(np.int32), "targets": targets.numpy().astype(np.int32)}
    arrays |= {"logits": logits.detach().numpy().astype(np.float32), "loss": np.float32(loss.item())}
    arrays |= {name: gradient.astype(np.float32) for name, gradient in gradients.items()}
    np.savez_compressed(folder / "expected.npz", **arrays)


def main() -> None:
    matrix = tomllib.loads((TESTS / "matrix.toml").read_text())
    for seed, (name, case) in enumerate(matrix.items()):
        if name in (sys.argv[1:] or matrix):
            make(name, case, seed)


if __name__ == "__main__":
    main()
