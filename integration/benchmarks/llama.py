"""A small Llama with random weights, the same in every environment, and as a Hugging Face directory.

Sizes come as a mapping: `d`, `layers`, `heads`, optionally `kv_heads`, `ff`, `vocab` and `time`.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / ".nox" / "bench-llama"


def hf_config(c: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json; nothing ends a text."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c["vocab"],
        "hidden_size": c["d"],
        "intermediate_size": c["ff"],
        "num_hidden_layers": c["layers"],
        "num_attention_heads": c["heads"],
        "num_key_value_heads": c.get("kv_heads", c["heads"]),
        "max_position_embeddings": c["time"],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def shapes(c: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, as Hugging Face has them."""
    d, ff, vocab = c["d"], c["ff"], c["vocab"]
    kv = d // c["heads"] * c.get("kv_heads", c["heads"])
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    for i in range(c["layers"]):
        for name, rows in (("q", d), ("k", kv), ("v", kv), ("o", d)):
            out[f"model.layers.{i}.self_attn.{name}_proj.weight"] = (rows, d)
        for name, shape in (("gate", (ff, d)), ("up", (ff, d)), ("down", (d, ff))):
            out[f"model.layers.{i}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            out[f"model.layers.{i}.{name}.weight"] = (d,)
    return out | {"model.norm.weight": (d,)}


def parameters(c: Mapping[str, Any]) -> int:
    """How many there are."""
    return sum(math.prod(shape) for shape in shapes(c).values())


def weights(c: Mapping[str, Any], std: float | None = 0.02) -> dict[str, Any]:
    """Random weights of this standard deviation.

    With None they are for generation: what a layer adds is as large as what it gets, the best logits are far apart,
    and token 0 is never the best.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    out: dict[str, Any] = {}
    for name, shape in shapes(c).items():
        size = std or {"model.embed_tokens.weight": 1.0, "lm_head.weight": 4 * shape[-1] ** -0.5}.get(
            name, shape[-1] ** -0.5
        )
        out[name] = np.ones(shape, np.float32) if len(shape) == 1 else rng.normal(0, size, shape).astype(np.float32)
    if std is None:
        out["lm_head.weight"][0] = 0
    return out


def directory(c: Mapping[str, Any]) -> Path:
    """Write the Llama for generation and its tokenizer, unless the folder holds just these."""
    recipe = hashlib.sha256(json.dumps(dict(c)).encode() + Path(__file__).read_bytes()).hexdigest()
    stamp = FOLDER / "recipe"
    if stamp.exists() and stamp.read_text() == recipe:
        return FOLDER
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for name, content in {"config.json": hf_config(c), **tokenizer(c["vocab"])}.items():
        (FOLDER / name).write_text(json.dumps(content))
    write_tensors(FOLDER / "model.safetensors", weights(c, None))
    stamp.write_text(recipe)
    return FOLDER


def write_tensors(path: Path, tensors: Mapping[str, Any], kind: str = "F32", alignment: int = 8) -> None:
    """Write tensors as safetensors: the length of the header, the header, the values; of BF16 as unsigned integers.

    The values begin at a multiple of `alignment` bytes; most programs write 8.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.tobytes())


def tokenizer(vocab: int) -> dict[str, Any]:
    """The files of a tokenizer of ASCII characters and made-up words: a token is the same text wherever it stands."""
    end = "<|endoftext|>"
    names = [end, *map(chr, range(33, 127)), "Ġ"]
    names += [f"Ġw{index}" for index in range(len(names), vocab)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": end, "special": True, **flags}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {name: index for index, name in enumerate(names)}, "merges": []},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "eos_token": end}
    return {"tokenizer.json": description, "tokenizer_config.json": config}
