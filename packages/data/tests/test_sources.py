"""Corpora on disk."""

import gzip
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, jsonl, open_corpus, parquet, text_files


@pytest.fixture
def tree(tmp_path):
    for name, text in {"b.txt": "B", "a.txt": "A\r\n", "sub/c.md": "é", "x.bin": "no", ".git/d.txt": "no"}.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return tmp_path / "tree"


def test_a_directory_is_read_in_the_order_of_names_and_unchanged(tree):
    """The order of os.walk is the file system's; the same files would give another cache on another machine."""
    corpus = text_files(tree)
    assert ids(corpus) == ["a.txt", "b.txt", "sub/c.md"]
    assert texts(corpus) == ["A\r\n", "B", "é"]
    assert texts(text_files(tree, suffixes=(".md",))) == ["é"]


def test_a_list_keeps_its_order_and_takes_any_suffix(tree):
    """What the user names is what the user wants."""
    corpus = text_files([tree / "x.bin", tree / "a.txt", tree / "sub"])
    assert ids(corpus) == ["x.bin", "a.txt", "sub/c.md"]


def test_moving_a_directory_keeps_the_fingerprint_and_changing_a_byte_does_not(tree):
    """States and caches must survive a move (defect 14 of the peers) and never a change."""
    before = text_files(tree).fingerprint
    moved = tree.rename(tree.parent / "elsewhere")
    assert text_files(moved).fingerprint == before
    (moved / "b.txt").write_text("b")
    assert text_files(moved).fingerprint != before


def test_undecodable_files_are_named_or_counted(tree):
    """A file that silently vanished or turned into replacement characters would be training data nobody chose."""
    (tree / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorpusError, match=r"bad\.txt is not UTF-8"):
        _ = text_files(tree).summary
    summary = text_files(tree, undecodable="skip").summary
    assert (summary.documents, summary.skipped) == (3, 1)


def test_nothing_to_read_is_an_error(tree, tmp_path):
    """An empty corpus would surface much later, as a division by zero."""
    with pytest.raises(CorpusError, match=r"no file with a suffix in \('.nope',\)"):
        text_files(tree, suffixes=(".nope",))
    with pytest.raises(FileNotFoundError, match="missing"):
        text_files(tmp_path / "missing")
    with pytest.raises(CorpusError, match="no paths"):
        open_corpus()


@pytest.mark.parametrize("option", [{"suffixes": ".txt"}, {"suffixes": ("",)}, {"undecodable": "ignore"}])
def test_wrong_options_are_refused(tree, option, untyped):
    """A string of suffixes would match every file that ends in 't'."""
    with pytest.raises(ValueError, match="expected"):
        text_files(tree, **option)


def lines(path, *values, opener=open):
    with opener(path, "wb") as stream:
        stream.write(b"".join(v if isinstance(v, bytes) else json.dumps(v).encode() + b"\n" for v in values))
    return path


def test_jsonl_plain_and_gzip_agree(tmp_path):
    """Compression must not change the corpus."""
    values = [{"text": "a\nb", "n": 1}, b"\n", {"text": "\N{GRINNING FACE}"}, b'{"text": "last"}']
    plain = jsonl(lines(tmp_path / "a.jsonl", *values))
    packed = jsonl(lines(tmp_path / "a.jsonl.gz", *values, opener=gzip.open))
    assert texts(plain) == ["a\nb", "\N{GRINNING FACE}", "last"] == texts(packed)
    assert ids(plain) == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4"]
    assert plain.fingerprint == packed.fingerprint


def test_jsonl_reads_another_field(tmp_path):
    """Field names differ between data sets."""
    assert texts(jsonl(lines(tmp_path / "a.jsonl", {"text": "no", "body": "yes"}), field="body")) == ["yes"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops\n", "line 2 is not JSON"),
        (b"[1]\n", "expected an object with a string in 'text'"),
        (b'{"txt": "a"}\n', "expected an object"),
        (b'{"text": 3}\n', "expected an object"),
        (b'{"text": "\xff"}\n', "line 2 is not UTF-8"),
        (b'{"text": "\\ud800"}\n', "line 2 holds half a surrogate pair"),
        (b"[" * 100_000 + b"\n", "line 2 is n"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    """A corpus of millions of lines cannot be searched by hand."""
    path = lines(tmp_path / "a.jsonl", {"text": "fine"}, line)
    with pytest.raises(CorpusError, match=message):
        texts(jsonl(path))


def test_undecodable_lines_can_be_skipped_but_broken_json_cannot(tmp_path):
    """The option is about encoding, not about losing half a file to a stray brace."""
    path = lines(tmp_path / "a.jsonl", b'{"text": "\xff"}\n', b'{"text": "\\udc00"}\n', {"text": "kept"})
    corpus = jsonl(path, undecodable="skip")
    assert texts(corpus) == ["kept"]
    assert corpus.summary.skipped == 2
    with pytest.raises(CorpusError, match="not JSON"):
        texts(jsonl(lines(tmp_path / "b.jsonl", b"{\n"), undecodable="skip"))


@pytest.mark.parametrize("damage", ["cut", "flip", "plain"])
def test_damaged_gzip_is_named(tmp_path, damage):
    """A cut download must not pass for a shorter corpus."""
    path = lines(tmp_path / "a.jsonl.gz", *({"text": f"text {i} {i * i}"} for i in range(300)), opener=gzip.open)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 16
    path.write_bytes({"cut": data[:-20], "flip": data, "plain": b'{"text": "not compressed"}'}[damage])
    with pytest.raises(CorpusError, match=r"a\.jsonl\.gz"):
        texts(jsonl(path))


def table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_rows_are_documents(tmp_path, kind):
    """Both string types occur in the wild."""
    path = table(tmp_path / "a.parquet", n=[1, 2], text=pyarrow.array(["one", "two"], kind))
    assert texts(parquet(path)) == ["one", "two"]
    assert ids(parquet(tmp_path)) == ["a.parquet:0", "a.parquet:1"]


def test_bad_parquet_is_named(tmp_path):
    """Nulls, missing columns and damage are told apart."""
    with pytest.raises(CorpusError, match=r"has the columns .*'n': 'int64'.* strings in 'text'"):
        texts(parquet(table(tmp_path / "a.parquet", n=[1])))
    with pytest.raises(CorpusError, match="row 1 has no text"):
        texts(parquet(table(tmp_path / "b.parquet", text=["a", None])))
    whole = table(tmp_path / "c.parquet", text=["a"] * 100).read_bytes()
    (tmp_path / "c.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorpusError, match=r"c\.parquet cannot be read"):
        texts(parquet(tmp_path / "c.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    """The base install has no pyarrow."""
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[parquet\]"):
        parquet(tmp_path)


def test_open_corpus_reads_each_file_as_its_suffix_says(tree):
    """What `--corpus DIR|FILE...` gives."""
    lines(tree / "z.jsonl", {"text": "J"})
    table(tree / "y.parquet", text=["P"])
    assert texts(open_corpus(tree)) == ["A\r\n", "B", "é", "J", "P"]
    assert texts(open_corpus(tree / "z.jsonl", tree / "x.bin")) == ["J", "no"]
