"""Orders of more documents than a block: every document once, few in memory."""

import tracemalloc

import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_data import Plan, TokenSource
from dovetail_data import order as orders
from dovetail_data.order import Order


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=90), st.integers(2, 6), st.integers(1, 3), st.integers(0, 3))
def test_every_document_is_in_one_block(lengths, block, chunk, epoch):
    """For any number of chunks, whole or not; where blocks begin is what their documents add up to."""
    source = Arrays(lengths)
    made = Order(source, 5, block=block * chunk, chunk=chunk)
    blocks = [made.block(epoch, number) for number in range(made.blocks)]
    assert sorted(np.concatenate([part.documents for part in blocks]).tolist()) == list(range(len(lengths)))
    ends = np.cumsum([part.ends[-1] for part in blocks])
    np.testing.assert_array_equal(made.starts(epoch), [0, *ends])
    assert max(len(part.documents) for part in blocks) <= max(block * chunk, 1)
    for part in blocks:
        np.testing.assert_array_equal(np.diff(part.ends, prepend=0), source.lengths[part.documents])


def test_blocks_mix_documents_from_everywhere():
    """Breaks when a block is a stretch of the corpus: one source after the other in sorted files."""
    made = Order(Arrays([1] * 64_000), 0, block=6400, chunk=64)
    for epoch in range(2):
        for number in range(made.blocks):
            documents = made.block(epoch, number).documents
            spread = np.bincount(documents // 6400, minlength=10)
            assert spread.min() >= 64
            assert np.abs(np.corrcoef(np.arange(len(documents)), documents)[0, 1]) < 0.1
    assert not np.array_equal(made.block(0, 0).documents, made.block(1, 0).documents)


@pytest.mark.parametrize("packing", ["cut", "first_fit", "best_fit"])
def test_plans_over_many_blocks_have_every_token_once_per_epoch(monkeypatch, packing):
    """All that is promised of one block holds of many."""
    monkeypatch.setattr(orders, "BLOCK", 60)
    monkeypatch.setattr(orders, "CHUNK", 6)
    source = Arrays(np.random.default_rng(0).integers(0, 9, 500))
    made = Plan(source, seq_len=16, batch=3, seed=2, epochs=2, packing=packing, across_documents=True)
    parts = [made.at(step) for step in range(made.steps)]
    seen = np.concatenate([part.targets[part.loss_weights == 1] for part in parts])
    firsts = np.concatenate([part.tokens[:, 0][part.segment_ids[:, 0] > 0] for part in parts])
    everything = np.bincount(np.concatenate([seen, firsts]), minlength=source.tokens)
    assert (np.bincount(seen, minlength=source.tokens) <= 2).all()
    if packing == "cut":
        assert (np.bincount(seen, minlength=source.tokens) == 2).sum() >= source.tokens - 1
    else:
        assert (everything == 2).all()


class Synthetic(TokenSource):
    """Very many documents, of which only the lengths exist."""

    fingerprint, vocab_size = "synthetic", 1000

    def __init__(self, count):
        self._lengths = np.random.default_rng(0).integers(20, 400, count, dtype=np.uint16)

    @property
    def lengths(self):
        return self._lengths

    byte_lengths = lengths

    def gather(self, documents, starts, stops):
        return np.repeat(documents % 1000, np.asarray(stops) - starts).astype(np.uint16)

    def origin(self, document):
        return str(document)


@pytest.mark.parametrize("count", [3_000_000, pytest.param(100_000_000, marks=pytest.mark.soak)])
def test_memory_of_a_plan_does_not_grow_with_the_corpus(count, untyped):
    """Beyond the lengths: a sum per chunk and the blocks in use, 16 bytes per document of each."""
    source = Synthetic(count)
    assert source.tokens > 100 * count
    tracemalloc.start()
    made = Plan(source, seq_len=1024, batch=8, seed=0)
    for step in (0, 1, 10**4, 10**4 + 1):
        assert made.at(step).tokens.shape == (8, 1024)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 * 16 * orders.BLOCK + 24 * count / orders.CHUNK + 40e6
