"""Adapters to and from directories of Hugging Face's `peft`: ``adapter_model.safetensors`` and its configuration."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from dovetail_models.adapter import Adapter, flat_adapter
from dovetail_models.adapter_slots import lora_of
from dovetail_models.family import Family, family_of
from dovetail_models.hf_directory import open_pretrained
from dovetail_models.lazy_model import LazyModel
from dovetail_models.lora import check_finite
from dovetail_models.peft_config import CONFIG
from dovetail_models.peft_reading import PeftConfig, read_adapter
from dovetail_models.peft_targets import find_targets
from dovetail_models.peft_writing import written
from dovetail_models.state import nested
from dovetail_weights import SafetensorsFile, write_directory

__all__ = ["load_lora", "save_lora"]

STEM = "adapter_model"


def load_lora(path: str | os.PathLike[str], model: Any, *, family: Family | str | None = None) -> Adapter:
    """Return the adapter of a directory of `peft`: LoRA, rsLoRA or DoRA, with ranks and alphas of single modules.

    Tensors that several of our weights share there (queries, keys and values, say) give each of them their first array.
    `with_lora` puts the adapter on, `merge_lora` adds it up.

    Args:
        path: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: that it is for: a model, a directory or a `LazyModel`; its values are not read.
        family: the model's, where it is none of this package's; of a directory also its architecture.

    Raises:
        ConfigError: the configuration is malformed, or has a field that is not supported (``modules_to_save``, biases).
        ValueError: a tensor is for no weight of the model, or of another shape or rank than it has; the configuration
            names what the model does not have, or what has no tensors; an embedding is adapted apart from the
            unembedding that is tied to it; or a tensor holds NaN. The message names it. Or `family` is a name, and
            `model` no directory.
        dovetail_weights.WeightsError: the file of tensors is damaged.
        FileNotFoundError: there is no such directory or file.
    """
    folder = Path(path)
    config = PeftConfig.read(folder)
    if not (folder / f"{STEM}.safetensors").exists():
        raise FileNotFoundError(f"{folder / f'{STEM}.safetensors'} does not exist; save the adapter as safetensors")
    kind, model_config = _kind(model, family)
    targets, _ = find_targets(kind, model_config)
    flat = read_adapter(SafetensorsFile(folder / f"{STEM}.safetensors"), config, targets, model_config)
    for address, part in flat.items():
        check_finite(f"{address} of the adapter in {folder}", part)
    return nested(flat)


def save_lora(
    model: Any,
    path: str | os.PathLike[str],
    *,
    adapter: Adapter | None = None,
    base: str | None = None,
    family: Family | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a directory that `peft` loads onto the model that transformers has; all or nothing.

    Weights that share a tensor there get one adapter, of the sum of their ranks unless they have the same first array.
    An adapter of an embedding that is the unembedding, too, is written for both. Scales become alphas. Parameters of
    experts have one rank there, to which all of them are padded.

    Args:
        model: with adapters; or, where one is given, the model that it is for: a model, a directory or a `LazyModel`.
        path: the directory to make.
        adapter: to write; None for the model's.
        base: name or path of the base model, for ``adapter_config.json``.
        family: how to write it; None for the model's own.
        overwrite: replace an existing directory.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        TypeError: `model` is a directory or a `LazyModel`, and no adapter is given.
        ValueError: there is no adapter; a weight that is no linear layer, embedding or parameter of experts there, or
            whose magnitudes `peft` has no place for; only some weights with magnitudes; or NaN. The message names it.
        dovetail_weights.WeightsError: a dtype that cannot be stored.
    """
    flat = flat_adapter(lora_of(model) if adapter is None else adapter)
    for address, part in flat.items():
        check_finite(address, part)
    kind, config = _kind(model, family)
    tensors, settings, swapped = written(flat, *find_targets(kind, config), config)
    architecture = kind.config_map.architecture
    task = "CAUSAL_LM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else None
    files: Mapping[str, str | bytes] = {CONFIG: settings.write(base=base, task=task, swapped=swapped)}
    limit = sum(tensor.nbytes for tensor in tensors.values())
    return write_directory(
        Path(path), tensors, max_shard_bytes=max(limit, 1), extra_files=files, overwrite=overwrite, stem=STEM
    )


def _kind(model: Any, family: Family | str | None) -> tuple[Family, Any]:
    """Return family and configuration of a model, a directory, or a lazy model."""
    if not isinstance(model, LazyModel | nnx.Module):
        opened = open_pretrained(model, family)
        return opened.family, opened.config
    if isinstance(family, str):
        raise ValueError(
            f"family={family!r} says how a directory is read, and the model is {type(model).__name__}; expected "
            "family=None, or a Family"
        )
    if family is None:
        family = model.family if isinstance(model, LazyModel) else family_of(model)
    return family, model.config  # pyright: ignore
