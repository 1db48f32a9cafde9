"""Corpora in memory, fingerprints."""

import pytest

from dovetail_data import CorpusError, Document, concatenate, from_documents


def test_the_fingerprint_is_of_the_texts_and_their_order_only():
    """If ids counted, renaming a file would rebuild every cache; if boundaries did not, other documents would pass."""
    one = from_documents(["ab", "c"]).fingerprint
    assert one == from_documents([Document("x", "ab"), Document("y", "c")]).fingerprint
    others = [["a", "bc"], ["abc"], ["c", "ab"], ["ab", "c", ""], ["ab", "d"]]
    assert len({one, *(from_documents(texts).fingerprint for texts in others)}) == 6


def test_summary_counts_documents_and_utf8_bytes():
    """Bits per byte are wrong if characters were counted."""
    summary = from_documents(["aé", "", "\N{GRINNING FACE}"]).summary
    assert (summary.documents, summary.bytes, summary.skipped) == (3, 7, 0)


def test_concatenation_is_the_documents_one_after_the_other():
    """A mixture of sources must lose nothing and keep its order."""
    corpus = concatenate(from_documents(["a"]), from_documents([]), from_documents(["b", "c"]))
    assert [document.text for document in corpus] == ["a", "b", "c"] == [document.text for document in corpus]
    assert corpus.fingerprint == from_documents(["a", "b", "c"]).fingerprint


@pytest.mark.parametrize("bad", ["one text", [b"bytes"], [("id", "text")], [None]])
def test_what_is_no_document_is_refused(bad, untyped):
    """A string is an iterable of strings; taking it for documents would make one per character."""
    with pytest.raises(TypeError, match="expected"):
        from_documents(bad)


def test_a_lone_surrogate_is_refused_by_name():
    """It has no bytes, so it could not be counted; the tokenizer would raise something obscure."""
    with pytest.raises(CorpusError, match="'1' has no UTF-8 form"):
        _ = from_documents(["fine", "\ud800"]).summary
