"""The files of a token cache: what they hold, how they are written, how they are checked.

A cache is a directory of shards and one manifest. Everything is little-endian and has no header:

* ``shard-00000.tokens``: uint16 ids (uint32 where the vocabulary is larger than 65,536), documents one after the other,
  each followed by the end-of-document id, which is part of the document;
* ``shard-00000.lengths``: int64, tokens per document;
* ``shard-00000.bytes``: int64, UTF-8 bytes of text per document;
* ``shard-00000.weights``: uint8, 1 for each token that is learned, else 0; only where not all are;
* ``shard-00000.ids.json``: a JSON list with the documents' ids;
* ``cache.json``: the manifest, written last; without it there is no cache.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import xxhash

from dovetail_data._errors import CacheError

__all__ = [
    "Manifest",
    "Shard",
    "Verify",
    "digest_of",
    "problems",
    "read_json",
    "write_file",
    "write_json",
    "write_whole",
]

Verify: TypeAlias = Literal["sizes", "full", "off"]
FORMAT = "dovetail-token-cache"
VERSION = 1
MANIFEST = "cache.json"
LEDGER = "building.json"
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
        documents: how many.
        tokens: of all documents, end tokens included.
        bytes: UTF-8 bytes of their text.
        text: the corpus fingerprint of all documents up to the end of this shard.
        files: for each of its files ``(name, size, xxh3_128)``.
    """

    documents: int
    tokens: int
    bytes: int
    text: str
    files: dict[str, tuple[str, int, str]]

    def path(self, directory: Path, kind: str) -> Path:
        """Return where one of its files is."""
        return directory / self.files[kind][0]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What ``cache.json`` says.

    Attributes:
        vocab_size: of the tokenizer.
        eos_id: the id that ends each document.
        dtype: of the stored tokens, ``<u2`` or ``<u4``.
        tokenizer: its fingerprint.
        corpus: its fingerprint.
        shard_tokens: at how many tokens a shard is closed.
        content: digest of all tokens and lengths in order, whatever the shards.
        shards: in order.
        weighted: whether shards tell which tokens are learned.
    """

    vocab_size: int
    eos_id: int
    dtype: str
    tokenizer: str
    corpus: str
    shard_tokens: int
    content: str
    shards: tuple[Shard, ...]
    weighted: bool = False

    @property
    def key(self) -> dict[str, Any]:
        """What a build depends on."""
        names = ("vocab_size", "eos_id", "dtype", "tokenizer", "corpus", "shard_tokens")
        key = {"format": FORMAT, "version": VERSION} | {name: getattr(self, name) for name in names}
        return key | {"weighted": True} if self.weighted else key

    def save(self, directory: Path) -> None:
        """Write ``cache.json``: from here on the cache exists."""
        value = self.key | {"content": self.content, "shards": [dataclasses.asdict(shard) for shard in self.shards]}
        write_json(directory / MANIFEST, value | {"digest": digest_of(value)})

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read ``cache.json``.

        Raises:
            CacheError: it is missing, damaged or of another version.
        """
        path = directory / MANIFEST
        if not path.is_file():
            state = (
                "is unfinished: build it again to continue" if (directory / LEDGER).exists() else "is no token cache"
            )
            raise CacheError(f"{directory} {state} (there is no {MANIFEST})")
        value = read_json(path)
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            raise CacheError(
                f"{path} has format={value.get('format')!r} and version={value.get('version')!r}; "
                f"this release reads {FORMAT!r}, version {VERSION}"
            )
        digest = value.pop("digest", None)
        if digest != digest_of(value):
            raise CacheError(f"{path} is damaged (its digest is {digest!r}, its content {digest_of(value)!r})")
        shards = tuple(shard_from_json(shard) for shard in value.pop("shards"))
        del value["format"], value["version"]
        return cls(**value, shards=shards)


def shard_from_json(value: dict[str, Any]) -> Shard:
    """Return the shard that a ledger or manifest describes."""
    files = {kind: (str(name), int(size), str(digest)) for kind, (name, size, digest) in value["files"].items()}
    return Shard(value["documents"], value["tokens"], value["bytes"], value["text"], files)


def problems(directory: Path, shard: Shard, verify: Verify) -> list[str]:
    """Return what is wrong with a shard's files, each problem with the file's name.

    ``sizes`` looks at existence and size, ``full`` reads everything and compares digests, ``off`` looks at nothing.

    Raises:
        ValueError: an unknown `verify`.
    """
    if verify not in ("sizes", "full", "off"):
        raise ValueError(f"verify={verify!r}; expected 'sizes', 'full' or 'off'")
    if verify == "off":
        return []
    found = [_problem(directory / name, size, digest, verify) for name, size, digest in shard.files.values()]
    return [problem for problem in found if problem]


def _problem(path: Path, size: int, digest: str, verify: Verify) -> str:
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != size:
        return f"{path} has {path.stat().st_size} bytes instead of {size}"
    if verify == "full" and (actual := _digest_file(path)) != digest:
        return f"{path} has digest {actual} instead of {digest}"
    return ""


def _digest_file(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the digest of a JSON value in its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CacheError: it is not one.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path} is damaged ({error})") from error
    if not isinstance(value, dict):
        raise CacheError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value so that the file appears in whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    write_file(partial, json.dumps(value, indent=1).encode())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, data: "bytes | np.ndarray") -> tuple[str, int, str]:
    """Write a file through to the disk and return its name, size and digest."""
    view = memoryview(data) if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8).data
    with path.open("wb") as stream:
        stream.write(view)
        stream.flush()
        os.fsync(stream.fileno())
    return path.name, view.nbytes, xxhash.xxh3_128_hexdigest(view)


def write_whole(path: Path, blocks: "Iterable[np.ndarray]") -> None:
    """Write arrays one after the other so that the file appears in whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            for block in blocks:
                stream.write(np.ascontiguousarray(block).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json_list(path: Path, count: int) -> list[Any]:
    """Read a JSON list of a known length.

    Raises:
        CacheError: it is not one.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CacheError(f"{path} is damaged ({error})") from error
    if not isinstance(value, list) or len(value) != count:
        raise CacheError(f"{path} is damaged; expected a JSON list of {count} values")
    return value
