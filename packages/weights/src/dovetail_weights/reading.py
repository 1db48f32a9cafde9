"""Reading safetensors: one file, or a Hugging Face directory of them."""

import json
import mmap
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dovetail_weights.errors import WeightsError, listing, nearest
from dovetail_weights.header import MAX_HEADER, parse_header
from dovetail_weights.lazy import Lazy

__all__ = ["INDEX", "SINGLE", "Directory", "SafetensorsFile", "open_directory"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFile(Mapping[str, Lazy]):
    """A safetensors file, memory-mapped: a mapping from tensor names to `Lazy` arrays.

    Opening reads and checks the header alone. What is read later is a view of the file: copy it if the file may
    change. A map stays open as long as one of its views lives.

    Attributes:
        path: the file.
        metadata: its free text.
        data_start: the byte where the tensors begin.

    Raises:
        WeightsError: the file breaks a rule of the format.
        OSError: it cannot be opened.

    >>> import numpy as np, tempfile
    >>> from dovetail_weights import write_directory
    >>> path = tempfile.mkdtemp() + "/weights"
    >>> _ = write_directory(path, {"a": np.arange(6).reshape(2, 3)})
    >>> SafetensorsFile(path + "/model.safetensors").read("a", (slice(1, 2), slice(0, 2)))
    array([[3, 4]])
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        self.path = pathlib.Path(path)
        with self.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            head += file.read(min(int.from_bytes(head, "little"), MAX_HEADER))
            header = parse_header(head, size, str(self.path))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.metadata = header.metadata
        self._entries = header.entries
        self.data_start = header.data_start

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Lazy:
        if name not in self._entries:
            raise KeyError(f"{self.path} has no tensor {name!r}; the nearest are: {nearest(name, self._entries)}")
        entry = self._entries[name]
        return Lazy(entry.shape, entry.dtype, lambda index: self._view(name)[index])

    def read(self, name: str, index: Any = ()) -> np.ndarray[Any, Any]:
        """Return a tensor, or the part of it at a tuple of slices, as a read-only view of the file.

        Raises:
            KeyError: there is no such tensor; the message lists the nearest names.
            ValueError: the index is no tuple of slices of step 1.
            WeightsError: the bytes are no values of the dtype (a bool that is neither 0 nor 1).
        """
        return self[name].read(index)

    def _view(self, name: str) -> np.ndarray[Any, Any]:
        entry = self._entries[name]
        if entry.start == entry.stop:
            return np.zeros(entry.shape, entry.dtype)
        raw = np.frombuffer(self._map, np.uint8, entry.stop - entry.start, self.data_start + entry.start)
        if entry.dtype == np.bool_ and raw.max() > 1:
            raise WeightsError(f"{self.path}: tensor {name!r} holds the byte {raw.max()}; expected 0 or 1 for BOOL")
        return raw.view(entry.dtype).reshape(entry.shape)


class Directory(Mapping[str, Lazy]):
    """The tensors of a directory's files: a mapping from tensor names to `Lazy` arrays.

    Attributes:
        files: the opened files by name.
        metadata: the free text of the first file.
    """

    def __init__(self, files: dict[str, SafetensorsFile], owners: dict[str, SafetensorsFile]) -> None:
        self.files = files
        self.metadata = next(iter(files.values())).metadata
        self._owners = owners

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __getitem__(self, name: str) -> Lazy:
        if name not in self._owners:
            raise KeyError(f"no tensor {name!r}; the nearest are: {nearest(name, self._owners)}")
        return self._owners[name][name]

    def read(self, name: str, index: Any = ()) -> np.ndarray[Any, Any]:
        """Return a tensor or a part of it; see `SafetensorsFile.read`."""
        return self[name].read(index)


def open_directory(path: str | pathlib.Path) -> Directory:
    """Open a Hugging Face directory (or one file): headers are read and checked, tensors are not.

    ``model.safetensors`` goes first, then ``model.safetensors.index.json`` with its shards, then every
    ``*.safetensors`` of the directory.

    Raises:
        FileNotFoundError: there is no such file or no safetensors in the directory, or the index names a missing shard.
        WeightsError: a file breaks a rule of the format, or index and shards disagree.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return _together([path])
    if (path / SINGLE).is_file():
        return _together([path / SINGLE])
    if (path / INDEX).is_file():
        return _indexed(path)
    found = sorted(path.glob("*.safetensors"))
    if not found:
        there = sorted(p.name for p in path.iterdir())[:10] if path.is_dir() else "no directory"
        raise FileNotFoundError(f"{path} holds no {SINGLE}, no {INDEX} and no other safetensors file (found: {there})")
    return _together(found)


def _together(paths: list[pathlib.Path]) -> Directory:
    files = {path.name: SafetensorsFile(path) for path in paths}
    owners: dict[str, SafetensorsFile] = {}
    for file in files.values():
        for name in file:
            if name in owners:
                raise WeightsError(f"tensor {name!r} is both in {owners[name].path} and in {file.path}")
            owners[name] = file
    return Directory(files, owners)


def _indexed(path: pathlib.Path) -> Directory:
    where = path / INDEX
    owner_names = _weight_map(where)
    shards = sorted(set(owner_names.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise FileNotFoundError(f"{where} names shards that are not there:{listing(missing)}")
    files = {shard: SafetensorsFile(path / shard) for shard in shards}
    lost = [f"{name} (in {shard})" for name, shard in owner_names.items() if name not in files[shard]]
    if lost:
        raise WeightsError(f"{where} names tensors that their shard does not hold:{listing(lost)}")
    more = [f"{name} (in {file.path})" for file in files.values() for name in file if name not in owner_names]
    if more:
        raise WeightsError(f"{where} leaves out tensors that its shards hold:{listing(more)}")
    return Directory(files, {name: files[shard] for name, shard in owner_names.items()})


def _weight_map(where: pathlib.Path) -> dict[str, str]:
    try:
        value = json.loads(where.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is not valid JSON: {error}") from error
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise WeightsError(f"{where} has the weight_map {names!r:.60}; expected an object of tensor and file names")
    outside = [shard for shard in names.values() if pathlib.PurePath(shard).name != shard]
    if outside:
        raise WeightsError(f"{where} names {outside[0]!r}; expected a file name in the same directory")
    return names
