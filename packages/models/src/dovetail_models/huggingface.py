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

from dovetail_models.hf_config import ConfigError, config_from_hf, config_to_hf
from dovetail_models.llama import Llama, LlamaConfig
from dovetail_models.state import abstract, merge, split
from dovetail_weights import Reshape, Rule, Transpose, WeightMap, load, save

__all__ = ["from_pretrained", "llama_map", "save_pretrained"]


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
    path: str | os.PathLike[str], *, param_dtype: Any = jnp.float32, dtype: Any = None, shardings: Any = None
) -> Llama:
    """Return the model of a Hugging Face directory: ``config.json`` and safetensors, in one file or sharded.

    Tensors are read one by one, each straight into its sharding.

    Args:
        path: the directory.
        param_dtype: dtype of the parameters; float tensors are cast to it.
        dtype: dtype of activations, see `Llama`.
        shardings: one sharding, a tree of them, or a function from the abstract parameters to either.

    Raises:
        ConfigError: the configuration is malformed or describes another model.
        dovetail_weights.WeightsError: tensors are missing, unexpected, of another shape, or damaged.
        FileNotFoundError: there is no such directory or file.
    """
    folder = Path(path)
    config = config_from_hf(_read_config(folder / "config.json"))

    def build() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, dtype=dtype)

    definition, like = abstract(build)
    if callable(shardings):
        shardings = shardings(like)
    ignore = ["*.rotary_emb.inv_freq", *(["lm_head.weight"] if config.tied else [])]
    return merge(definition, load(folder, llama_map(config), like, shardings=shardings, ignore=ignore))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face model directory")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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
        tokenizer: a directory whose files are copied beside the weights.
        token_ids: ``bos_token_id``, ``eos_token_id`` and the like, for config.json and generation_config.json.
        max_shard_bytes: see `dovetail_weights.write_directory`.
        overwrite: replace an existing directory.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        dovetail_weights.WeightsError: a parameter cannot be stored.
    """
    _, params = split(model)
    ids = dict(token_ids or {})
    name = str(np.dtype(jax.tree.leaves(params)[0].dtype))
    files: dict[str, str | bytes] = {}
    if tokenizer is not None:
        files |= {file.name: file.read_bytes() for file in sorted(Path(tokenizer).iterdir()) if file.is_file()}
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


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
