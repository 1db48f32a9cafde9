"""The baseline that any language model must beat: how often each token occurs, and nothing else."""

import math

import numpy as np
from jaxtyping import Int64

from dovetail_data.tokens import TokenSource

__all__ = ["token_counts", "unigram_bits_per_byte"]

_BLOCK = 1 << 22  # tokens read at a time


def token_counts(source: TokenSource) -> Int64[np.ndarray, " vocab"]:
    """Return how often each id occurs in a source."""
    counts = np.zeros(source.vocab_size, np.int64)
    ends = np.cumsum(source.lengths)
    first = 0
    while first < len(source):
        limit = int(ends[first] - source.lengths[first]) + _BLOCK
        last = max(int(np.searchsorted(ends, limit, side="right")), first + 1)
        ids = np.arange(first, last)
        counts += np.bincount(source.gather(ids, np.zeros_like(ids), source.lengths[ids]), minlength=source.vocab_size)
        first = last
    return counts


def unigram_bits_per_byte(train: TokenSource, validation: TokenSource) -> float:
    """Return the bits per byte of text of `validation` under the add-one-smoothed token frequencies of `train`.

    Every token counts, end tokens included, as in `TokenSource.bits_per_byte`.

    Raises:
        ValueError: the vocabularies differ, or `validation` holds no text.
    """
    if train.vocab_size != validation.vocab_size:
        raise ValueError(f"the vocabularies have {train.vocab_size} and {validation.vocab_size} ids; expected one size")
    counts = token_counts(train)
    nats = math.log(train.tokens + train.vocab_size) - np.log(counts + 1)
    return validation.bits_per_byte(float(nats @ token_counts(validation)) / validation.tokens)
