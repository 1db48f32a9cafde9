"""Texts to flat arrays of tokens: the one function that the building process and its workers share."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt, UInt8

from dovetail_data._errors import CacheError
from dovetail_data.corpus import Document

if TYPE_CHECKING:
    import dovetail_protocols
    from dovetail_data.chat import ChatEncoder

__all__ = ["Encoded", "Rules", "encode", "rules"]


class Encoded(NamedTuple):
    """Documents as tokens, each followed by the end-of-document token; all arrays little-endian.

    Attributes:
        tokens: all documents' tokens, one after the other.
        lengths: tokens per document, the end token included.
        sizes: UTF-8 bytes per document.
        weights: 1 for each token that is learned, else 0; None where all are.
    """

    tokens: UInt[np.ndarray, " tokens"]
    lengths: Int64[np.ndarray, " documents"]
    sizes: Int64[np.ndarray, " documents"]
    weights: UInt8[np.ndarray, " tokens"] | None = None


class Rules(NamedTuple):
    """What a tokenizer's ids must satisfy and how they are stored."""

    vocab_size: int
    eos_id: int
    dtype: str


def rules(tokenizer: "dovetail_protocols.Tokenizer | ChatEncoder") -> Rules:
    """Return the storage rules for a tokenizer.

    Raises:
        ValueError: it has no end-of-document token, or its ids do not fit 32 bits.
    """
    size, eos = int(tokenizer.vocab_size), tuple(tokenizer.eos_ids)
    if not 1 <= size <= 2**32:
        raise ValueError(f"the tokenizer has vocab_size={size}; expected 1 to 2**32")
    if not eos or not 0 <= eos[0] < size:
        raise ValueError(f"the tokenizer has eos_ids={eos} and vocab_size={size}; eos_ids[0] must end each document")
    return Rules(size, int(eos[0]), "<u2" if size <= 2**16 else "<u4")


def encode(
    tokenizer: "dovetail_protocols.Tokenizer | ChatEncoder", documents: Sequence[Document], rule: Rules
) -> Encoded:
    """Encode documents.

    Raises:
        CacheError: the tokenizer returned ids outside its vocabulary, or not one list per text.
    """
    texts = [document.text for document in documents]
    given: Any = tokenizer
    weighed = given.encode_weighted(texts) if hasattr(tokenizer, "encode_weighted") else None
    encoded = given.encode_batch(texts) if weighed is None else [ids for ids, _ in weighed]
    if len(encoded) != len(texts):
        raise CacheError(f"the tokenizer returned {len(encoded)} lists for {len(texts)} texts; expected one per text")
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), np.int64, len(encoded))
    ends = ([rule.eos_id] for _ in encoded)
    pairs = zip(encoded, ends, strict=True)
    flat = itertools.chain.from_iterable(itertools.chain.from_iterable(pairs))
    tokens = np.fromiter(flat, np.int64, int(lengths.sum()))
    bad = np.flatnonzero((tokens < 0) | (tokens >= rule.vocab_size))
    if bad.size:
        where = documents[int(np.searchsorted(np.cumsum(lengths), bad[0], side="right"))].id
        raise CacheError(
            f"the tokenizer gave id {tokens[bad[0]]} in document {where!r}; expected 0 to {rule.vocab_size - 1}"
        )
    sizes = np.fromiter((len(text.encode()) for text in texts), np.int64, len(texts))
    weights = None if weighed is None else _weights(weighed, set(tokenizer.eos_ids), lengths)
    return Encoded(tokens.astype(rule.dtype), lengths, sizes, weights)


def _weights(
    weighed: Sequence[tuple[Sequence[int], Sequence[int]]], eos_ids: set[int], lengths: Int64[np.ndarray, " documents"]
) -> UInt8[np.ndarray, " tokens"]:
    """Return the weights of all tokens; the end token is learned after what is learned and does not end by itself."""
    ends = ([int(bool(weights) and weights[-1] == 1 and ids[-1] not in eos_ids)] for ids, weights in weighed)
    parts = itertools.chain.from_iterable(zip((weights for _, weights in weighed), ends, strict=True))
    return np.fromiter(itertools.chain.from_iterable(parts), np.uint8, int(lengths.sum()))
