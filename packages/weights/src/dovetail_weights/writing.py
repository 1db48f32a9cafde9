"""Writing Hugging Face directories of safetensors: tensor by tensor, all or nothing."""

import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from dovetail_weights.copying import copied
from dovetail_weights.errors import WeightsError
from dovetail_weights.header import encode_header
from dovetail_weights.lazy import Lazy, lazy_of

__all__ = ["digest", "write_directory"]

_CHUNK = 1 << 24


def write_directory(
    path: str | pathlib.Path,
    tensors: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
    stem: str = "model",
) -> pathlib.Path:
    """Write tensors as a Hugging Face directory and return its path.

    Headers are written from shapes and dtypes; each tensor is read, written and freed before the next. Everything
    goes into a hidden directory beside `path`, is synced to the disk, and takes its name in the end: a directory with
    the name `path` is complete. After an error the hidden directory is removed.

    Args:
        path: the directory to make.
        tensors: arrays or `Lazy` arrays by checkpoint name.
        max_shard_bytes: a shard is closed before it grows beyond this; one larger tensor makes a larger shard.
        metadata: free text for each file's header; by default ``{"format": "pt"}``, which transformers wants.
        extra_files: further files by name, such as ``config.json``.
        overwrite: replace an existing directory, which keeps its name until the new one is complete.
        stem: the files' names begin with it, such as ``adapter_model`` for ``adapter_model.safetensors``.

    Raises:
        FileExistsError: `path` exists and `overwrite` is not set.
        WeightsError: there is no tensor, a stem that is no name, a dtype cannot be stored, or a `Lazy` reads another
            shape or dtype.
        OSError: the disk is full, or the place cannot be written.
    """
    path = pathlib.Path(path).resolve()
    if not re.fullmatch(r"[\w.-]+", stem):
        raise WeightsError(f"stem={stem!r}; expected letters, digits, '_', '-' and '.'")
    text = {"format": "pt"} if metadata is None else dict(metadata)
    lazies = {name: item if isinstance(item, Lazy) else lazy_of(item) for name, item in tensors.items()}
    shards = _shards(lazies, max_shard_bytes, stem)
    extra = _checked_extra(extra_files or {}, stem)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it, or choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        for file, names in shards.items():
            _write_file(partial / file, {n: lazies[n] for n in names}, text)
        files = dict(extra)
        if len(shards) > 1:
            files[f"{stem}.safetensors.index.json"] = _index(lazies, shards)
        for name, content in files.items():
            _write_bytes(partial / name, content)
        _sync(partial)
        _take_name(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _shards(lazies: Mapping[str, Lazy], limit: int, stem: str) -> dict[str, list[str]]:
    if not lazies:
        raise WeightsError("there are no tensors to write")
    bad = [n for n in lazies if not isinstance(n, str) or not n or n == "__metadata__"]
    if bad:
        raise WeightsError(f"tensor name {bad[0]!r}; expected a non-empty string other than '__metadata__'")
    if limit < 1:
        raise WeightsError(f"max_shard_bytes is {limit}; expected at least 1")
    groups: list[list[str]] = [[]]
    used = 0
    for name, lazy in lazies.items():
        if groups[-1] and used + lazy.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += lazy.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _checked_extra(extra: Mapping[str, str | bytes], stem: str) -> dict[str, bytes]:
    for name, content in extra.items():
        reserved = re.fullmatch(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)
        if reserved or pathlib.PurePath(name).name != name or name in ("", ".", ".."):
            raise WeightsError(f"extra file {name!r}; expected a plain file name that is none of the weights' own")
        if not isinstance(content, str | bytes):
            raise TypeError(f"extra file {name!r} is a {type(content).__name__}; expected str or bytes")
    return {name: content.encode() if isinstance(content, str) else content for name, content in extra.items()}


def _write_file(path: pathlib.Path, lazies: Mapping[str, Lazy], metadata: Mapping[str, str]) -> None:
    head, order = encode_header({name: (lazy.shape, lazy.dtype) for name, lazy in lazies.items()}, metadata)
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(head))
        for name in order:
            _write_all(file, _bytes_of(name, lazies[name]))
        os.fsync(file.fileno())


def _bytes_of(name: str, lazy: Lazy) -> memoryview:
    value = np.asarray(lazy.read())
    if value.shape != lazy.shape or value.dtype != lazy.dtype:
        raise WeightsError(
            f"tensor {name!r} was announced as {lazy.dtype}{list(lazy.shape)} but reads as "
            f"{value.dtype}{list(value.shape)}; shape and dtype of a Lazy must be those of what it reads"
        )
    if value.dtype.byteorder == ">":
        value = value.astype(value.dtype.newbyteorder("<"))
    raw: Any = (value if value.flags.c_contiguous else copied(value)).reshape(-1).view(np.uint8)
    return memoryview(raw)


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data[:_CHUNK]) :]


def _index(lazies: Mapping[str, Lazy], shards: Mapping[str, list[str]]) -> bytes:
    owners = {name: file for file, names in shards.items() for name in names}
    total = sum(lazy.nbytes for lazy in lazies.values())
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(owners.items()))}
    return (json.dumps(value, indent=2) + "\n").encode()


def _write_bytes(path: pathlib.Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(content))
        os.fsync(file.fileno())


def _sync(directory: pathlib.Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_name(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Rename; an existing directory steps aside first and comes back if the new one cannot take its name."""
    old = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    replaces = path.exists()
    if replaces:
        path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        if replaces:
            old.rename(path)
        raise
    _sync(path.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def digest(path: str | pathlib.Path) -> dict[str, str]:
    """Return the XXH3-128 digest, in hexadecimal, of a file or of each file of a directory, by name.

    Raises:
        FileNotFoundError: there is nothing at `path`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    return {file.name: _digest(file) for file in files}


def _digest(path: pathlib.Path) -> str:
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            state.update(block)
    return state.hexdigest()
