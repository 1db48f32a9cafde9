import json
import os
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import xxhash

from dovetail_weights import Lazy, WeightsError, digest, open_directory, write_directory


def test_every_dtype_both_ways(tmp_path, every_dtype, same_bits):
    """A dtype, a scalar or an empty tensor is written so that the safetensors library reads something else."""
    write_directory(tmp_path / "d", every_dtype, metadata={"format": "pt", "a": "ü"})
    ours = open_directory(tmp_path / "d")
    assert ours.metadata == {"format": "pt", "a": "ü"}
    content = (tmp_path / "d" / "model.safetensors").read_bytes()
    theirs = dict(safetensors.deserialize(content))
    assert set(theirs) == set(ours) == set(every_dtype)
    for name, value in every_dtype.items():
        same_bits(ours.read(name), value)
        assert theirs[name]["dtype"] == name.split(".")[0]
        assert tuple(theirs[name]["shape"]) == value.shape
        assert bytes(theirs[name]["data"]) == value.tobytes()


def test_shards_and_index(tmp_path):
    """Shards exceed the limit, or names and index are not Hugging Face's."""
    tensors = {f"t{i}": np.full(i, i, np.float32) for i in range(1, 7)}
    path = write_directory(tmp_path / "d", tensors, max_shard_bytes=30, extra_files={"config.json": "{}", "b": b"\0"})
    assert sorted(p.name for p in path.iterdir()) == [
        "b",
        "config.json",
        *[f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)],
        "model.safetensors.index.json",
    ]
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(range(1, 7))
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(path / shard)[name], tensors[name])
    assert (path / "config.json").read_text() == "{}"


def test_files_of_another_name(tmp_path):
    """Files that are no model's, such as an adapter's, have the names of one, or take a name that is no name."""
    tensors = {f"t{i}": np.full(9, i, np.float32) for i in range(2)}
    one = write_directory(tmp_path / "one", tensors, stem="adapter_model", extra_files={"model.safetensors.md": ""})
    assert sorted(p.name for p in one.iterdir()) == ["adapter_model.safetensors", "model.safetensors.md"]
    two = write_directory(tmp_path / "two", tensors, stem="adapter_model", max_shard_bytes=40)
    index = json.loads((two / "adapter_model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f"adapter_model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    for stem, extra in (("a/b", "c"), ("", "c"), ("a", "a.safetensors.index.json"), ("a", "a.safetensors")):
        with pytest.raises(WeightsError, match=r"stem=|extra file"):
            write_directory(tmp_path / "three", tensors, stem=stem, extra_files={extra: ""})


def test_data_is_aligned_and_byte_order_is_little(tmp_path):
    """A tensor stands at an address that its element size does not divide, or keeps big-endian bytes."""
    tensors = {"a": np.zeros(3, np.uint8), "b": np.arange(3, dtype=">f8"), "c": np.ones(5, ml_dtypes.bfloat16)}
    directory = open_directory(write_directory(tmp_path / "d", tensors))
    assert directory.read("b").tolist() == [0, 1, 2]
    for name in tensors:
        value = directory.read(name)
        assert value.ctypes.data % value.dtype.itemsize == 0


def test_not_contiguous_arrays(tmp_path):
    """A transposed or strided array is written in its memory order."""
    value = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    directory = open_directory(write_directory(tmp_path / "d", {"a": value}))
    np.testing.assert_array_equal(directory.read("a"), value)


def test_existing_target(tmp_path):
    """Weights are replaced without being asked, or an old directory's files stay in the new one."""
    path = write_directory(tmp_path / "d", {"a": np.zeros(1)}, extra_files={"old": "x"})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_directory(path, {"b": np.zeros(1)})
    assert set(open_directory(path)) == {"a"}
    write_directory(path, {"b": np.zeros(1)}, overwrite=True)
    assert set(open_directory(path)) == {"b"}
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert not (path / "old").exists()


def boom(_):
    raise OSError(28, "No space left on device")


def test_an_error_leaves_nothing(tmp_path):
    """After a full disk something remains, or the directory that was to be replaced is gone."""
    broken = {"a": np.zeros(3), "b": Lazy((3,), np.dtype(np.float32), boom)}
    with pytest.raises(OSError, match="No space"):
        write_directory(tmp_path / "d", broken)
    assert list(tmp_path.iterdir()) == []
    write_directory(tmp_path / "d", {"a": np.zeros(1)})
    with pytest.raises(OSError, match="No space"):
        write_directory(tmp_path / "d", broken, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert set(open_directory(tmp_path / "d")) == {"a"}


def test_a_failed_rename_brings_the_old_directory_back(tmp_path, monkeypatch):
    """The old weights are moved away and the new ones do not arrive."""
    path = write_directory(tmp_path / "d", {"a": np.zeros(1)})
    rename = type(path).rename

    def fail(self, target):
        if ".partial-" in self.name:
            boom(None)
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail)
    with pytest.raises(OSError, match="No space"):
        write_directory(path, {"b": np.zeros(1)}, overwrite=True)
    assert set(open_directory(path)) == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


FULL = """
import resource, signal, sys, numpy as np
from dovetail_weights import write_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_directory(sys.argv[1], {"a": np.zeros(1 << 19)})
except OSError as error:
    print("refused", error.errno)
"""


def test_a_real_write_error(tmp_path):
    """The operating system refuses to write more (here a file size limit): half a directory remains."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "d")], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("refused")
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time, numpy as np
from dovetail_weights import Lazy, write_directory
def read(index):
    print("reading", flush=True)
    time.sleep(60)
write_directory(sys.argv[1], {"a": np.zeros(9), "b": Lazy((9,), np.dtype(float), read)}, overwrite=True)
"""


@pytest.mark.parametrize("existed", [False, True])
def test_killed_while_writing(tmp_path, existed):
    """After kill -9 there is a directory under the target's name that is not complete."""
    if existed:
        write_directory(tmp_path / "d", {"old": np.zeros(1)})
    child = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "d")], stdout=subprocess.PIPE)
    try:
        assert child.stdout.readline() == b"reading\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait(30)
        child.stdout.close()
    time.sleep(0.05)
    if existed:
        assert set(open_directory(tmp_path / "d")) == {"old"}
    else:
        assert not (tmp_path / "d").exists()
    for partial in tmp_path.glob(".d.partial-*"):
        with pytest.raises(WeightsError):
            open_directory(partial)


