"""JSON lines compressed with zstd."""

import json
import sys

import pytest
from data_toys import ids, texts

from dovetail_data import CorpusError, jsonl, open_corpus

zstandard = pytest.importorskip("zstandard")

VALUES = [{"text": f"text {i} {i * i} é"} for i in range(3000)]


def packed(values, **options):
    data = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    return zstandard.ZstdCompressor(**options).compress(data)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(packed(VALUES, write_checksum=True))
    return tmp_path / "a.jsonl.zst"


def test_zstd_and_plain_lines_agree(path):
    """Compression must not change the corpus."""
    plain = path.with_name("a.jsonl")
    plain.write_bytes(zstandard.decompress(path.read_bytes()))
    assert jsonl(path).fingerprint == jsonl(plain).fingerprint
    assert ids(jsonl(path))[:2] == ["a.jsonl.zst:1", "a.jsonl.zst:2"]
    assert texts(open_corpus(path)) == [value["text"] for value in VALUES]


def test_frames_are_read_one_after_the_other(path):
    """Parallel compressors write many frames, and skippable ones between them."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    path.write_bytes(packed(VALUES[:2]) + skippable + packed(VALUES[2:]) + packed([]))
    assert texts(jsonl(path)) == [value["text"] for value in VALUES]


def test_long_windows_are_read(path):
    """`zstd --long=31` writes large dumps."""
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = b"".join(json.dumps(value).encode() + b"\n" for value in VALUES)
    path.write_bytes(writer.compress(data) + writer.flush())
    assert len(texts(jsonl(path))) == len(VALUES)


@pytest.mark.parametrize("damage", ["empty", "cut", "frame", "flip", "plain"])
def test_damaged_files_are_named(path, damage):
    """A cut download must not pass for a shorter corpus; zstandard's own reader ends without an error."""
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 16
    path.write_bytes({"empty": b"", "cut": data[:-20], "frame": data * 2, "flip": flipped, "plain": b"{}"}[damage])
    if damage == "frame":
        path.write_bytes(path.read_bytes()[: len(data) + 10])
    with pytest.raises(CorpusError, match=r"a\.jsonl\.zst is damaged"):
        texts(jsonl(path))


def test_without_zstandard_the_error_says_what_to_install(path, monkeypatch):
    """The base install has no zstandard, and finds that out before the first pass."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match=r"dovetail-data\[zstd\]"):
        jsonl(path)
