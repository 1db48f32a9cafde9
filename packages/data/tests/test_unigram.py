"""The unigram baseline."""

import math
from collections import Counter

import numpy as np
import pytest
from data_toys import Arrays, Bytes

from dovetail_data import build_cache, token_counts, unigram, unigram_bits_per_byte


def test_it_is_the_cross_entropy_of_smoothed_frequencies(cache, monkeypatch):
    """Recomputed from the texts with a Counter; blocks of documents must not matter."""
    monkeypatch.setattr(unigram, "_BLOCK", 300)
    train, held = cache.split(0.25)
    texts = [f"document {i} " * (i % 7) for i in range(40)]
    counts = Counter(token for i in train.documents for token in [*texts[i].encode(), 256])
    total = sum(counts.values()) + 257
    bits = [-math.log2((counts[t] + 1) / total) for i in held.documents for t in [*texts[i].encode(), 256]]
    size = sum(len(texts[i].encode()) for i in held.documents)
    assert unigram_bits_per_byte(train, held) == pytest.approx(sum(bits) / size, rel=1e-12)
    assert token_counts(train).tolist() == [counts[i] for i in range(257)]


def test_other_vocabularies_and_no_text_are_refused(cache, tmp_path):
    """The ids would mean something else."""
    with pytest.raises(ValueError, match="vocabularies have 257 and 5"):
        unigram_bits_per_byte(cache, Arrays(np.array([5])))
    empty = build_cache(["", ""], Bytes(), tmp_path / "empty")
    with pytest.raises(ValueError, match="0 bytes"):
        unigram_bits_per_byte(cache, empty)