def test_lazy_arrays_are_read_once_one_by_one(tmp_path):
    """All tensors are brought into memory, or one is read twice."""
    log = []

    def lazy(i):
        return Lazy((2,), np.dtype(np.int32), lambda index: log.append(i) or np.full(2, i, np.int32)[index])

    write_directory(tmp_path / "d", {str(i): lazy(i) for i in range(4)}, max_shard_bytes=16)
    assert log == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("tensors", "options", "error", "match"),
    [
        ({}, {}, WeightsError, "no tensors"),
        ({"": np.zeros(1)}, {}, WeightsError, "tensor name"),
        ({"__metadata__": np.zeros(1)}, {}, WeightsError, "__metadata__"),
        ({"a": np.zeros(1)}, {"max_shard_bytes": 0}, WeightsError, "max_shard_bytes is 0"),
        ({"a": np.array(["x"])}, {}, WeightsError, "cannot be stored"),
        ({"a": np.zeros(1, np.complex128)}, {}, WeightsError, "cannot be stored"),
        ({"a": np.array([object()])}, {}, WeightsError, "cannot be stored"),
        ({"a": np.zeros(1, ml_dtypes.int4)}, {}, WeightsError, "cannot be stored"),
        ({"a": np.zeros(1)}, {"extra_files": {"a/b": ""}}, WeightsError, "plain file name"),
        ({"a": np.zeros(1)}, {"extra_files": {"model.safetensors": ""}}, WeightsError, "weights' own"),
        ({"a": np.zeros(1)}, {"extra_files": {"x": 3}}, TypeError, "str or bytes"),
        ({"a": Lazy((2,), np.dtype(float), lambda i: np.zeros(3))}, {}, WeightsError, "announced as float64"),
        ({"a": Lazy((2,), np.dtype(float), lambda i: np.zeros(2, "f4"))}, {}, WeightsError, "reads as float32"),
    ],
)
def test_bad_input(tmp_path, tensors, options, error, match):
    """Bad input writes a file that cannot be read, or leaves something behind."""
    with pytest.raises(error, match=match):
        write_directory(tmp_path / "d", tensors, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_the_parent_should_be(tmp_path):
    """Writing below a file seems to work."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_directory(tmp_path / "file" / "d", {"a": np.zeros(1)})


def test_digest(tmp_path):
    """A digest misses a changed byte, or differs from the library's on the whole file."""
    path = write_directory(tmp_path / "d", {"a": np.arange(10)}, extra_files={"c": "x"})
    before = digest(path)
    assert before["c"] == xxhash.xxh3_128(b"x").hexdigest()
    assert digest(path / "c") == {"c": before["c"]}
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert {k for k, v in digest(path).items() if v != before[k]} == {"model.safetensors"}
    with pytest.raises(FileNotFoundError):
        digest(path / "none")
