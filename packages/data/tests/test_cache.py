"""Opening a cache: every damage is found and named; the documented layout is what is read."""

import json

import numpy as np
import pytest
import xxhash

from dovetail_data import CacheError, TokenCache
from dovetail_data.layout import digest_of

KINDS = ("tokens", "lengths", "bytes", "ids.json")


def test_an_intact_cache_opens_at_every_level(cache):
    """A false alarm costs trust."""
    for verify in ("off", "sizes", "full"):
        assert TokenCache.open(cache.directory, verify=verify).fingerprint == cache.fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "flipped"])
def test_damage_is_found_and_the_file_is_named(cache, kind, damage):
    """Silent damage trains on noise. A flipped bit needs verify='full'; everything else is found by default."""
    path = cache.directory / f"shard-00001.{kind}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "longer": data + b"\0", "flipped": data}[damage])
    with pytest.raises(CacheError, match=f"shard-00001.{kind}"):
        TokenCache.open(cache.directory, verify="full" if damage == "flipped" else "sizes")


def test_lengths_that_do_not_add_up_are_found_by_default(cache):
    """A flipped bit in a length shifts every later document; the sum costs nothing to check."""
    path = cache.directory / "shard-00000.lengths"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"shard-00000\.lengths is damaged"):
        TokenCache.open(cache.directory)


def test_every_damaged_file_is_listed(cache):
    """One file per attempt would make a restore an evening's work."""
    for name in ("shard-00000.tokens", "shard-00002.bytes"):
        (cache.directory / name).unlink()
    with pytest.raises(CacheError, match=r"shard-00000\.tokens is missing; .*shard-00002\.bytes is missing"):
        TokenCache.open(cache.directory)


def test_no_bit_of_the_manifest_can_flip_unnoticed(cache, soak):
    """The manifest decides what the rest means."""
    path = cache.directory / "cache.json"
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    survivors = 0
    for position in generator.choice(len(whole) * 8, 2000 if soak else 200, replace=False):
        data = bytearray(whole)
        data[position // 8] ^= 1 << (position % 8)
        path.write_bytes(data)
        try:
            opened = TokenCache.open(cache.directory, verify="off")
        except CacheError:
            continue
        survivors += 1  # a space of the indentation became another character that JSON ignores
        assert opened.manifest == cache.manifest
    assert survivors < 20


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "damaged"), (b"[]", "expected a JSON object"), (b"{}", "format=None"), (b"\xff", "damaged")],
)
def test_a_wrong_manifest_is_named(cache, content, message):
    """Empty after a crash of the disk, or some other tool's file."""
    (cache.directory / "cache.json").write_bytes(content)
    with pytest.raises(CacheError, match=message):
        TokenCache.open(cache.directory)


def test_a_newer_version_is_refused_by_number(cache):
    """Reading it as if it were this version could go wrong silently."""
    path = cache.directory / "cache.json"
    value = json.loads(path.read_text()) | {"version": 2}
    path.write_text(json.dumps(value))
    with pytest.raises(CacheError, match="version=2; this release reads"):
        TokenCache.open(cache.directory)


def test_a_directory_without_a_cache_is_told(tmp_path, untyped):
    """The commonest mistake is the wrong directory."""
    with pytest.raises(CacheError, match="is no token cache"):
        TokenCache.open(tmp_path)
    with pytest.raises(CacheError, match="is no token cache"):
        TokenCache.open(tmp_path / "missing")


def test_an_unknown_level_is_refused(cache, untyped):
    """verify=True would otherwise mean nothing at all."""
    with pytest.raises(ValueError, match=r"verify='fully'; expected"):
        TokenCache.open(cache.directory, verify="fully")


def test_the_documented_layout_opens(tmp_path):
    """A cache written by hand from the README: this is the format that later releases must go on reading."""
    contents = {
        "tokens": np.array([5, 6, 9, 9, 7, 9], "<u2").tobytes(),
        "lengths": np.array([3, 1, 2], "<i8").tobytes(),
        "bytes": np.array([4, 0, 1], "<i8").tobytes(),
        "ids.json": b'["a", "b", "c"]',
    }
    files = {}
    for kind, data in contents.items():
        name = f"shard-00000.{kind}"
        (tmp_path / name).write_bytes(data)
        files[kind] = [name, len(data), xxhash.xxh3_128_hexdigest(data)]
    shard = {"documents": 3, "tokens": 6, "bytes": 5, "text": "0" * 32, "files": files}
    value = {"format": "dovetail-token-cache", "version": 1, "vocab_size": 10, "eos_id": 9, "dtype": "<u2"}
    value |= {"tokenizer": "t", "corpus": "0" * 32, "shard_tokens": 100, "content": "1" * 32, "shards": [shard]}
    (tmp_path / "cache.json").write_text(json.dumps(value | {"digest": digest_of(value)}))
    cache = TokenCache.open(tmp_path, verify="full")
    assert cache.gather(np.array([2, 0]), np.array([0, 1]), np.array([2, 3])).tolist() == [7, 9, 6, 9]
    assert (len(cache), cache.tokens, cache.bytes, cache.eos_id) == (3, 6, 5, 9)
    assert cache.origin(2) == "c"


def test_moving_a_cache_keeps_everything(cache):
    """Paths are part of nothing."""
    moved = cache.directory.rename(cache.directory.parent / "moved")
    opened = TokenCache.open(moved, verify="full")
    assert opened.fingerprint == cache.fingerprint
    assert opened.origin(39) == "39"


def test_origins_are_right_across_shards(cache):
    """An off-by-one at a shard's edge would blame the wrong file."""
    assert [cache.origin(i) for i in range(40)] == [str(i) for i in range(40)]
    assert len(cache.manifest.shards) > 3
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match=f"document {wrong} of 40"):
            cache.origin(wrong)
