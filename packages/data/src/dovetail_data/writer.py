"""Writes the shards of a token cache, and takes up those that an earlier, killed build has finished.

A shard's data is on disk before its ledger ``shard-00000.json`` appears, so whatever has a ledger is finished.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from dovetail_data.corpus import Document, TextDigest
from dovetail_data.layout import Shard, digest_of, problems, read_json, shard_from_json, write_file, write_json
from dovetail_data.tokenise import Encoded, Rules

__all__ = ["ShardWriter", "finished_shards", "ledger"]


def ledger(directory: Path, index: int) -> Path:
    """Return where the record of a finished shard is while the cache is being built."""
    return directory / f"shard-{index:05d}.json"


def finished_shards(directory: Path) -> Iterator[Shard]:
    """Yield the shards that are finished and intact, up to the first that is not."""
    index = 0
    while (path := ledger(directory, index)).is_file():
        try:
            shard = shard_from_json(read_json(path))
        except (ValueError, KeyError, TypeError, AttributeError):
            return  # damaged: this shard is made again
        if problems(directory, shard, "full"):
            return
        yield shard
        index += 1


class ShardWriter:
    """Collects documents in order and writes a shard as soon as it has `shard_tokens` tokens."""

    def __init__(self, directory: Path, rule: Rules, shard_tokens: int, *, weighted: bool = False) -> None:
        self.shards: list[Shard] = []
        self.documents = self.tokens = self.bytes = 0
        self._directory = directory
        self._rule = rule
        self._limit = shard_tokens
        self._text = TextDigest()
        self._weighted = weighted
        kinds = ("tokens", "lengths", "weights") if weighted else ("tokens", "lengths")
        self._content = {kind: xxhash.xxh3_128() for kind in kinds}
        self._ids: list[str] = []
        self._parts: list[Encoded] = []
        self._pending = 0

    @property
    def corpus(self) -> str:
        """The fingerprint of the documents that are in the shards."""
        return self._text.hexdigest()

    @property
    def content(self) -> str:
        """The digest of the tokens and lengths that are in the shards, whatever the shards."""
        digests = [digest.hexdigest() for digest in self._content.values()]
        return digest_of([self._rule.vocab_size, self._rule.eos_id, *digests])

    def keep(self, shard: Shard, documents: Iterable[Document]) -> bool:
        """Take up a finished shard; False if it was not made from these documents."""
        for document in documents:
            self._text.add(document)
        if self._text.hexdigest() != shard.text:
            return False
        for kind, digest in self._content.items():
            digest.update(np.memmap(shard.path(self._directory, kind), np.uint8, "r").data)
        self._count(shard)
        return True

    def add(self, documents: Sequence[Document], encoded: Encoded) -> None:
        """Add the next documents."""
        while documents:
            ends = np.cumsum(encoded.lengths)
            count = int(np.searchsorted(ends, self._limit - self._pending)) + 1
            cut = int(ends[min(count, len(ends)) - 1])
            self._append(documents[:count], _part(encoded, slice(cut), slice(count)))
            documents = documents[count:]
            encoded = _part(encoded, slice(cut, None), slice(count, None))

    def close(self) -> None:
        """Write the last shard."""
        if self._parts:
            self._flush()

    def _append(self, documents: Sequence[Document], encoded: Encoded) -> None:
        for document in documents:
            self._text.add(document)
        self._ids.extend(document.id for document in documents)
        self._parts.append(encoded)
        self._pending += len(encoded.tokens)
        if self._pending >= self._limit:
            self._flush()

    def _flush(self) -> None:
        tokens, lengths, sizes = (np.concatenate(parts) for parts in list(zip(*self._parts, strict=True))[:3])
        data = {"tokens": tokens, "lengths": lengths, "bytes": sizes, "ids.json": json.dumps(self._ids).encode()}
        if self._weighted:
            data["weights"] = np.concatenate([part.weights for part in self._parts if part.weights is not None])
            self._content["weights"].update(data["weights"].data)
        stem = f"shard-{len(self.shards):05d}"
        files = {kind: write_file(self._directory / f"{stem}.{kind}", value) for kind, value in data.items()}
        self._content["tokens"].update(tokens.data)
        self._content["lengths"].update(lengths.data)
        shard = Shard(len(lengths), len(tokens), int(sizes.sum()), self._text.hexdigest(), files)
        write_json(ledger(self._directory, len(self.shards)), dataclasses.asdict(shard))
        self._count(shard)
        self._ids, self._parts, self._pending = [], [], 0

    def _count(self, shard: Shard) -> None:
        self.shards.append(shard)
        self.documents += shard.documents
        self.tokens += shard.tokens
        self.bytes += shard.bytes


def _part(encoded: Encoded, tokens: slice, documents: slice) -> Encoded:
    weights = None if encoded.weights is None else encoded.weights[tokens]
    return Encoded(encoded.tokens[tokens], encoded.lengths[documents], encoded.sizes[documents], weights)
