"""Write packages/models/tests/golden: tiny random models for texts with images, with their logits and gradients.

The configurations are those of packages/models/tests/multimodal.toml. Run inside the oracle environment `hf` (torch
2.13.0, transformers 5.23): ``python make_multimodal.py [names]``, by default all.
"""

import pathlib
import shutil
import sys
import tempfile
import tomllib
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

ROOT = pathlib.Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "integration/oracles/hf"))

from encoders import named_arrays  # noqa: E402
from multimodal import Batch, load_theirs, theirs_loss, widen  # noqa: E402

TESTS = ROOT / "packages/models/tests"
TEXT = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,  # its embedding would get no gradient there
}
VISION = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vision_use_head": False}


def configuration(hf: dict[str, Any]) -> Any:
    values = {name: None if value is False and name.endswith("_id") else value for name, value in hf["model"].items()}
    return transformers.Gemma3Config(
        text_config=TEXT | hf["text_config"], vision_config=VISION | hf["vision_config"], **values
    )


def names_of_the_hub(folder: pathlib.Path) -> None:
    """Name the encoder's tensors as in original checkpoints."""
    tensors = load_file(folder / "model.safetensors")
    new = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})


def make(name: str, case: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    kind = getattr(transformers, case["architecture"])
    model = kind._from_config(configuration(case["hf"]), attn_implementation="eager").eval()
    widen(model)
    folder = TESTS / "golden" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    if case.get("names") == "hub":
        names_of_the_hub(folder)

    model = load_theirs(folder)
    batch = Batch(model.config, seed)
    logits, loss = theirs_loss(model, batch)
    loss.backward()
    arrays = {"tokens": batch.tokens.astype(np.int32), "targets": batch.targets.astype(np.int32)}
    arrays |= {"pixels": batch.pixels, "logits": logits.detach().numpy(), "loss": np.float32(loss.item())}
    with tempfile.TemporaryDirectory() as gradients:
        found = named_arrays(model, gradients, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
        arrays |= {f"gradient {key}": np.array(found.read(key)) for key in found}
    np.savez_compressed(folder / "expected.npz", **arrays)


def main() -> None:
    cases = tomllib.loads((TESTS / "multimodal.toml").read_text())
    for seed, (name, case) in enumerate(cases.items()):
        if name in (sys.argv[1:] or cases):
            make(name, case, seed)


if __name__ == "__main__":
    main()
