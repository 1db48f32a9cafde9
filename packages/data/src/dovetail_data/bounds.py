"""Sources with other tokens at the ends of their documents."""

import operator

import numpy as np
from jaxtyping import Int, Int64, UInt, UInt8

from dovetail_data.tokens import TokenSource, check_pieces

__all__ = ["WithBos", "WithoutEos"]


class _Changed(TokenSource):
    """What stays as it is."""

    def __init__(self, source: TokenSource) -> None:
        self.source = source

    @property
    def vocab_size(self) -> int:
        """As in the source."""
        return self.source.vocab_size

    @property
    def byte_lengths(self) -> Int64[np.ndarray, " documents"]:
        """UTF-8 bytes of text per document."""
        return self.source.byte_lengths

    def origin(self, document: int) -> str:
        """Return the id that the corpus gave to a document."""
        return self.source.origin(document)


class WithBos(_Changed):
    """The documents of a source, each behind a token that begins it; documents without tokens stay empty.

    Raises:
        ValueError: the token is outside the vocabulary.
    """

    def __init__(self, source: TokenSource, bos_id: int) -> None:
        super().__init__(source)
        self.bos_id = operator.index(bos_id)
        if not 0 <= self.bos_id < source.vocab_size:
            raise ValueError(f"bos_id={bos_id}; expected 0 to {source.vocab_size - 1}")
        self._lengths = source.lengths + (source.lengths > 0)

    @property
    def fingerprint(self) -> str:
        """The source's and the token."""
        return f"{self.source.fingerprint}+bos{self.bos_id}"

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens per document, the first one and the end token included."""
        return self._lengths

    def gather(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        """Return the tokens ``[start, stop)`` of each document, one piece after the other (see `TokenSource`)."""
        check_pieces(documents, starts, stops, self._lengths)
        found = self.source.gather(documents, np.maximum(starts - 1, 0), np.maximum(stops - 1, 0))
        return self._inserted(found, self.bos_id, starts, stops)

    def weights(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt8[np.ndarray, " tokens"] | None:
        """Return which tokens of `gather` are learned; the first one never is."""
        found = self.source.weights(documents, np.maximum(starts - 1, 0), np.maximum(stops - 1, 0))
        return None if found is None else self._inserted(found, 0, starts, stops)

    def _inserted(
        self,
        found: UInt[np.ndarray, "_"],
        value: int,
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        """Put a value before what begins a document."""
        sizes = stops - starts
        first = (starts == 0) & (sizes > 0)
        out = np.empty(int(sizes.sum()), found.dtype)
        theirs = np.ones(len(out), bool)
        theirs[(sizes.cumsum() - sizes)[first]] = False
        out[theirs] = found
        out[~theirs] = value
        return out


class WithoutEos(_Changed):
    """The documents of a source without the last token of each."""

    def __init__(self, source: TokenSource) -> None:
        super().__init__(source)
        self._lengths = np.maximum(source.lengths - 1, 0)

    @property
    def fingerprint(self) -> str:
        """The source's, and that the ends are gone."""
        return f"{self.source.fingerprint}-eos"

    @property
    def lengths(self) -> Int64[np.ndarray, " documents"]:
        """Tokens per document."""
        return self._lengths

    def gather(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt[np.ndarray, " tokens"]:
        """Return the tokens ``[start, stop)`` of each document, one piece after the other (see `TokenSource`)."""
        check_pieces(documents, starts, stops, self._lengths)
        return self.source.gather(documents, starts, stops)

    def weights(
        self,
        documents: Int[np.ndarray, " pieces"],
        starts: Int[np.ndarray, " pieces"],
        stops: Int[np.ndarray, " pieces"],
    ) -> UInt8[np.ndarray, " tokens"] | None:
        """Return which tokens of `gather` are learned (see `TokenSource`)."""
        return self.source.weights(documents, starts, stops)
