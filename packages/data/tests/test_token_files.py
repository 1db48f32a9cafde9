"""Foreign files of tokens: Megatron's indexed datasets both ways, .npy, and plain binary ones."""

import struct

import numpy as np
import pytest
from data_toys import Arrays, Bytes

from dovetail_data import CorpusError, FileTokens, MegatronTokens, Plan, build_cache, write_megatron

DOCUMENTS = [[5, 6, 7], [], [9], [65_000, 1]]


def index(lengths, bounds, code=8, width=2, version=1):
    """An index as the format's description has it."""
    offsets = (np.cumsum(lengths) - lengths) * width
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, len(lengths), len(bounds))
    return (
        head + np.array(lengths, "<i4").tobytes() + offsets.astype("<i8").tobytes() + np.array(bounds, "<i8").tobytes()
    )


@pytest.fixture
def indexed(tmp_path):
    (tmp_path / "x.idx").write_bytes(index([3, 0, 1, 2], range(5)))
    (tmp_path / "x.bin").write_bytes(np.array([t for d in DOCUMENTS for t in d], "<u2").tobytes())
    return tmp_path / "x"


def documents(source):
    every = np.arange(len(source))
    parts = np.split(source.gather(every, np.zeros_like(every), source.lengths), np.cumsum(source.lengths))[:-1]
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_an_index_by_hand(indexed, suffix):
    source = MegatronTokens(str(indexed) + suffix)
    assert documents(source) == DOCUMENTS
    assert (source.vocab_size, source.tokens, source.origin(3)) == (65_001, 6, "x.bin:3")
    with pytest.raises(ValueError, match="0 bytes of text"):
        source.bits_per_byte(1.0)


