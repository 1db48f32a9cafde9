"""Datasets saved on disk, laid out as Hugging Face's `save_to_disk` does."""

import json
import sys

import pyarrow
import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, hf_dataset, open_corpus


def stream(path, **columns):
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def saved(path, *shards, **state):
    path.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        stream(path / name, **shard)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", **state}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")
    return path


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "set", {"n": [1, 2, 3], "text": ["a", "é", ""]}, {"n": [4], "text": ["d"]})


def test_rows_are_documents(path):
    """Over batches and shards."""
    corpus = hf_dataset(path)
    assert texts(corpus) == ["a", "é", "", "d"]
    assert ids(corpus)[2:] == ["data-00000-of-00002.arrow:2", "data-00001-of-00002.arrow:0"]
    assert texts(open_corpus(path)) == texts(corpus)


def test_the_state_says_what_belongs_to_it_and_in_which_order(path):
    """Saving fewer shards over a larger set leaves old ones behind."""
    state = {"_data_files": [{"filename": "data-00001-of-00002.arrow"}]}
    (path / "state.json").write_text(json.dumps(state))
    assert texts(hf_dataset(path)) == ["d"]


def test_other_columns_and_large_strings(tmp_path):
    """Both string types occur in the wild."""
    path = saved(tmp_path / "set", {"body": pyarrow.array(["x", "y"], pyarrow.large_string())})
    assert texts(hf_dataset(path, column="body")) == ["x", "y"]
    with pytest.raises(CorpusError, match=r"arrow has the columns .*'body'.*; expected strings in 'text'"):
        texts(hf_dataset(path))
    with pytest.raises(CorpusError, match="row 1 has no text in 'text'"):
        texts(hf_dataset(saved(tmp_path / "nulls", {"text": ["a", None]})))


def test_what_is_no_dataset_is_told_apart(path, tmp_path):
    """Splits, missing shards, shuffled rows that were not written, and strange files."""
    splits = saved(tmp_path / "splits/train", {"text": ["a"]}).parent
    (splits / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(CorpusError, match=r"splits holds the splits \['train'\]"):
        hf_dataset(splits)
    assert texts(hf_dataset(splits / "train")) == ["a"]
    with pytest.raises(CorpusError, match="flatten_indices"):
        hf_dataset(saved(tmp_path / "indices", {"text": ["a"]}, _indices_data_files=[{"filename": "i.arrow"}]))
    (path / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(CorpusError, match=r"lacks \['data-00001-of-00002.arrow'\]"):
        hf_dataset(path)
    (path / "state.json").write_text("{")
    with pytest.raises(CorpusError, match=r"state\.json is not JSON"):
        hf_dataset(path)
    (path / "state.json").unlink()
    with pytest.raises(CorpusError, match=r"has no state\.json"):
        hf_dataset(path)


def test_no_cut_passes_for_a_shorter_dataset(path):
    """pyarrow takes a file that ends between two batches for a whole one."""
    shard = path / "data-00000-of-00002.arrow"
    data = shard.read_bytes()
    for size in range(0, len(data), 8):
        shard.write_bytes(data[:size])
        with pytest.raises(CorpusError, match=r"data-00000-of-00002\.arrow"):
            texts(hf_dataset(path))


def test_invalid_utf8_is_named(tmp_path):
    """The format has no checksums, so what can be checked is."""
    path = saved(tmp_path / "set", {"text": ["abcdefgh", "b"]})
    shard = path / "data-00000-of-00001.arrow"
    shard.write_bytes(shard.read_bytes().replace(b"abcdefgh", b"abc\xffefgh"))
    with pytest.raises(CorpusError, match=r"data-00000-of-00001\.arrow cannot be read .*UTF8"):
        texts(hf_dataset(path))


def test_a_url_is_read(path):
    """Saved datasets lie in object stores, too."""
    fsspec = pytest.importorskip("fsspec")
    fsspec.filesystem("memory").put(str(path), "/saved", recursive=True)
    assert ids(hf_dataset("memory://saved")) == ids(hf_dataset(path))
    assert hf_dataset("memory://saved").fingerprint == hf_dataset(path).fingerprint
    fsspec.filesystem("memory").rm("/saved", recursive=True)


def test_without_pyarrow_the_error_says_what_to_install(path, monkeypatch):
    """The base install has no pyarrow."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[parquet\]"):
        hf_dataset(path)
