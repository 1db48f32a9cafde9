"""ArrayRecord files, written with their own package."""

import sys

import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, array_records, open_corpus

module = pytest.importorskip("array_record.python.array_record_module")

TEXTS = [f"record {i} {i * i} é " * 20 for i in range(3000)]


def written(path, records, options="group_size:1"):
    writer = module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record if isinstance(record, bytes) else record.encode())
    writer.close()
    return path


@pytest.mark.parametrize("options", ["group_size:1", "group_size:65536", "group_size:7,uncompressed"])
def test_records_are_documents(tmp_path, options):
    """More of them than one batch, whatever the groups."""
    path = written(tmp_path / "a.array_record", TEXTS, options)
    assert texts(array_records(path)) == TEXTS
    assert ids(array_records(tmp_path))[-1] == "a.array_record:2999"
    assert texts(open_corpus(path)) == TEXTS


def test_decode_makes_the_text(tmp_path):
    """Records hold what their writer chose."""
    path = written(tmp_path / "a.array_record", ["ab", "cd"])
    assert texts(array_records(path, decode=lambda record: record[::-1].decode())) == ["ba", "dc"]


def test_undecodable_records_are_named_or_counted(tmp_path):
    """As lines and files are."""
    path = written(tmp_path / "a.array_record", ["a", b"\xff", "b"])
    with pytest.raises(CorpusError, match=r"a\.array_record, record 1 cannot be decoded .*skip"):
        texts(array_records(path))
    corpus = array_records(path, undecodable="skip")
    assert ids(corpus) == ["a.array_record:0", "a.array_record:2"]
    assert corpus.summary.skipped == 1


def test_flipped_bits_are_named(tmp_path):
    """Every chunk has a hash; what it tells must not end as another kind of error."""
    path = written(tmp_path / "a.array_record", TEXTS, "group_size:64,uncompressed")
    data = path.read_bytes()
    found = 0
    for at in range(100, len(data) - 65536, len(data) // 23):
        flipped = bytearray(data)
        flipped[at] ^= 16
        path.write_bytes(flipped)
        try:
            assert texts(array_records(path)) == TEXTS
        except CorpusError as error:
            assert "a.array_record is damaged" in str(error)  # noqa: PT017
            found += 1
    assert found > 15


@pytest.mark.parametrize("size", [0, 100, 0.5, -1])
def test_cut_files_are_named(tmp_path, size):
    """The reader counts no records in them and says nothing."""
    path = written(tmp_path / "a.array_record", TEXTS)
    data = path.read_bytes()
    path.write_bytes(data[: int(size * len(data)) if size == 0.5 else size])
    with pytest.raises(CorpusError, match=r"a\.array_record is damaged"):
        texts(array_records(path))


def test_a_url_is_read_through_a_copy(tmp_path):
    """The reader knows only local paths."""
    fsspec = pytest.importorskip("fsspec")
    data = written(tmp_path / "a.array_record", TEXTS).read_bytes()
    fsspec.filesystem("memory").pipe_file("/records/a.array_record", data)
    assert array_records("memory://records").fingerprint == array_records(tmp_path).fingerprint
    fsspec.filesystem("memory").rm("/records", recursive=True)


def test_without_array_record_the_error_says_what_to_install(tmp_path, monkeypatch):
    """It has no wheels for every machine."""
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[array-record\]"):
        array_records(tmp_path)
