"""Write packages/models/tests/golden: tiny random encoders with their outputs and gradients.

The configurations are those of packages/models/tests/encoders.toml. Run inside the oracle environment `hf` (torch
2.13.0, transformers 5.23): ``python make_encoders.py [names]``, by default all.
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

ROOT = pathlib.Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "integration/oracles/hf"))

from encoders import inputs_of, named_arrays, their_outputs, widen  # noqa: E402

TESTS = ROOT / "packages/models/tests"
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_SIZES = {"d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2, "d_kv": 4}


def configuration(architecture: str, hf: dict[str, Any]) -> Any:
    values = {name: None if value is False and name.endswith("_id") else value for name, value in hf.items()}
    kind = getattr(transformers, architecture).config_class
    if architecture == "SiglipModel":
        return kind(**{name: SIZES | tower for name, tower in values.items()})
    return kind(**(T5_SIZES if architecture.startswith("T5") else SIZES) | values)


def make(name: str, case: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    kind = getattr(transformers, case["architecture"])
    model = kind._from_config(configuration(case["architecture"], case["hf"]), attn_implementation="eager").eval()
    widen(model)
    folder = TESTS / "golden" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)

    inputs = inputs_of(model.config, seed, time=13)
    outputs = their_outputs(model, inputs)
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=out.shape).astype(np.float32) for out in outputs]
    sum((out * torch.from_numpy(w)).sum() for out, w in zip(outputs, weights, strict=True)).backward()
    arrays = {f"input {key}": value for key, value in inputs.items()}
    arrays |= {f"output {i}": out.detach().numpy() for i, out in enumerate(outputs)}
    arrays |= {f"weight {i}": w for i, w in enumerate(weights)}
    with tempfile.TemporaryDirectory() as gradients:
        found = named_arrays(model, gradients, lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
        arrays |= {f"gradient {key}": np.array(found.read(key)) for key in found}
    np.savez_compressed(folder / "expected.npz", **arrays)


def main() -> None:
    cases = tomllib.loads((TESTS / "encoders.toml").read_text())
    for seed, (name, case) in enumerate(cases.items()):
        if name in (sys.argv[1:] or cases):
            make(name, case, seed)


if __name__ == "__main__":
    main()
