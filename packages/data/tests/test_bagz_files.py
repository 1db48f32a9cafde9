"""Bagz files, written with their own package."""

import sys

import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, bagz_records, open_corpus

bagz = pytest.importorskip("bagz")

TEXTS = [f"record {i} {i * i} é " * 5 for i in range(3000)]


def written(path, records):
    with bagz.Writer(path) as writer:
        for record in records:
            writer.write(record if isinstance(record, bytes) else record.encode())
    return path


@pytest.mark.parametrize("name", ["a.bagz", "a.bag"])
def test_records_are_documents(tmp_path, name):
    """More of them than one batch, compressed and not."""
    path = written(tmp_path / name, TEXTS)
    assert texts(bagz_records(path)) == TEXTS
    assert ids(bagz_records(path))[-1] == f"{name}:2999"


def test_open_corpus_and_urls(tmp_path):
    """A copy of a remote file must keep the suffix that tells how it is compressed."""
    fsspec = pytest.importorskip("fsspec")
    data = written(tmp_path / "a.bagz", TEXTS).read_bytes()
    fsspec.filesystem("memory").pipe_file("/bags/a.bagz", data)
    assert texts(open_corpus(tmp_path)) == texts(open_corpus("memory://bags")) == TEXTS
    fsspec.filesystem("memory").rm("/bags", recursive=True)


def test_undecodable_records_are_named_or_counted(tmp_path):
    """As lines and files are; `decode` may know better."""
    path = written(tmp_path / "a.bagz", ["a", b"\xff", "b"])
    with pytest.raises(CorpusError, match=r"a\.bagz, record 1 cannot be decoded"):
        texts(bagz_records(path))
    corpus = bagz_records(path, undecodable="skip")
    assert (ids(corpus), corpus.summary.skipped) == (["a.bagz:0", "a.bagz:2"], 1)
    assert texts(bagz_records(path, decode=lambda record: record.decode("latin-1"))) == ["a", "ÿ", "b"]


@pytest.mark.parametrize("size", [0, 100, 20_000, -1, -8])
def test_cut_files_are_named(tmp_path, size):
    """A cut download must not pass for a shorter corpus."""
    path = written(tmp_path / "a.bagz", TEXTS)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorpusError, match=r"a\.bagz is (damaged|empty)"):
        texts(bagz_records(path))


def test_without_bagz_the_error_says_what_to_install(tmp_path, monkeypatch):
    """It has no wheels for every machine."""
    monkeypatch.setitem(sys.modules, "bagz", None)
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[bagz\]"):
        bagz_records(tmp_path)
