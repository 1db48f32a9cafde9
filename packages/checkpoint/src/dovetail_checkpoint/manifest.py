"""The manifest of a step: what is in it, and the size and digest of every byte of it.

``manifest.json`` lies in the step before the rename that commits it. It has a digest of its own, so that a damaged
manifest is found too. Nothing here imports jax or Orbax: listing and verifying need neither.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash

from dovetail_checkpoint import _files
from dovetail_checkpoint._json import dumps
from dovetail_checkpoint.errors import CorruptCheckpointError

__all__ = ["DATA", "MANIFEST", "STATE", "Leaf", "Manifest", "StoredFile", "digest_files", "verify"]

MANIFEST = "manifest.json"
DATA = "data.json"
STATE = "state"
SCHEMA = 1
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is known of a leaf without reading it.

    Attributes:
        kind: ``array`` (jax), ``numpy``, ``key`` (typed random keys, stored as their data), ``bool``, ``int``,
            ``float``, ``complex`` (Python numbers) or ``none``.
        dtype: the logical dtype's name; the implementation's name of a key; empty for None.
        shape: the logical shape; that of the keys, not of their data.
        sharding: how it was laid out when it was saved, as text for the reader.
        stored: the dtype under which the bytes are stored; empty when there are none (None and zero-size leaves).
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    sharding: str = ""
    stored: str = ""

    def __str__(self) -> str:
        if self.kind == "none":
            return "None"
        if self.kind in ("bool", "int", "float", "complex"):
            return f"a Python {self.kind}"
        name = f"key<{self.dtype}>" if self.kind == "key" else self.dtype
        return f"{name}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file's size in bytes and the xxh3_128 digest of its content, in hexadecimal."""

    size: int
    xxh3_128: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a step but its array bytes.

    Attributes:
        step: the step's number.
        created: when its manifest was written, ISO 8601 in UTC.
        leaves: by address (`dovetail_protocols.paths`), in tree order.
        files: by path below the step's directory, all but the manifest itself.
        meta: the JSON value given to `Manager.save`.
        metrics: numbers for the keep policies.
        data: digest of the data position's JSON text, None when no loader was saved.
        versions: of the libraries that wrote the step.
    """

    step: int
    created: str
    leaves: Mapping[str, Leaf]
    files: Mapping[str, StoredFile]
    meta: dict[str, Any]
    metrics: Mapping[str, float]
    data: str | None
    versions: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes in the step, the manifest left out."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> str:
        """Return the text of ``manifest.json``."""
        body = dataclasses.asdict(self) | {
            "schema": SCHEMA,
            "leaves": [{"address": a, **dataclasses.asdict(leaf)} for a, leaf in self.leaves.items()],
            "metrics": {name: repr(value) for name, value in self.metrics.items()},
        }
        digest = xxhash.xxh3_128_hexdigest(dumps(body).encode())
        return json.dumps(body | {"digest": digest}, indent=1, allow_nan=False)

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Read and check the manifest of a step's directory; no other file is looked at.

        Raises:
            CorruptCheckpointError: it is missing, damaged, or that of another step.
            ValueError: a later release wrote it.
        """
        try:
            body: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
            digest = body.pop("digest")
            good = digest == xxhash.xxh3_128_hexdigest(dumps(body).encode())
        except FileNotFoundError:
            raise _bad(directory, MANIFEST, "is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _bad(directory, MANIFEST, f"is not readable ({type(error).__name__})") from None
        if not good:
            raise _bad(directory, MANIFEST, "does not match its own digest")
        if body["schema"] > SCHEMA:
            raise ValueError(f"{directory} has schema {body['schema']}; this release reads up to {SCHEMA}: upgrade it")
        if str(body["step"]) != directory.name:
            raise _bad(directory, MANIFEST, f"belongs to step {body['step']}")
        return cls._from_body(body)

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> "Manifest":
        leaves = {
            leaf["address"]: Leaf(leaf["kind"], leaf["dtype"], tuple(leaf["shape"]), leaf["sharding"], leaf["stored"])
            for leaf in body["leaves"]
        }
        return cls(
            step=body["step"],
            created=body["created"],
            leaves=leaves,
            files={name: StoredFile(**file) for name, file in body["files"].items()},
            meta=body["meta"],
            metrics={name: float(value) for name, value in body["metrics"].items()},
            data=body["data"],
            versions=body["versions"],
        )


def digest_files(directory: Path) -> dict[str, StoredFile]:
    """Digest and flush to the disk every file of a step that is being written."""
    files: dict[str, StoredFile] = {}
    for name in _files.files_of(directory):
        _files.sync(directory / name)
        files[name] = StoredFile((directory / name).stat().st_size, _digest(directory / name))
    return files


def _digest(path: Path) -> str:
    state = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(block):
            state.update(block[:n])
    return state.hexdigest()


def verify(directory: str | Path, level: Literal["full", "sizes", "off"] = "full") -> Manifest:
    """Check a step's directory against its manifest and return the manifest.

    Args:
        directory: ``<root>/<step>``.
        level: ``full`` compares digests of all bytes; ``sizes`` the names and sizes of the files, which finds what a
            crash or a full disk does but no flipped bit; ``off`` the manifest alone.

    Raises:
        CorruptCheckpointError: naming the first file that differs, is missing or does not belong.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    if level == "off":
        return manifest
    found = [name for name in _files.files_of(directory) if name != MANIFEST]
    for name in found:
        if name not in manifest.files:
            raise _bad(directory, name, "is not in the manifest")
    for name, file in manifest.files.items():
        _check_file(directory, name, file, level)
    return manifest


def _check_file(directory: Path, name: str, file: StoredFile, level: str) -> None:
    path = directory / name
    if not path.is_file():
        raise _bad(directory, name, "is missing")
    if (size := path.stat().st_size) != file.size:
        raise _bad(directory, name, f"has {size} bytes; expected {file.size}")
    if level == "full" and (digest := _digest(path)) != file.xxh3_128:
        raise _bad(directory, name, f"has digest {digest}; expected {file.xxh3_128}")


def _bad(directory: Path, name: str, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"step {directory.name} is corrupt: {directory / name} {what}")
