"""Hugging Face model directories in and out, tensor by tensor."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dovetail_models.hf_config import config_from_hf, config_to_hf
from dovetail_models.hf_fields import ConfigError
from dovetail_models.llama import Llama, LlamaConfig
from dovetail_models.state import merge, placements, split
from dovetail_runtime import Rules
from dovetail_weights import Reshape, Rule, Transpose, WeightMap, load, open_directory, save

__all__ = ["from_pretrained", "llama_map", "save_pretrained"]

TOKENIZER_FILES = ("tokenizer*", "*token*.json", "chat_template*", "vocab*", "merges.txt", "*.tiktoken", "spiece.model")


def llama_map(config: LlamaConfig) -> WeightMap:
    """Return how our parameters and the tensors of ``LlamaForCausalLM`` become each other.

    Linear layers are ``[out, in]`` there and ``[in, out]`` here, with the heads as an axis of their own. Both use the
    half layout of rotary embeddings, so nothing is permuted.
    """
    d, h, k, e = config.features, config.heads, config.groups, config.dim
    ours, theirs = "layers/{i}", "model.layers.{i}"
    rules = [
        Rule("embedding", "model.embed_tokens.weight"),
        Rule("norm/weight", "model.norm.weight"),
        Rule("head", "lm_head.weight", (Transpose(),)),
        Rule(f"{ours}/attention_norm/weight", f"{theirs}.input_layernorm.weight"),
        Rule(f"{ours}/mlp_norm/weight", f"{theirs}.post_attention_layernorm.weight"),
    ]
    for name, short, heads in (("query", "q", h), ("key", "k", k), ("value", "v", k)):
        weight, bias = f"{theirs}.self_attn.{short}_proj.weight", f"{theirs}.self_attn.{short}_proj.bias"
        split_heads = (Transpose(), Reshape((d, heads * e), (d, heads, e)))
        rules.append(Rule(f"{ours}/attention/{name}", weight, split_heads))
        rules.append(Rule(f"{ours}/attention/{name}_bias", bias, (Reshape((heads * e,), (heads, e)),)))
    rules.append(
        Rule(
            f"{ours}/attention/out", f"{theirs}.self_attn.o_proj.weight", (Transpose(), Reshape((h * e, d), (h, e, d)))
        )
    )
    rules.append(Rule(f"{ours}/attention/out_bias", f"{theirs}.self_attn.o_proj.bias"))
    for name in ("gate", "up", "down"):
        rules.append(Rule(f"{ours}/mlp/{name}", f"{theirs}.mlp.{name}_proj.weight", (Transpose(),)))
        rules.append(Rule(f"{ours}/mlp/{name}_bias", f"{theirs}.mlp.{name}_proj.bias"))
    return WeightMap(rules)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    param_dtype: Any = jnp.float32,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> Llama:
    """Return the model of a Hugging Face directory: ``config.json`` and safetensors, in one file or sharded.

    Tensors are read one by one; with a mesh each device is given its own part alone.

    Args:
        path: the directory.
        param_dtype: dtype of the parameters; float tensors are cast to it.
        dtype: dtype of activations, see `Llama`.
        mesh: where to put the parameters, together with `rules`; by default on the default device.
        rules: see `dovetail_models.placements`.

    Raises:
        ConfigError: the configuration is malformed or describes another model.
        dovetail_weights.WeightsError: tensors are missing, unexpected, of another shape, or damaged.
        FileNotFoundError: there is no such directory or file.
        ValueError: only one of `mesh` and `rules` is given.
    """
    if (mesh is None) != (rules is None):
        raise ValueError(f"mesh={mesh}, rules={rules}; expected both or neither")
    folder = Path(path)
    config = config_from_hf(_read_config(folder / "config.json"))
    tensors = open_directory(folder)
    if config.layers > len(tensors):
        raise ConfigError(f"num_hidden_layers={config.layers}, but the checkpoint has only {len(tensors)} tensors")

    def build() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, dtype=dtype)

    module = nnx.eval_shape(build)
    definition, like = split(module)
    places = None if mesh is None or rules is None else placements(module, mesh, rules)
    ignore = ["*.rotary_emb.inv_freq", *(["lm_head.weight"] if config.tied else [])]
    return merge(definition, load(tensors, llama_map(config), like, shardings=places, ignore=ignore))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is malformed: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected an object")
    return values


def save_pretrained(
    model: Llama,
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a model as a Hugging Face directory that transformers loads; all or nothing.

    Args:
        model: with plain (not quantized) parameters.
        path: the directory to make.
        tokenizer: a directory whose tokenizer files (``tokenizer.json``, chat template, ...) are copied beside the
            weights.
        token_ids: ``bos_token_id``, ``eos_token_id`` and the like, for config.json and generation_config.json.
        max_shard_bytes: see `dovetail_weights.write_directory`.
        overwrite: replace an existing directory.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        FileNotFoundError: `tokenizer` holds no tokenizer files.
        ConfigError: transformers has no such model.
        dovetail_weights.WeightsError: a parameter cannot be stored.
    """
    _, params = split(model)
    ids = dict(token_ids or {})
    name = str(np.dtype(jax.tree.leaves(params)[0].dtype))
    files: dict[str, str | bytes] = {}
    if tokenizer is not None:
        files |= _tokenizer_files(Path(tokenizer))
    files["config.json"] = _json(config_to_hf(model.config, dtype=name, token_ids=ids))
    files["generation_config.json"] = _json(ids)
    return save(
        Path(path),
        llama_map(model.config),
        params,
        extra_files=files,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    found = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    if not found:
        raise FileNotFoundError(f"{folder} holds no tokenizer files; expected tokenizer.json or its like")
    return {file.name: file.read_bytes() for file in found}


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
