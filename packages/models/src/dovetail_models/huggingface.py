"""Hugging Face model directories in and out, tensor by tensor."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dovetail_models.family import Family, family_of, named_family
from dovetail_models.hf_directory import open_pretrained
from dovetail_models.hf_files import tokenizer_files
from dovetail_models.state import check_no_adapters, merge, placements, split
from dovetail_runtime import Rules
from dovetail_weights import WeightMap, load, save

__all__ = ["config_from_hf", "config_to_hf", "from_pretrained", "save_pretrained", "weight_map"]


def config_from_hf(values: Mapping[str, Any]) -> Any:
    """Return the configuration of a parsed ``config.json`` (of transformers 4 or 5).

    Raises:
        ConfigError: an unknown architecture, a missing or malformed field, or one that the model cannot honour.

    >>> sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> config_from_hf({"architectures": ["LlamaForCausalLM"], **sizes, "num_attention_heads": 2}).dim
    4
    """
    return named_family(values).config_map.read(values)


def config_to_hf(config: Any, *, dtype: str, token_ids: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the ``config.json`` of a configuration, see `ConfigMap.write`."""
    return family_of(config).config_map.write(config, dtype=dtype, token_ids=token_ids)


def weight_map(config: Any) -> WeightMap:
    """Return how the parameters of a configuration's model and the tensors of its checkpoints become each other.

    It knows the parameters of stacked layers, too, as models with ``scan=True`` have them.
    """
    return family_of(config).table(config)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    family: Family | str | None = None,
    param_dtype: Any = jnp.float32,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    mapped: bool = False,
    **options: Any,
) -> Any:
    """Return the model of a Hugging Face directory: ``config.json`` and safetensors, in one file or sharded.

    Tensors are read one by one; with a mesh each device is given its own part alone.

    Args:
        path: the directory; or, where there is none of that name, a model of the hub such as ``"org/name"``, which is
            downloaded once (with the extra ``hub``; the token and the cache are those of `huggingface_hub`).
        revision: branch, tag or commit of a model of the hub; None for its main branch.
        family: how to read it; None for the one that ``config.json`` names. An architecture such as
            ``"T5EncoderModel"`` reads that part out of a larger model.
        param_dtype: dtype of the parameters; float tensors are cast to it.
        dtype: dtype of activations and products; None for `param_dtype`.
        mesh: where to put the parameters, together with `rules`; by default on the default device.
        rules: see `dovetail_models.placements`.
        mapped: on one CPU, use tensors of `param_dtype` where they stand in the files, see `dovetail_weights.load`; for
            directories that `save_pretrained` or `convert` wrote.
        options: further arguments of the model, such as ``scan=True`` or ``remat="full"``.

    Raises:
        ConfigError: the configuration is malformed or describes another model.
        dovetail_weights.WeightsError: tensors are missing, unexpected, of another shape, or damaged.
        FileNotFoundError: there is no such directory or file.
        HubError: the hub does not give the model.
        ValueError: only one of `mesh` and `rules` is given, or a revision of a directory.
    """
    if (mesh is None) != (rules is None):
        raise ValueError(f"mesh={mesh}, rules={rules}; expected both or neither")
    opened = open_pretrained(path, family, revision)
    module = opened.module(param_dtype=param_dtype, dtype=dtype, **options)
    definition, like = split(module)
    places = None if mesh is None or rules is None else placements(module, mesh, rules)
    table, ignored = opened.table(like), opened.ignored
    return merge(definition, load(opened.tensors, table, like, shardings=places, ignore=ignored, mapped=mapped))


def save_pretrained(
    model: Any,
    path: str | os.PathLike[str],
    *,
    family: Family | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a model as a Hugging Face directory that transformers loads; all or nothing.

    Args:
        model: with plain (neither quantized nor adapted) parameters.
        path: the directory to make.
        family: how to write it; None for the model's own.
        tokenizer: a directory whose tokenizer files (``tokenizer.json``, chat template, ...) are copied beside the
            weights.
        token_ids: ``bos_token_id``, ``eos_token_id`` and the like, for config.json and generation_config.json.
        max_shard_bytes: see `dovetail_weights.write_directory`.
        overwrite: replace an existing directory.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        FileNotFoundError: `tokenizer` holds no tokenizer files.
        ConfigError: transformers has no such model.
        ValueError: a parameter has an adapter.
        dovetail_weights.WeightsError: a parameter cannot be stored.
    """
    family = family_of(model) if family is None else family
    check_no_adapters(model)
    _, params = split(model)
    ids = dict(token_ids or {})
    name = str(np.dtype(jax.tree.leaves(params)[0].dtype))
    files: dict[str, str | bytes] = {}
    if tokenizer is not None:
        files |= tokenizer_files(Path(tokenizer))
    files["config.json"] = _json(family.config_map.write(model.config, dtype=name, token_ids=ids))
    files["generation_config.json"] = _json(ids)
    return save(
        Path(path),
        family.table(model.config),
        params,
        extra_files=files,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"
