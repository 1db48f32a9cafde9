"""Corpora: documents in a fixed order, with a fingerprint of their content.

The fingerprint is the XXH3-128 digest over the documents' lengths and UTF-8 bytes in order. Names and paths are not
part of it: a corpus that moves to another directory is the same corpus, one whose text changes is another.
"""

import abc
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import xxhash

from dovetail_data._errors import CorpusError

__all__ = ["Corpus", "Document", "Summary", "TextDigest", "concatenate", "from_documents"]


class Document(NamedTuple):
    """One document.

    Attributes:
        id: where it comes from, for people: a file's relative name, possibly with a line or row.
        text: its text.
    """

    id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Summary:
    """What one pass over a corpus tells.

    Attributes:
        fingerprint: digest of the content and order of the documents.
        documents: how many.
        bytes: the size of their text in UTF-8.
        skipped: documents that were left out because their text cannot be decoded (only where that was asked for).
    """

    fingerprint: str
    documents: int
    bytes: int
    skipped: int


class TextDigest:
    """The running fingerprint of documents."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128(b"dovetail corpus 1")

    def add(self, document: Document) -> int:
        """Add a document and return the size of its text in UTF-8.

        Raises:
            CorpusError: the text holds a lone surrogate and has no UTF-8 form.
        """
        try:
            data = document.text.encode()
        except UnicodeEncodeError as error:
            raise CorpusError(f"document {document.id!r} has no UTF-8 form ({error}); expected valid Unicode") from None
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)
        return len(data)

    def hexdigest(self) -> str:
        """Return the fingerprint of what was added so far."""
        return self._hash.hexdigest()


class Corpus(abc.ABC):
    """Documents that can be iterated any number of times, always in the same order.

    A corpus of one's own implements `read`.
    """

    @abc.abstractmethod
    def read(self) -> Iterator[Document | None]:
        """Yield the documents in order, and None for each one that is left out as undecodable."""

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.read() if document is not None)

    @functools.cached_property
    def summary(self) -> Summary:
        """The result of one pass over the documents; computed once per object."""
        digest, documents, size, skipped = TextDigest(), 0, 0, 0
        for document in self.read():
            if document is None:
                skipped += 1
            else:
                documents, size = documents + 1, size + digest.add(document)
        return Summary(digest.hexdigest(), documents, size, skipped)

    @property
    def fingerprint(self) -> str:
        """Digest of the content and order of the documents, never of paths."""
        return self.summary.fingerprint


class _Documents(Corpus):
    def __init__(self, documents: tuple[Document, ...]) -> None:
        self._documents = documents

    def read(self) -> Iterator[Document | None]:
        return iter(self._documents)


class _Concatenation(Corpus):
    def __init__(self, corpora: tuple[Corpus, ...]) -> None:
        self._corpora = corpora

    def read(self) -> Iterator[Document | None]:
        for corpus in self._corpora:
            yield from corpus.read()


def from_documents(documents: Iterable[str | Document]) -> Corpus:
    """Return a corpus of documents held in memory; a plain text's id is its number.

    Raises:
        TypeError: an element is neither a string nor a `Document`.

    >>> [document.id for document in from_documents(["one", Document("second", "two")])]
    ['0', 'second']
    """
    if isinstance(documents, str):
        raise TypeError("documents is one string; expected an iterable of strings or Documents")
    return _Documents(tuple(_document(index, item) for index, item in enumerate(documents)))


def _document(index: int, item: object) -> Document:
    if isinstance(item, str):
        return Document(str(index), item)
    if isinstance(item, Document) and isinstance(item.id, str) and isinstance(item.text, str):
        return item
    raise TypeError(f"document {index} is {item!r:.80}; expected a string or Document(id, text)")


def concatenate(*corpora: Corpus) -> Corpus:
    """Return the documents of several corpora one after the other."""
    return _Concatenation(corpora)
