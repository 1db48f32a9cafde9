"""Reading pieces of documents, views and splits."""

import numpy as np
import pytest
from data_toys import Arrays
from hypothesis import given
from hypothesis import strategies as st

from dovetail_data import TokenView


@given(st.data())
def test_gather_is_the_pieces_one_after_the_other(data):
    """A view of a view against plain slices of a list of documents."""
    source = Arrays(data.draw(st.lists(st.integers(0, 5), min_size=3, max_size=12)))
    documents = [source.starts[i] + np.arange(n) for i, n in enumerate(source.lengths)]
    chosen = data.draw(st.permutations(range(len(source))))[: data.draw(st.integers(2, len(source)))]
    inner = TokenView(source, np.array(chosen))
    view = TokenView(inner, np.arange(len(inner))[::-1].copy())
    expected = [documents[i] for i in chosen[::-1]]
    ids = data.draw(st.lists(st.integers(0, len(view) - 1), max_size=6))
    spans = [sorted(data.draw(st.tuples(*[st.integers(0, int(view.lengths[i]))] * 2))) for i in ids]
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    got = view.gather(np.array(ids, np.int64), starts, stops)
    pieces = [expected[i][a:b] for i, (a, b) in zip(ids, spans, strict=True)]
    assert got.tolist() == [int(token) for piece in pieces for token in piece]
    assert view.lengths.tolist() == [len(document) for document in expected]
    assert view.byte_lengths.tolist() == [3 * len(document) for document in expected]
    assert [view.origin(i) for i in range(len(view))] == [f"doc{i}" for i in chosen[::-1]]


BAD_PIECES = [
    (([0, 40], [0, 0], [1, 1]), IndexError, "document 40 of 40"),
    (([-1], [0], [1]), IndexError, "document -1 of 40"),
    (([1], [-1], [1]), IndexError, "tokens -1 to 1"),
    (([1], [2], [1]), IndexError, "tokens 2 to 1"),
    (([0], [0], [2]), IndexError, "tokens 0 to 2 of document 0, which has 1"),
    (([0, 1], [0], [1]), ValueError, "integers of one length"),
    (([[0]], [[0]], [[1]]), ValueError, "integers of one length"),
    (([0.0], [0.0], [1.0]), ValueError, "integers of one length"),
]


@pytest.mark.parametrize(("pieces", "error", "message"), BAD_PIECES)
def test_pieces_that_do_not_exist_are_refused(cache, pieces, error, message, untyped):
    """A negative index would silently read the end of another document."""
    arrays = [np.array(part) for part in pieces]
    with pytest.raises(error, match=message):
        cache.gather(*arrays)
    with pytest.raises(error, match=message):
        TokenView(cache, np.arange(40)).gather(*arrays)


@pytest.mark.parametrize("validation", [0.001, 0.02, 0.5, 0.999])
def test_a_split_shares_no_document_and_loses_none(cache, validation):
    """A shared document makes the validation loss a lie."""
    train, held = cache.split(validation, seed=3)
    both = np.concatenate((train.documents, held.documents))
    assert sorted(both.tolist()) == list(range(40))
    assert len(held) == min(max(round(40 * validation), 1), 39)
    assert train.tokens + held.tokens == cache.tokens
    assert train.bytes + held.bytes == cache.bytes


def test_a_split_is_a_function_of_its_seed(cache):
    """Resumed runs must validate on the same documents; other seeds on others."""
    first, again, other = (cache.split(0.3, seed=seed)[1] for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.documents.tolist() == again.documents.tolist() != other.documents.tolist()
    assert cache.split(0.3)[0].fingerprint not in (first.fingerprint, cache.fingerprint)


def test_wrong_splits_and_views_are_refused(cache, untyped):
    """An empty side has no plan; a document twice is not a set."""
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="expected a share"):
            cache.split(share)
    with pytest.raises(ValueError, match="needs at least 2"):
        Arrays([5]).split()
    for documents, error in (([], ValueError), ([1, 1], ValueError), ([40], IndexError), ([-1], IndexError)):
        with pytest.raises(error, match="expected"):
            TokenView(cache, np.array(documents, np.int64))
    with pytest.raises(ValueError, match="expected integers"):
        TokenView(cache, np.array([0.5]))


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight():
    """log(256) nats for each byte, and nothing for ends that do not exist here."""
    source = Arrays([10, 20])
    assert source.bits_per_byte(np.log(256) * 3) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="0 bytes"):
        Arrays([0]).bits_per_byte(1.0)
