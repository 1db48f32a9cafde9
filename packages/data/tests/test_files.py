"""Corpora behind URLs."""

import functools
import gzip
import http.server
import json
import pathlib
import sys
import threading

import pyarrow
import pyarrow.parquet
import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, jsonl, open_corpus, parquet, text_files

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def tree(tmp_path):
    """Every format that takes URLs, beside files that are left out."""
    root = tmp_path / "tree"
    for name, text in {"b.txt": "B", "a.txt": "A\r\n", "sub/c.md": "é", ".git/d.txt": "no", "x.bin": "no"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    (root / "z.jsonl.gz").write_bytes(gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in "JK")))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["P", "Q"]}), root / "y.parquet")
    return root


@pytest.fixture
def memory(tree):
    """The same files in fsspec's memory."""
    system = fsspec.filesystem("memory")
    for path in tree.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/data/{path.relative_to(tree).as_posix()}", path.read_bytes())
    yield "memory://data"
    system.rm("/data", recursive=True)


@pytest.fixture
def served(tree):
    """The same files behind HTTP on this machine."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tree)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
    fsspec.filesystem("http").dircache.clear()


def test_a_directory_in_memory_is_the_local_one(tree, memory):
    """Names, order and content must not depend on where the files are, or every cache would be built again."""
    local, remote = open_corpus(tree), open_corpus(memory)
    names = ["a.txt", "b.txt", "sub/c.md", "z.jsonl.gz:1", "z.jsonl.gz:2", "y.parquet:0", "y.parquet:1"]
    assert ids(remote) == ids(local) == names
    assert texts(remote) == texts(local)
    assert remote.fingerprint == local.fingerprint
    assert ids(text_files([f"{memory}/x.bin", f"{memory}/sub/"])) == ["x.bin", "sub/c.md"]


def test_each_format_reads_a_url(memory, served):
    """One way of opening files for all."""
    for root in (memory, served):
        assert texts(text_files(f"{root}/a.txt")) == ["A\r\n"]
        assert texts(jsonl(f"{root}/z.jsonl.gz")) == ["J", "K"]
        assert ids(parquet(f"{root}/y.parquet")) == ["y.parquet:0", "y.parquet:1"]
        assert texts(open_corpus(f"{root}/z.jsonl.gz", f"{root}/x.bin")) == ["J", "K", "no"]


def test_large_files_of_a_server_without_ranges(tree, served):
    """Python's own server is one; the error names the file, and a copy gets around it."""
    text = "".join(f"{i}\n" for i in range(1_500_000))
    (tree / "large.txt").write_text(text)
    with pytest.raises(CorpusError, match=r"http://.*large\.txt cannot be read .*range requests"):
        texts(text_files(f"{served}/large.txt"))
    corpus = text_files(f"simplecache::{served}/large.txt")
    assert texts(corpus) == [text]
    assert ids(corpus) == ["large.txt"]


def test_a_url_in_a_path_is_told(memory):
    """A command line that makes Paths would otherwise look for a local folder in vain."""
    with pytest.raises(FileNotFoundError, match="a URL must be a string"):
        text_files(pathlib.Path(memory))


def test_a_query_is_no_part_of_a_name(served):
    """Download links have them; the suffix comes before."""
    assert ids(open_corpus(f"{served}/z.jsonl.gz?download=true")) == ["z.jsonl.gz:1", "z.jsonl.gz:2"]


def test_a_listed_directory_behind_http(served):
    """A server that lists its files serves as a directory; the slash says that it is one."""
    assert ids(text_files(f"{served}/sub/")) == ["c.md"]


def test_what_is_missing_is_named(memory, served):
    """Also what disappears between finding and reading."""
    for url in (f"{memory}/nope.txt", f"{served}/nope.txt"):
        with pytest.raises(FileNotFoundError, match=r"://.*nope\.txt does not exist"):
            text_files(url)
    with pytest.raises(CorpusError, match="no file with a suffix"):
        text_files(f"{memory}/sub", suffixes=(".nope",))
    corpus = text_files(f"{memory}/b.txt")
    fsspec.filesystem("memory").rm("/data/b.txt")
    with pytest.raises(CorpusError, match=r"memory://.*b\.txt cannot be read \(FileNotFoundError"):
        texts(corpus)


def test_damage_behind_a_url_is_named(memory):
    """The file is not on this machine to look at."""
    system = fsspec.filesystem("memory")
    for name, read in {"z.jsonl.gz": jsonl, "y.parquet": parquet}.items():
        system.pipe_file(f"/data/{name}", system.cat_file(f"/data/{name}")[:-7])
        with pytest.raises(CorpusError, match=f"memory://.*{name}"):
            texts(read(f"{memory}/{name}"))
    system.pipe_file("/data/a.txt", b"\xff")
    with pytest.raises(CorpusError, match=r"memory://.*a\.txt is not UTF-8"):
        texts(text_files(memory))
    assert text_files(memory, undecodable="skip").summary.skipped == 1


def test_missing_packages_are_named(tree, monkeypatch):
    """fsspec is an extra, and so is what it needs for each kind of URL; local files need neither."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ModuleNotFoundError, match=r"s3://bucket/a: pip install 'fsspec\[s3\]'"):
        open_corpus("s3://bucket/a")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    assert len(texts(open_corpus(tree))) == 7
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[fsspec\]"):
        open_corpus("memory://data")
