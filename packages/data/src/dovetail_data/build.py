"""Tokenises a corpus once into a cache of shards, with several processes, resumable by shard."""

import contextlib
import dataclasses
import fcntl
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dovetail_data._errors import CacheError, CorpusError
from dovetail_data._pool import Pool
from dovetail_data.cache import TokenCache
from dovetail_data.corpus import Corpus, Document, from_documents
from dovetail_data.layout import LEDGER, MANIFEST, Manifest, read_json, write_json
from dovetail_data.tokenise import Encoded, Rules, encode, rules
from dovetail_data.writer import ShardWriter, finished_shards

if TYPE_CHECKING:
    import dovetail_protocols
    from dovetail_data.chat import ChatEncoder

__all__ = ["Progress", "build_cache"]

_OURS = re.compile(
    r"(cache\.json|building\.json|shard-\d{5,}\.(tokens|lengths|bytes|weights|ids\.json|json))(\.partial)?"
)
_CHUNK_BYTES = 1 << 18
_CHUNK_DOCUMENTS = 512
_SMALL = 1 << 26  # below this, starting processes costs more than a tokenizer's own threads leave to gain
_MOST_WORKERS = 1024

Chunk: TypeAlias = list[Document]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a build is; `tokens` counts what is encoded so far."""

    documents: int
    total_documents: int
    bytes: int
    total_bytes: int
    tokens: int


def build_cache(
    corpus: Corpus | Iterable[str | Document],
    tokenizer: "dovetail_protocols.Tokenizer | ChatEncoder",
    directory: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shard_tokens: int = 1 << 26,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> TokenCache:
    """Tokenise a corpus into a directory and open it; does nothing where the same cache is there already.

    Each document is encoded by itself and followed by ``tokenizer.eos_ids[0]``. The result is the same, byte for byte,
    for every number of workers. A build that was killed goes on where its last whole shard ends. The corpus is read
    twice: once for its fingerprint, once to encode it.

    Args:
        corpus: a corpus, or documents that fit into memory.
        tokenizer: with more than one worker it must pickle, and its class must be importable (not from ``__main__``).
            A `ChatEncoder` makes a cache of conversations that also tells which tokens are learned.
        directory: made if it does not exist; must be empty or hold a cache, finished or not.
        workers: processes that encode. 1 encodes in this process, with whatever threads the tokenizer's
            ``encode_batch`` has; None chooses 1 for less than 64 MiB of text, else one per core.
        shard_tokens: a shard is closed by the document that brings it to this many tokens.
        overwrite: delete a cache in `directory` that was made from something else or is damaged.
        progress: called after each chunk of documents.

    Raises:
        ValueError: an option out of range, or the tokenizer has no end token.
        TypeError: the tokenizer does not pickle.
        CorpusError: the corpus is empty, cannot be read, or changes while it is read.
        CacheError: the directory holds something else and `overwrite` is False, another process builds there, or the
            tokenizer returns ids outside its vocabulary.
        RuntimeError: a worker process died or the tokenizer raised in one.
    """
    corpus = corpus if isinstance(corpus, Corpus) else from_documents(corpus)
    rule = rules(tokenizer)
    _check(workers, shard_tokens)
    summary = corpus.summary
    if not summary.documents:
        raise CorpusError("the corpus holds no documents; expected at least one")
    weighted = hasattr(tokenizer, "encode_weighted")
    empty = Manifest(*rule, str(tokenizer.fingerprint), corpus.fingerprint, shard_tokens, "", (), weighted)
    count = workers or _workers(summary.bytes)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        if not _is_built(directory, empty, overwrite=overwrite):
            _prepare(directory, empty, overwrite=overwrite)
            with _encoder(count, tokenizer, rule) as encoded:
                _build(corpus, directory, empty, encoded, progress)
    return TokenCache.open(directory)


def _check(workers: int | None, shard_tokens: int) -> None:
    if workers is not None and not 1 <= workers <= _MOST_WORKERS:
        raise ValueError(f"workers={workers}; expected None or 1 to {_MOST_WORKERS}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens={shard_tokens}; expected at least 1")


def _workers(size: int) -> int:
    if size < _SMALL:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    folder = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"another process builds in {directory}; wait for it or choose another one") from None
        yield
    finally:
        os.close(folder)


def _is_built(directory: Path, wanted: Manifest, *, overwrite: bool) -> bool:
    if not (directory / MANIFEST).exists():
        return False
    try:
        present = TokenCache.open(directory).manifest.key
    except CacheError:
        if overwrite:
            return False
        raise
    if present == wanted.key:
        return True
    if not overwrite:
        raise CacheError(f"{directory} holds another cache ({_difference(present, wanted.key)}); pass overwrite=True")
    return False


def _prepare(directory: Path, wanted: Manifest, *, overwrite: bool) -> None:
    """Make the directory one where this very build is under way."""
    ledger = directory / LEDGER
    names = [path.name for path in directory.iterdir()]
    foreign = sorted(name for name in names if not _OURS.fullmatch(name))
    if foreign and not {LEDGER, MANIFEST} & set(names):
        raise CacheError(f"{directory} holds {foreign[:3]} and no cache; expected an empty or new directory")
    if ledger.exists() and MANIFEST not in names:
        try:
            present = read_json(ledger)
        except CacheError:
            present = {}
        if present == wanted.key:
            return
        if present and not overwrite:
            text = f"{directory} holds an unfinished build of another cache ({_difference(present, wanted.key)})"
            raise CacheError(f"{text}; pass overwrite=True")
    _clear(directory)
    write_json(ledger, wanted.key)


def _difference(present: dict[str, Any], wanted: dict[str, Any]) -> str:
    pairs = [(name, present.get(name), value) for name, value in wanted.items() if present.get(name) != value]
    return ", ".join(f"{name}: {old!r} there, {new!r} here" for name, old, new in pairs)


def _clear(directory: Path) -> None:
    (directory / MANIFEST).unlink(missing_ok=True)  # first: from here on it does not open
    for path in directory.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


Encoder: TypeAlias = Callable[[Iterator[Chunk]], Iterator[tuple[Chunk, Encoded]]]


@contextlib.contextmanager
def _encoder(workers: int, tokenizer: "dovetail_protocols.Tokenizer | ChatEncoder", rule: Rules) -> Generator[Encoder]:
    """Give a function that encodes chunks in order, here or in several processes."""
    if workers == 1:
        yield lambda chunks: ((chunk, encode(tokenizer, chunk, rule)) for chunk in chunks)
        return
    with Pool(workers, tokenizer, rule) as pool:
        yield lambda chunks: _ordered(chunks, pool, 2 * workers)


def _ordered(chunks: Iterator[Chunk], pool: Pool, ahead: int) -> Iterator[tuple[Chunk, Encoded]]:
    waiting = deque((chunk, pool.submit(chunk)) for chunk in itertools.islice(chunks, ahead))
    while waiting:
        chunk, future = waiting.popleft()
        waiting.extend((chunk, pool.submit(chunk)) for chunk in itertools.islice(chunks, 1))
        yield chunk, future.result()


def _build(
    corpus: Corpus, directory: Path, empty: Manifest, encoded: Encoder, progress: Callable[[Progress], None] | None
) -> None:
    writer, documents = _resume(corpus, directory, empty)
    done = Progress(writer.documents, corpus.summary.documents, writer.bytes, corpus.summary.bytes, writer.tokens)
    for chunk, result in encoded(_chunks(documents)):
        writer.add(chunk, result)
        done = dataclasses.replace(
            done,
            documents=done.documents + len(chunk),
            bytes=done.bytes + int(result.sizes.sum()),
            tokens=done.tokens + len(result.tokens),
        )
        if progress is not None:
            progress(done)
    writer.close()
    if writer.corpus != empty.corpus:
        _clear(directory)
        raise CorpusError("the corpus changed between its two readings; expected the same documents both times")
    dataclasses.replace(empty, content=writer.content, shards=tuple(writer.shards)).save(directory)
    _tidy(directory)


def _resume(corpus: Corpus, directory: Path, empty: Manifest) -> tuple[ShardWriter, Iterator[Document]]:
    rule = Rules(empty.vocab_size, empty.eos_id, empty.dtype)
    writer = ShardWriter(directory, rule, empty.shard_tokens, weighted=empty.weighted)
    documents = iter(corpus)
    for shard in finished_shards(directory):
        if not writer.keep(shard, itertools.islice(documents, shard.documents)):
            return ShardWriter(directory, rule, empty.shard_tokens, weighted=empty.weighted), iter(corpus)
    return writer, documents


def _chunks(documents: Iterator[Document]) -> Iterator[Chunk]:
    chunk: Chunk = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_BYTES or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tidy(directory: Path) -> None:
    for path in directory.glob("shard-*.json"):
        if not path.name.endswith(".ids.json"):
            path.unlink()
    (directory / LEDGER).unlink(missing_ok=True)
