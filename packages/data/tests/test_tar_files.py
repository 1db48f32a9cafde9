"""WebDataset shards, written with the standard library."""

import io
import sys
import tarfile

import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, open_corpus, webdataset


def shard(path, members, mode="w", **options):
    with tarfile.open(path, mode, **options) as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


SAMPLES = [
    *(("a/001.cls", b"3"), ("a/001.txt", "é\r\n".encode()), ("a/001.json", b'{"text": "J1", "body": "B1"}')),
    *(("a/002.TXT", b"two"), ("a/002.json", b'{"text": "J2"}')),
]


def test_samples_are_documents(tmp_path):
    """The text of each sample, unchanged, named by its shard and key."""
    shard(tmp_path / "s-1.tar", [("003.txt", b"three")])
    shard(tmp_path / "s-0.tar", SAMPLES)
    corpus = webdataset(tmp_path)
    assert texts(corpus) == ["é\r\n", "two", "three"]
    assert ids(corpus) == ["s-0.tar:a/001", "s-0.tar:a/002", "s-1.tar:003"]
    assert texts(open_corpus(tmp_path)) == texts(corpus)


def test_json_members_have_a_field(tmp_path):
    """Shards of web text keep the text beside its source."""
    path = shard(tmp_path / "a.tar", SAMPLES)
    assert texts(webdataset(path, field="json")) == ["J1", "J2"]
    assert texts(webdataset(shard(tmp_path / "b.tar", SAMPLES[:3]), field="json", json_key="body")) == ["B1"]
    with pytest.raises(CorpusError, match=r"a\.tar, member a/002\.json is .*a string in 'body'"):
        texts(webdataset(path, field="json", json_key="body"))


def test_an_extension_begins_at_the_first_dot(tmp_path):
    """`0.5` in a name would cut it in two; the format says so, and folders may have dots."""
    path = shard(tmp_path / "a.tar", [("v1.0/x.en.txt", b"en"), ("v1.0/x.de.txt", b"de")])
    assert texts(webdataset(path, field="en.txt")) == ["en"]
    assert ids(webdataset(path, field="de.txt")) == ["a.tar:v1.0/x"]


def test_what_is_no_sample_is_left_out(tmp_path):
    """Folders, notes, and what operating systems add."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("b.txt")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ("README", "._a.txt", "__meta.txt__", "./a.txt"):
            header = tarfile.TarInfo(name)
            header.size = 1
            archive.addfile(header, io.BytesIO(b"x"))
    assert ids(webdataset(path)) == ["a.tar:a"]


@pytest.mark.parametrize("names", [["a.cls"], ["a.cls", "b.txt"], ["a.txt", "b.cls"], ["a.txt", "a.txt"]])
def test_samples_without_one_text_are_named(tmp_path, names):
    """Nothing may vanish silently, and nothing be read twice."""
    path = shard(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(CorpusError, match=r"a\.tar, sample [ab] has files .*; expected one that is 'txt'"):
        texts(webdataset(path))


def test_undecodable_members_are_named_or_counted(tmp_path):
    """As lines and files are."""
    path = shard(tmp_path / "a.tar", [("a.txt", b"\xff"), ("b.txt", b"b")])
    with pytest.raises(CorpusError, match=r"a\.tar, member a\.txt is not UTF-8"):
        texts(webdataset(path))
    assert texts(webdataset(path, undecodable="skip")) == ["b"]
    assert webdataset(path, undecodable="skip").summary.skipped == 1


def test_a_name_that_is_not_utf8_stays_readable(tmp_path):
    """Ids are written to a JSON file and shown to people."""
    path = shard(tmp_path / "a.tar", [("\xe9.txt", b"x")], format=tarfile.USTAR_FORMAT, encoding="latin-1")
    assert ids(webdataset(path)) == [r"a.tar:\xe9"]


def test_compressed_shards_agree(tmp_path):
    """Compression must not change the corpus."""
    zstandard = pytest.importorskip("zstandard")
    plain = shard(tmp_path / "a.tar", SAMPLES)
    packed = [shard(tmp_path / name, SAMPLES, "w:gz") for name in ("b.tar.gz", "c.tgz")]
    (tmp_path / "d.tar.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    for path in (*packed, tmp_path / "d.tar.zst"):
        assert webdataset(path).fingerprint == webdataset(plain).fingerprint


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_cut_passes_for_a_shorter_shard(tmp_path, layout):
    """Python's reader takes a cut or damaged header for the end of the archive."""
    members = [(f"{i:03}é{'x' * 60 * i}.txt", b"t" * 200 * i) for i in range(3)]
    members = [(name[:90] if layout == tarfile.USTAR_FORMAT else name, data) for name, data in members]
    members = [(name.removesuffix(".txt") + ".txt", data) for name, data in members]
    data = shard(tmp_path / "whole.tar", members, format=layout).read_bytes()
    end = data.rstrip(b"\0")
    whole = -(-len(end) // 512) * 512 + 512
    assert len(texts(webdataset(tmp_path / "whole.tar"))) == 3
    for size in range(0, whole, 64):
        (tmp_path / "cut.tar").write_bytes(data[:size])
        with pytest.raises(CorpusError, match=r"cut\.tar is damaged"):
            texts(webdataset(tmp_path / "cut.tar"))


def test_damage_is_named(tmp_path):
    """A flipped bit in a header, and one in compressed data behind the last member."""
    data = bytearray(shard(tmp_path / "a.tar", SAMPLES).read_bytes())
    data[1024 + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(CorpusError, match=r"a\.tar is damaged \(bad checksum\)"):
        texts(webdataset(tmp_path / "a.tar"))
    data = bytearray(shard(tmp_path / "b.tar.gz", SAMPLES, "w:gz").read_bytes())
    data[-6] ^= 1
    (tmp_path / "b.tar.gz").write_bytes(data)
    with pytest.raises(CorpusError, match=r"b\.tar\.gz is damaged"):
        texts(webdataset(tmp_path / "b.tar.gz"))


def test_without_zstandard_the_error_says_what_to_install(tmp_path, monkeypatch):
    """Before the first pass."""
    (tmp_path / "a.tar.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[zstd\]"):
        webdataset(tmp_path)
