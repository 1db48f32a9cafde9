"""The header of a safetensors file, checked against every rule of the format.

Source: the format's description in the safetensors repository. A file is eight bytes (the header's length N, little
endian), N bytes of JSON that begin with ``{`` and may end with spaces, then the tensors' bytes without holes.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from dovetail_weights.dtypes import BY_CODE, code_of
from dovetail_weights.errors import WeightsError

__all__ = ["ALIGNMENT", "MAX_HEADER", "Entry", "Header", "encode_header", "parse_header"]

MAX_HEADER = 100_000_000
"""The largest header that readers accept, in bytes."""

ALIGNMENT = 64
"""Of addresses that jax takes over on CPUs, in bytes."""

_MAX_RANK = 64


class Entry(NamedTuple):
    """A tensor's place: dtype, shape, and its bytes ``[start, stop)`` in the data part."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """What a header says: tensors by name, free text by key, and where the data part begins in the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def parse_header(head: bytes, size: int, where: str) -> Header:
    """Return the header of a file.

    Args:
        head: the file's beginning, the header included.
        size: the file's size in bytes.
        where: the file's name, for messages.

    Raises:
        WeightsError: a rule of the format is broken, or the file is shorter or longer than its header says.
    """
    if size < 8:
        raise WeightsError(f"{where} has {size} bytes; a safetensors file has at least 8: it is truncated")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or length > size - 8:
        raise WeightsError(
            f"{where} claims a header of {length} bytes; at most {min(MAX_HEADER, size - 8)} fit: "
            "it is truncated, or no safetensors file"
        )
    value = _json(head[8 : 8 + length], where)
    metadata = _metadata(value.pop("__metadata__", {}), where)
    entries = {name: _entry(item, f"{where}: tensor {name!r}") for name, item in value.items()}
    _contiguous(entries, size - 8 - length, where)
    return Header(entries, metadata, 8 + length)


def _json(text: bytes, where: str) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise WeightsError(f"{where}: the header begins with {text[:1]!r}; expected '{{'")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            keys = [key for key, _ in pairs]
            raise WeightsError(f"{where}: the header names {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return value

    try:
        return json.loads(text.decode(), object_pairs_hook=unique)
    except WeightsError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: the header is not valid JSON: {error}") from error


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise WeightsError(f"{where}: __metadata__ is {value!r:.60}; expected an object of strings")
    return value


def _entry(item: Any, where: str) -> Entry:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{where} is {item!r:.80}; expected exactly dtype, shape and data_offsets")
    code, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(code, str) or code not in BY_CODE:
        raise WeightsError(f"{where} has dtype {code!r:.40}; this reader knows {', '.join(BY_CODE)}")
    if not _naturals(shape) or len(shape) > _MAX_RANK:
        raise WeightsError(f"{where} has shape {shape!r:.80}; expected at most {_MAX_RANK} non-negative integers")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{where} has data_offsets {offsets!r:.80}; expected [begin, end] with begin <= end")
    dtype, (start, stop) = BY_CODE[code], offsets
    if math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
        raise WeightsError(f"{where} has shape {shape!r:.80}, which is too large")
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise WeightsError(
            f"{where}: shape {shape} of {code} takes {math.prod(shape) * dtype.itemsize} bytes, "
            f"but its data_offsets {offsets} hold {stop - start}"
        )
    return Entry(dtype, tuple(shape), start, stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _contiguous(entries: Mapping[str, Entry], size: int, where: str) -> None:
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            kind = "overlaps the one before it" if entry.start < at else "leaves a hole before it"
            raise WeightsError(f"{where}: tensor {name!r} begins at byte {entry.start}, not {at}, and {kind}")
        if entry.stop > size:
            raise WeightsError(
                f"{where}: tensor {name!r} ends at byte {entry.stop}, but there are {size}: the file is truncated"
            )
        at = entry.stop
    if at != size:
        raise WeightsError(f"{where} has {size - at} bytes behind its last tensor; it is damaged")


def encode_header(
    specs: Mapping[str, tuple[tuple[int, ...], Any]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """Return a file's bytes up to the data, a multiple of `ALIGNMENT`, and the order in which the tensors follow.

    Those whose size is a multiple of it come first, then larger element types: every tensor is aligned to its own
    element size, and most of a model to what jax needs to use them where they stand.
    """

    def rank(name: str) -> tuple[bool, int]:
        shape, dtype = specs[name]
        itemsize = np.dtype(dtype).itemsize
        return math.prod(shape) * itemsize % ALIGNMENT != 0, -itemsize

    order = sorted(specs, key=rank)
    items = dict(_offsets(order, specs))
    text = json.dumps(({"__metadata__": dict(metadata)} if metadata else {}) | items, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise WeightsError(f"the header has {len(text)} bytes; readers accept {MAX_HEADER}: use smaller shards")
    return len(text).to_bytes(8, "little") + text, order


def _offsets(
    order: list[str], specs: Mapping[str, tuple[tuple[int, ...], Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    at = 0
    for name in order:
        shape, dtype = specs[name]
        begin, at = at, at + math.prod(shape) * np.dtype(dtype).itemsize
        yield name, {"dtype": code_of(dtype), "shape": list(shape), "data_offsets": [begin, at]}
