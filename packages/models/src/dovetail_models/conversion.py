"""Checkpoints to checkpoints, tensor by tensor: another dtype, other shards, without what a model does not need."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail_models.family import Family
from dovetail_models.hf_directory import open_pretrained
from dovetail_models.hf_files import FURTHER_FILES, files_like
from dovetail_models.lazy_parts import cast
from dovetail_weights import write_directory

__all__ = ["convert"]

DTYPES = ("bfloat16", "float16", "float32")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    family: Family | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face directory again, tensor by tensor, and return its path; all or nothing.

    Configuration and headers are checked as `from_pretrained` does before anything is written. Tensors that the model
    does not need (old buffers, copies of a tied embedding) are left out, old names become those of today; the other
    fields of ``config.json``, the tokenizer's files and the generation settings stay.

    Args:
        source: the directory to read, or a name of the hub, see `from_pretrained`.
        revision: of the hub.
        destination: the directory to make.
        dtype: of the floating-point tensors: ``"bfloat16"``, ``"float16"`` or ``"float32"``; None for their own.
        max_shard_bytes: see `dovetail_weights.write_directory`.
        family: how to read it, or its architecture, see `from_pretrained`.
        overwrite: replace an existing directory.

    Raises:
        ConfigError: the configuration is malformed or describes another model.
        dovetail_weights.WeightsError: tensors are missing, unexpected, of another shape, damaged, or too large for
            `dtype`.
        FileExistsError: `destination` exists and `overwrite` is not set.
        FileNotFoundError: there is no such directory or file.
        HubError: the hub does not give the model.
        ValueError: `dtype` is none of these, or a revision of a directory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected one of {', '.join(DTYPES)}")
    opened = open_pretrained(source, family, revision)
    tensors = {name: cast(theirs, opened.tensors[theirs], dtype) for name, theirs in opened.check().items()}
    stored = sorted({str(tensor.dtype) for tensor in tensors.values()})
    values = _with_dtype(opened.values, stored[0]) if len(stored) == 1 else dict(opened.values)
    if "architectures" in values:
        values["architectures"] = [opened.family.config_map.architecture]
    files: dict[str, str | bytes] = {**files_like(opened.path, FURTHER_FILES)}
    files["config.json"] = json.dumps(values, indent=2) + "\n"
    return write_directory(
        Path(destination), tensors, max_shard_bytes=max_shard_bytes, extra_files=files, overwrite=overwrite
    )


def _with_dtype(values: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a ``config.json`` whose note of the dtype is true; transformers 4 and 5 have names of their own for it."""
    noted = [name for name in ("torch_dtype", "dtype") if name in values] or ["torch_dtype"]
    return {**values, **dict.fromkeys(noted, dtype)}
