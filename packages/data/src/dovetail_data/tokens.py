"""TokenSource: documents as tokens, read in batches; and a view of some of its documents."""

import abc
import functools
import math
import operator
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int, Int64, UInt, UInt8

from dovetail_data.permutation import Permutation

__all__ = ["TokenSource", "TokenView"]


class TokenSource(abc.ABC):
    """Documents as tokens, numbered from 0; what `Plan` and `unigram_bits_per_byte` work on.

    A source of one's own implements the abstract members.
    """

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Equal for sources with the same tokens, documents and order; without spaces."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest possible id."""

    @property
    @abc.abstractmethod
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens per document, the end token included."""

    @property
    @abc.abstractmethod
    def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
        """UTF-8 bytes of text per document."""

    @abc.abstractmethod
    def gather(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        """Return the tokens ``[start, stop)`` of each document, one piece after the other.

        Raises:
            IndexError: there is no such document, or a piece does not lie inside its document.
        """

    def weights(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt8[np.ndarray, " tokens"] | None:
        """Return 1 for each token of `gather` that is learned and 0 for others; None where all are."""
        del documents, starts, stops
        return None

    @abc.abstractmethod
    def origin(self, document: int) -> str:
        """Return the id that the corpus gave to a document."""

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.lengths)

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of all documents, end tokens included."""
        return int(self.lengths.sum())

    @functools.cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.byte_lengths.sum())

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Convert a mean loss per token into bits per byte of text; end tokens count as tokens but not as bytes.

        Raises:
            ValueError: the documents hold no text.
        """
        if not self.bytes:
            raise ValueError("the documents hold 0 bytes of text; bits per byte need at least one")
        return nats_per_token * self.tokens / (math.log(2) * self.bytes)

    def split(self, validation: float = 0.02, *, seed: int = 0) -> "tuple[TokenView, TokenView]":
        """Return two views, for training and for validation, that share no document.

        Args:
            validation: the share of the documents (not of the tokens) in the second view, in (0, 1); at least one
                document and at most all but one.
            seed: which documents; the same for the same seed and number of documents.

        Raises:
            ValueError: `validation` is outside (0, 1), or there are fewer than 2 documents.
        """
        total = len(self)
        if not 0 < validation < 1:
            raise ValueError(f"validation={validation}; expected a share between 0 and 1")
        if total < 2:
            raise ValueError(f"there are {total} documents; a split needs at least 2")
        count = min(max(round(total * validation), 1), total - 1)
        order = Permutation(total, seed=seed, stream=_SPLIT)(np.arange(total))
        return TokenView(self, np.sort(order[count:])), TokenView(self, np.sort(order[:count]))


_SPLIT = 2**63  # the permutation of a split is none of an epoch's


class TokenView(TokenSource):
    """Some documents of a source, numbered from 0 in the order given.

    Raises:
        ValueError: `documents` is empty or names a document twice.
        IndexError: there is no such document.
    """

    def __init__(self, source: TokenSource, documents: Int[np.ndarray, " documents"]) -> None:
        documents = np.asarray(documents)
        if documents.ndim != 1 or not documents.size or not np.issubdtype(documents.dtype, np.integer):
            raise ValueError(
                f"documents has shape {documents.shape} and dtype {documents.dtype}; expected integers [n]"
            )
        documents = documents.astype(np.int64)
        if documents.min() < 0 or documents.max() >= len(source):
            raise IndexError(f"documents span {documents.min()} to {documents.max()}; expected 0 to {len(source) - 1}")
        if len(np.unique(documents)) != len(documents):
            raise ValueError("a document is named twice; expected different documents")
        self.source = source
        self.documents = documents
        self._lengths = source.lengths[documents]
        self._byte_lengths = source.byte_lengths[documents]
        self._fingerprint = xxhash.xxh3_128_hexdigest(source.fingerprint.encode() + documents.astype("<i8").tobytes())

    @property
    def fingerprint(self) -> str:
        """Digest of the source's fingerprint and the chosen documents."""
        return self._fingerprint

    @property
    def vocab_size(self) -> int:
        """One more than the largest possible id."""
        return self.source.vocab_size

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens per document, the end token included."""
        return self._lengths

    @property
    def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
        """UTF-8 bytes of text per document."""
        return self._byte_lengths

    def gather(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        """Return the tokens ``[start, stop)`` of each document, one piece after the other (see `TokenSource`)."""
        check_pieces(documents, starts, stops, self._lengths)
        return self.source.gather(self.documents[documents], starts, stops)

    def weights(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt8[np.ndarray, " tokens"] | None:
        """Return which tokens of `gather` are learned (see `TokenSource`)."""
        return self.source.weights(self.documents[documents], starts, stops)

    def origin(self, document: int) -> str:
        """Return the id that the corpus gave to a document."""
        return self.source.origin(int(self.documents[document_index(document, len(self))]))


def document_index(document: int, count: int) -> int:
    """Return a document's number as an int.

    Raises:
        IndexError: there is no such document (negative numbers do not count from the end).
    """
    index = operator.index(document)
    if not 0 <= index < count:
        raise IndexError(f"document {index} of {count}; expected 0 to {count - 1}")
    return index


def check_pieces(documents: Any, starts: Any, stops: Any, lengths: Int64[np.ndarray, " documents"]) -> None:
    """Check the arguments of `TokenSource.gather`.

    Raises:
        ValueError: the three are not integer arrays of one length.
        IndexError: a document or a range does not exist.
    """
    ids, begin, end = arrays = [np.asarray(part) for part in (documents, starts, stops)]
    if any(array.ndim != 1 or array.shape != ids.shape or array.dtype.kind not in "iu" for array in arrays):
        found = [f"{array.dtype}{list(array.shape)}" for array in arrays]
        raise ValueError(f"documents, starts and stops are {found}; expected integers of one length")
    if ids.size and (ids.min() < 0 or ids.max() >= len(lengths)):
        outside = ids[(ids < 0) | (ids >= len(lengths))]
        raise IndexError(f"document {outside[0]} of {len(lengths)}; expected 0 to {len(lengths) - 1}")
    wrong = (begin < 0) | (begin > end) | (end > lengths[ids])
    if wrong.any():
        i = wrong.argmax()
        raise IndexError(f"tokens {begin[i]} to {end[i]} of document {ids[i]}, which has {lengths[ids[i]]}")
