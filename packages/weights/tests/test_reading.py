import copy
import json
import math

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_weights import SafetensorsFile, WeightsError, open_directory, write_directory
from dovetail_weights.header import parse_header


def raw(header, data=b"", *, pad=b""):
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + pad
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 1], 8, 12), "z": entry([0], 12, 12), "s": entry([], 12, 14, "BF16")}


def test_every_dtype_that_the_library_writes(tmp_path, every_dtype, same_bits):
    """A dtype, a scalar or an empty tensor of another program's file reads wrong."""
    plain = {name: value for name, value in every_dtype.items() if not name.startswith("F8")}
    safetensors.numpy.save_file(plain, tmp_path / "a.safetensors", metadata={"k": "v"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert set(file) == set(plain)
    assert file.metadata == {"k": "v"}
    for name, value in plain.items():
        same_bits(file.read(name), value)


@given(st.lists(st.tuples(st.integers(-4, 6), st.integers(-4, 6)), max_size=3))
@settings(max_examples=100, deadline=None)
def test_slices_equal_numpy(tmp_path_factory, bounds):
    """A part of a tensor is another part than NumPy's."""
    path = tmp_path_factory.getbasetemp() / "slices"
    value = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    if not path.exists():
        write_directory(path, {"a": value})
    index = tuple(slice(a, b) for a, b in bounds)
    np.testing.assert_array_equal(open_directory(path).read("a", index), value[index])


@pytest.mark.parametrize("index", [0, (0,), (slice(0, 2, 2),), (slice(None),) * 4, "x"])
def test_other_indices_are_refused(tmp_path, index):
    """An index that cannot be streamed is taken for another one."""
    write_directory(tmp_path / "d", {"a": np.zeros((2, 2, 2))})
    with pytest.raises(ValueError, match="slices of step 1"):
        open_directory(tmp_path / "d").read("a", index)


def test_views_are_read_only_and_outlive_the_reader(tmp_path):
    """A caller writes into the file, or reads memory that is gone."""
    write_directory(tmp_path / "d", {"a": np.arange(4)})
    value = open_directory(tmp_path / "d").read("a")
    assert value.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        value[0] = 1


def test_padding_and_a_valid_file(tmp_path):
    """A header padded with spaces, as writers do, is refused."""
    (tmp_path / "x.safetensors").write_bytes(raw(GOOD, bytes(range(14)), pad=b"   "))
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert {name: file[name].shape for name in file} == {"a": (2,), "b": (1, 1), "z": (0,), "s": ()}
    with pytest.raises(KeyError, match=r"nearest are: .*b"):
        file.read("bb")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes"),
        (b"1234567", "7 bytes"),
        ((10**9).to_bytes(8, "little") + b"{}", "claims a header"),
        ((3).to_bytes(8, "little") + b"{}", "claims a header"),
        (raw(b"[]"), "begins with"),
        (raw(b""), "begins with"),
        (raw(b" {}"), "begins with"),
        (raw(b"{\xff}"), "not valid JSON"),
        (raw(b'{"a"}'), "not valid JSON"),
        (raw(b'{"a":' * 100000), "not valid JSON"),
        (raw(b'{"a":' + b"9" * 10000 + b"}"), "not valid JSON"),
        (raw(b'{"a":1,"a":2}'), "twice"),
        (raw({"a": 1}), "expected exactly"),
        (raw({"a": entry([1], 0, 4) | {"x": 1}}, bytes(4)), "expected exactly"),
        (raw({"__metadata__": {"a": 1}}), "object of strings"),
        (raw({"a": entry([1], 0, 4, "F99")}, bytes(4)), "dtype 'F99'"),
        (raw({"a": entry([1], 0, 4, ["F32"])}, bytes(4)), "dtype"),
        (raw({"a": entry([-1], 0, 4)}, bytes(4)), "shape"),
        (raw({"a": entry([True], 0, 4)}, bytes(4)), "shape"),
        (raw({"a": entry([1.0], 0, 4)}, bytes(4)), "shape"),
        (raw({"a": entry([1] * 65, 0, 4)}, bytes(4)), "shape"),
        (raw({"a": entry([0, 2**62, 2**62], 0, 0)}), "too large"),
        (raw({"a": entry([2**64], 0, 4)}, bytes(4)), "shape"),
        (raw({"a": entry([1], 4, 0)}, bytes(4)), "begin <= end"),
        (raw({"a": entry([1], -4, 0)}, bytes(4)), "data_offsets"),
        (raw({"a": entry([2], 0, 4)}, bytes(4)), "takes 8 bytes"),
        (raw({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, bytes(6)), "overlaps"),
        (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "hole"),
        (raw({"a": entry([1], 4, 8)}, bytes(8)), "hole"),
        (raw({"a": entry([1], 0, 4)}, bytes(3)), "truncated"),
        (raw({"a": entry([1], 0, 4)}, bytes(5)), "1 bytes behind"),
    ],
)
def test_broken_files(tmp_path, content, match):
    """A file that breaks one rule of the format is accepted, or named wrongly."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as error:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(error.value)


def test_bool_bytes_are_checked(tmp_path):
    """A bool that is neither 0 nor 1 enters NumPy, where it breaks comparisons."""
    path = tmp_path / "b.safetensors"
    path.write_bytes(raw({"a": entry([2], 0, 2, "BOOL")}, b"\x01\x02"))
    with pytest.raises(WeightsError, match="byte 2"):
        SafetensorsFile(path).read("a")


VALUES = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**63, 2**64, -1, 0.5, None, True, "F32", "BF16", "BOOL", "F4", [], {}, [0, 4], [2**40]]),
    st.lists(st.integers(-1, 13), max_size=3),
)


@st.composite
def mutants(draw):
    """A small file's header with fields changed and serialised again, or bytes flipped, or cut off."""
    header = json.loads(json.dumps(GOOD))
    data = bytes(range(14))
    for _ in range(draw(st.integers(0, 2))):
        item = header[draw(st.sampled_from(sorted(header)))]
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if isinstance(item.get(key), list) and item[key] and draw(st.booleans()):
            item[key][draw(st.integers(0, len(item[key]) - 1))] = copy.deepcopy(draw(VALUES))
        else:
            item[key] = copy.deepcopy(draw(VALUES))
    content = bytearray(raw(header, data))
    kind = draw(st.sampled_from(["fields", "fields", "flip", "cut", "grow"]))
    if kind == "flip":
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del content[draw(st.integers(0, len(content))) :]
    elif kind == "grow":
        content += bytes(draw(st.integers(1, 9)))
    return bytes(content)


def _is_json(content):
    try:
        return isinstance(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]), dict)
    except ValueError:
        return False