def test_documents_of_several_sequences(tmp_path):
    """Bounds say which sequences are one document."""
    (tmp_path / "x.idx").write_bytes(index([3, 0, 1, 2], [0, 2, 4], code=4, width=4))
    (tmp_path / "x.bin").write_bytes(np.arange(6, dtype="<i4").tobytes())
    assert documents(MegatronTokens(tmp_path / "x")) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_there_and_back(tmp_path, vocab_size):
    """What is written is what is read, from a cache of ours, with the same batches."""
    texts = ["hello", "", "wörld" * 50, "x"]
    cache = build_cache(texts, Bytes(vocab_size=vocab_size), tmp_path / "cache", shard_tokens=20)
    write_megatron(cache, tmp_path / "out.v1")
    again = MegatronTokens(tmp_path / "out.v1", vocab_size=vocab_size)
    assert documents(again) == documents(cache)
    width = 2 if vocab_size == 300 else 4
    assert (tmp_path / "out.v1.bin").stat().st_size == width * cache.tokens
    options = {"seq_len": 8, "batch": 2, "seed": 0}
    np.testing.assert_equal(Plan(again, **options).at(3), Plan(cache, **options).at(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out.v1.bin", "out.v1.idx"]


def damaged(path):
    """Ways to damage an indexed dataset, each with what must be said."""
    whole = path.with_suffix(".idx").read_bytes()
    tokens = path.with_suffix(".bin")
    yield lambda: path.with_suffix(".idx").write_bytes(whole[:-1]), "x.idx has .* bytes"
    yield lambda: path.with_suffix(".idx").write_bytes(b"MMAP" + whole[4:]), "x.idx begins with"
    yield lambda: path.with_suffix(".idx").write_bytes(index([3, 0, 1, 2], range(5), version=2)), "x.idx has version 2"
    yield lambda: path.with_suffix(".idx").write_bytes(index([3, 0, 1, 2], range(5), code=7)), "dtype code 7"
    yield lambda: path.with_suffix(".idx").write_bytes(index([3, 0, 1, 2], range(5), width=4)), "offsets"
    yield lambda: path.with_suffix(".idx").write_bytes(index([3, 0, 1, 2], [0, 2, 1, 3, 4])), "do not cover"
    yield lambda: tokens.write_bytes(tokens.read_bytes()[:-2]), "x.bin has 10 bytes; x.idx says 12"
    yield lambda: path.with_suffix(".idx").unlink(), "x.idx"


@pytest.mark.parametrize("number", range(8))
def test_damaged_files_are_named(indexed, number):
    damage, message = list(damaged(indexed))[number]
    damage()
    with pytest.raises((CorpusError, FileNotFoundError), match=message):
        MegatronTokens(indexed)


def test_a_changed_token_is_other_data(indexed):
    """A flipped bit cannot be told from another corpus; a saved state is refused."""
    before = MegatronTokens(indexed)
    state = iter(Plan(before, seq_len=2, batch=1, seed=0).loader()).get_state()
    data = bytearray(indexed.with_suffix(".bin").read_bytes())
    data[3] ^= 1
    indexed.with_suffix(".bin").write_bytes(data)
    after = MegatronTokens(indexed)
    assert after.fingerprint != before.fingerprint
    with pytest.raises(ValueError, match="data is"):
        iter(Plan(after, seq_len=2, batch=1, seed=0).loader()).set_state(state)


def test_ids_outside_the_vocabulary(indexed):
    with pytest.raises(CorpusError, match=r"x.bin holds the id 65000 at token 4; expected 0 to 9"):
        MegatronTokens(indexed, vocab_size=10)


def test_plain_files(tmp_path):
    """Documents end with the end token; each file begins one; dtypes and paths are no part of the fingerprint."""
    np.save(tmp_path / "a.npy", np.array([1, 2, 0, 3, 0], np.int64))
    np.array([4, 5], "<u4").tofile(tmp_path / "b.bin")
    source = FileTokens([tmp_path / "a.npy", tmp_path / "b.bin"], eos_id=0, dtype="<u4")
    assert documents(source) == [[1, 2, 0], [3, 0], [4, 5]]
    assert [source.origin(i) for i in range(3)] == ["a.npy:0", "a.npy:1", "b.bin:0"]
    assert source.vocab_size == 6
    np.array([1, 2, 0, 3, 0, 4, 5], "<u2").tofile(tmp_path / "c.bin")
    one = FileTokens(tmp_path / "c.bin", eos_id=0)
    assert documents(one) == [[1, 2, 0], [3, 0], [4, 5]]
    assert one.fingerprint == source.fingerprint
    assert documents(FileTokens(tmp_path / "c.bin")) == [[1, 2, 0, 3, 0, 4, 5]]
    (tmp_path / "d.bin").write_bytes(b"x" * 1024 + (tmp_path / "c.bin").read_bytes())
    assert FileTokens(tmp_path / "d.bin", eos_id=0, header=1024).fingerprint == one.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"not numpy", "a.npy cannot be read"),
        ("a.npy", np.zeros((2, 2), np.int32), r"a.npy holds int32 of shape \(2, 2\)"),
        ("a.npy", np.zeros(3), "a.npy holds float64"),
        ("a.npy", np.array([1, -1]), "a.npy holds the id -1 at token 1"),
        ("a.bin", b"abc", "a.bin has 3 bytes .* multiple of 2"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(CorpusError, match=message):
        FileTokens(tmp_path / name)


def test_a_truncated_array_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(1000))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-8])
    with pytest.raises(CorpusError, match=r"a.npy cannot be read"):
        FileTokens(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="no paths"):
        FileTokens([])


def test_blocks_do_not_show(tmp_path, monkeypatch):
    """Files longer than what is read or written at a time."""
    from dovetail_data import megatron, scanning, token_files

    for module in (megatron, scanning, token_files):
        monkeypatch.setattr(module, "_BLOCK", 7)
    source = Arrays([5, 30, 0, 2, 11])
    write_megatron(source, tmp_path / "x")
    assert documents(MegatronTokens(tmp_path / "x")) == documents(source)
    np.save(tmp_path / "a.npy", np.array([1, 2, 0] * 9))
    assert documents(FileTokens(tmp_path / "a.npy", eos_id=0)) == [[1, 2, 0]] * 9
