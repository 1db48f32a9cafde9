"""If these fail, a part of an adapter is left out and nobody told, or a whole one is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from model_toys import ENCODERS, MODELS
from peft_files import edited, rewritten, same, without
from test_lora import filled

from dovetail_models import add_lora, load_lora, lora_of, save_lora
from dovetail_models.adapter import flat_adapter
from dovetail_weights import SafetensorsFile

NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a module": ("dense", {"target_modules": ["k_prj"]}, "target_modules.*nearest to 'k_prj' are: k_proj"),
    "its end": ("dense", {"target_modules": ["attn.q_proj"]}, "nearest to 'attn.q_proj' are: self_attn.q_proj"),
    "a whole name": (
        "dense",
        {"target_modules": ["model.layers.7.mlp.up_proj"]},
        r"nearest to 'model.layers.7.mlp.up_proj' are: model.layers.0.mlp.up_proj",
    ),
    "an expression": ("dense", {"target_modules": r".*\.k_prj"}, r"target_modules='.*k_prj' in .* matches no module"),
    "a parameter": (
        "dense",
        {"target_parameters": ["mlp.experts.down_proj"]},
        "target_parameters.*are: none, there are no",
    ),
    "one of experts": (
        "mixtral",
        {"target_parameters": ["experts.gate_proj"]},
        "target_parameters.*nearest to 'experts.gate_proj' are: experts.gate_up_proj",
    ),
    "experts as modules": ("mixtral", {"target_modules": ["experts"]}, "target_modules.*'experts'"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_that_the_model_does_not_have(name: str, folder: Path, build: Any) -> None:
    """What was meant would be left out, and nobody told."""
    model, changes, match = NAMES[name]
    kind, config = MODELS["mixtral"]
    base = kind(config, rngs=nnx.Rngs(0)) if model == "mixtral" else build()
    if model == "mixtral":
        save_lora(add_lora(base, "layers/*/attention/query", rank=2, rngs=nnx.Rngs(1)), folder, overwrite=True)
    with pytest.raises(ValueError, match=match):
        load_lora(edited(folder, **changes), base)


def test_names_for_other_models_as_well(folder: Path, build: Any) -> None:
    """Lists that fit many models are common; the tensors tell what is meant."""
    given = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    expected = load_lora(folder, build())
    same(load_lora(edited(folder, target_modules=[*given, "query_key_value"]), build()), expected)


LACKING: dict[str, tuple[str, str, str]] = {
    "a layer": ("lora", "layers.1.", r"^7 of 16 modules that .* have no tensors: model\.layers\.1\.\S+, .*whole"),
    "a module": ("lora", "layers.0.mlp.up", r"^1 of 16 modules .*: model\.layers\.0\.mlp\.up_proj; expected A and B"),
    "an embedding": ("lora", "embed_tokens", "no tensors: model.embed_tokens;"),
    "a head": ("lora", "lm_head", "no tensors: lm_head;"),
    "more than a message shows": ("lora", "layers.", r"^14 of 16 .* and 6 more; expected"),
    "one that an expression names": (
        "rslora_patterns",
        "layers.1.self_attn",
        r"no tensors: model\.layers\.1\.self_attn\.q_proj;",
    ),
    "a fused one": ("fused", "h.1.attn", r"no tensors: transformer\.h\.1\.attn\.c_attn;"),
    "experts": (
        "experts",
        "layers.1.mlp.experts",
        r"no tensors: model\.layers\.1\.mlp\.experts\.down_proj, model\S+gate_up_proj;",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_tensors_that_are_missing(name: str, golden: Path, tmp_path: Path) -> None:
    """What the configuration adapts and the file does not have would stay as the base has it, and nobody told."""
    adapter, part, match = LACKING[name]
    base = str(np.load(golden / "adapters" / adapter / "expected.npz")["base"])
    with pytest.raises(ValueError, match=match):
        load_lora(without(shutil.copytree(golden / "adapters" / adapter, tmp_path / "a"), part), golden / base)


WAYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "some layers": (
        "lora",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
        r".*\.0\..*\.(q|up)_proj",
    ),
    "of a list": (
        "lora",
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        r".*\.1\..*\.(q|up)_proj",
    ),
    "whole names in spite of them": (
        "lora",
        {"target_modules": ["q_proj", "model.layers.1.self_attn.v_proj"], "layers_to_transform": [0]},
        r".*\.0\..*\.q_proj|.*\.1\..*\.v_proj",
    ),
    "exclusions": (
        "lora",
        {"target_modules": ["q_proj", "k_proj", "vision.q_proj"], "exclude_modules": r"vision.*|.*\.1\..*"},
        r".*\.0\..*\.(q|k)_proj",
    ),
    "excluded ends": ("lora", {"exclude_modules": ["up_proj", "lm_head"]}, r".*(?<!up_proj|lm_head)"),
    "all linear modules": ("lora", {"target_modules": "all-linear"}, r".*layers.*"),
    "an expression": ("rslora_patterns", {"target_modules": r".*\.0\..*\.(q_proj|up_proj)"}, r".*\.0\..*(q|up)_proj"),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_adapt_less(name: str, golden: Path, tmp_path: Path) -> None:
    """What `peft` would not adapt is not missing, and the rest is."""
    adapter, changes, chosen = WAYS[name]
    base = golden / str(np.load(golden / "adapters" / adapter / "expected.npz")["base"])
    folder = edited(shutil.copytree(golden / "adapters" / adapter, tmp_path / "a"), **changes)
    held = SafetensorsFile(folder / "adapter_model.safetensors")
    modules = {name: name.removeprefix("base_model.model.").split(".lora_")[0] for name in held if ".lora_" in name}
    kept = sorted({module for module in modules.values() if re.fullmatch(chosen, module)})
    folder = rewritten(folder, **{name: None for name, module in modules.items() if module not in kept})
    assert len(flat_adapter(load_lora(folder, base))) == len(kept)
    with pytest.raises(ValueError, match=f"no tensors: {kept[-1]};"):
        load_lora(without(folder, f"{kept[-1]}."), base)


def test_lists_that_layers_are_counted_in(tmp_path: Path) -> None:
    """Of several numbers in a name `peft` takes the last one, unless the list is named."""
    kind, config = ENCODERS["t5"]
    base = kind(config, rngs=nnx.Rngs(0))
    model = filled(add_lora(base, "layers/*/attention/query", rank=2, rngs=nnx.Rngs(1)))
    folder = edited(save_lora(model, tmp_path / "out"), target_modules=["q"], layers_to_transform=[0])
    same(load_lora(folder, base), lora_of(model))
    with pytest.raises(ValueError, match=r"block.1.layer.0.SelfAttention.q: there are tensors for it"):
        load_lora(edited(folder, layers_pattern=["block"]), base)
    assert len(flat_adapter(load_lora(without(folder, "block.1."), base))) == 1


def test_heads_that_look_ahead_are_none_of_theirs(tmp_path: Path) -> None:
    """transformers leaves them out, so that an adapter from there has none for them."""
    kind, config = MODELS["glm4_moe"]
    base = kind(config, rngs=nnx.Rngs(0))
    model = filled(add_lora(base, "layers/*/attention/query", rank=2, rngs=nnx.Rngs(1)))
    folder = edited(save_lora(model, tmp_path / "out"), target_modules=["q_proj"])
    same(load_lora(folder, base), lora_of(model))