def test_fuzz(tmp_path, soak):
    """A damaged header crashes the reader, or a tensor is read that is not in the file."""
    path, counts = tmp_path / "m.safetensors", {"json": 0, "all": 0, "valid": 0}

    @given(mutants())
    @settings(max_examples=5000 if soak else 500, deadline=None)
    def run(content):
        path.write_bytes(content)
        counts["all"] += 1
        counts["json"] += _is_json(content)
        try:
            file = SafetensorsFile(path)
            values = {name: file.read(name) for name in file}
        except WeightsError:
            return
        counts["valid"] += 1
        header = parse_header(content, len(content), "")
        assert sum(v.nbytes for v in values.values()) == len(content) - header.data_start
        assert all(v.size == math.prod(v.shape) for v in values.values())
        try:
            theirs = safetensors.deserialize(content)
        except safetensors.SafetensorError:
            pytest.fail("the safetensors library refuses what this reader accepts")
        assert {name for name, _ in theirs} == set(values)

    run()
    assert counts["json"] >= 0.3 * counts["all"]
    assert counts["valid"] > 0


@pytest.fixture
def sharded(tmp_path):
    tensors = {f"t{i}": np.full((4,), i, np.float32) for i in range(5)}
    return write_directory(tmp_path / "d", tensors, max_shard_bytes=32)


def test_sharded_directory(sharded):
    """A tensor is read from the wrong shard."""
    directory = open_directory(sharded)
    assert len(directory.files) == 3
    for i in range(5):
        assert directory.read(f"t{i}").tolist() == [i] * 4
    with pytest.raises(KeyError, match="nearest are: t1"):
        directory.read("t1x")


def rewrite(path, change):
    file = path / "model.safetensors.index.json"
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def test_index_and_shards_disagree(sharded):
    """A missing shard, a lost or an extra tensor goes unnoticed, or is not named."""
    rewrite(sharded, lambda v: v["weight_map"].update(ghost="model-00001-of-00003.safetensors"))
    with pytest.raises(WeightsError, match=r"ghost \(in model-00001"):
        open_directory(sharded)
    rewrite(sharded, lambda v: [v["weight_map"].pop(k) for k in ("ghost", "t0")])
    with pytest.raises(WeightsError, match=r"leaves out.*\n.*t0"):
        open_directory(sharded)
    rewrite(sharded, lambda v: v["weight_map"].update(t0="../x.safetensors"))
    with pytest.raises(WeightsError, match="same directory"):
        open_directory(sharded)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    rewrite(sharded, lambda v: v["weight_map"].update(t0="model-00001-of-00003.safetensors"))
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        open_directory(sharded)


def test_truncated_shard(sharded):
    """A shard that lost its end is found only when it is used."""
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=r"model-00002-of-00003.*'t3'.*truncated"):
        open_directory(sharded)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}', b"\xff"]
)
def test_malformed_index(sharded, content):
    """A damaged index crashes, or counts as an empty checkpoint."""
    (sharded / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(WeightsError, match="index"):
        open_directory(sharded)


def test_directories_without_index(tmp_path):
    """Files without an index are not found, or doubled names go unnoticed."""
    with pytest.raises(FileNotFoundError, match="no directory"):
        open_directory(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="found"):
        open_directory(tmp_path)
    safetensors.numpy.save_file({"a": np.zeros(2)}, tmp_path / "one.safetensors")
    safetensors.numpy.save_file({"b": np.zeros(2)}, tmp_path / "two.safetensors")
    assert set(open_directory(tmp_path)) == {"a", "b"}
    assert set(open_directory(tmp_path / "one.safetensors")) == {"a"}
    safetensors.numpy.save_file({"b": np.zeros(2)}, tmp_path / "three.safetensors")
    with pytest.raises(WeightsError, match=r"'b' is both"):
        open_directory(tmp_path)
