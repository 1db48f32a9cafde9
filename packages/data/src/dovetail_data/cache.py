"""TokenCache: a finished cache of tokens, memory-mapped."""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from dovetail_data._errors import CacheError
from dovetail_data.layout import Manifest, Verify, problems, read_json_list
from dovetail_data.mapped import MappedTokens
from dovetail_data.tokens import document_index

__all__ = ["TokenCache"]


class TokenCache(MappedTokens):
    """All documents of a cache; `open` opens one, `build_cache` makes one.

    Attributes:
        directory: where it is.
        manifest: what its ``cache.json`` says.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._byte_lengths = self._read("bytes")
        paths = [shard.path(directory, "tokens") for shard in manifest.shards]
        maps = [np.asarray(np.memmap(path, manifest.dtype, "r")) for path in paths]
        marks = [shard.path(directory, "weights") for shard in manifest.shards if manifest.weighted]
        learned = [np.asarray(np.memmap(path, np.uint8, "r")) for path in marks]
        super().__init__(maps, self._read("lengths"), manifest.dtype, learned if manifest.weighted else None)

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, verify: Verify = "sizes") -> "TokenCache":
        """Open a cache.

        Args:
            directory: where `build_cache` made it.
            verify: ``sizes`` checks that every file is there and as long as it was and that the lengths add up,
                ``full`` also reads everything and compares digests, ``off`` trusts the files.

        Raises:
            CacheError: there is no cache, the build did not finish, or files are missing, truncated or changed; the
                message names them.
            ValueError: an unknown `verify`.
        """
        directory = Path(directory)
        manifest = Manifest.load(directory)
        found = [problem for shard in manifest.shards for problem in problems(directory, shard, verify)]
        if found:
            advice = "restore the files, or build again with overwrite=True"
            raise CacheError(f"the token cache {directory} is damaged: {'; '.join(found)}. Please {advice}")
        cache = cls(directory, manifest)
        if verify != "off":
            cache._check_lengths()
        return cache

    @property
    def fingerprint(self) -> str:
        """Digest of all tokens and document lengths, whatever the shards and paths."""
        return self.manifest.content

    @property
    def vocab_size(self) -> int:
        """Of the tokenizer that made it."""
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        """The id that ends each document."""
        return self.manifest.eos_id

    @property
    def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
        """UTF-8 bytes of text per document."""
        return self._byte_lengths

    def origin(self, document: int) -> str:
        """Return the id that the corpus gave to a document."""
        index = document_index(document, len(self))
        shard = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        return self._ids(shard)[index - int(self._document_starts[shard])]

    @functools.cached_property
    def _document_starts(self) -> Int64[np.ndarray, " shards"]:
        counts = [shard.documents for shard in self.manifest.shards]
        return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))[:-1]

    @functools.cached_property
    def _ids(self) -> Any:
        return functools.lru_cache(8)(self._read_ids)

    def _read_ids(self, shard: int) -> list[str]:
        record = self.manifest.shards[shard]
        return read_json_list(record.path(self.directory, "ids.json"), record.documents)

    def _read(self, kind: str) -> Int64[np.ndarray, " documents"]:
        paths = [shard.path(self.directory, kind) for shard in self.manifest.shards]
        return np.concatenate([np.fromfile(path, "<i8") for path in paths]).astype(np.int64, copy=False)

    def _check_lengths(self) -> None:
        first = 0
        for shard in self.manifest.shards:
            part = slice(first, first + shard.documents)
            for kind, values, total in (
                ("lengths", self._lengths, shard.tokens),
                ("bytes", self._byte_lengths, shard.bytes),
            ):
                if values[part].min() < 0 or int(values[part].sum()) != total:
                    path = shard.path(self.directory, kind)
                    raise CacheError(f"{path} is damaged: it adds up to {values[part].sum()} instead of {total}")
            first += shard.documents
