"""Between a directory of safetensors and a model's tree, one tensor at a time."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from dovetail_protocols import paths
from dovetail_weights import dtypes
from dovetail_weights.copying import copied
from dovetail_weights.errors import WeightsError, listing, nearest
from dovetail_weights.lazy import Lazy
from dovetail_weights.mapping import check_alignment, in_place
from dovetail_weights.maps import Group, WeightMap
from dovetail_weights.reading import Directory, open_directory
from dovetail_weights.writing import write_directory

__all__ = ["check", "load", "save"]

Source: TypeAlias = str | pathlib.Path | Mapping[str, Lazy]


def check(directory: Source, weight_map: WeightMap, like: Any, *, ignore: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the tensors that `load` would read, from the headers alone; arguments are those of `load`.

    Raises:
        WeightsError: as `load` would for missing, unexpected or misshapen tensors.
        FileNotFoundError: there is no such directory or shard.
    """
    source, leaves = _opened(directory), paths.flatten(like)
    groups = weight_map.groups(leaves)
    _check(source, groups, {address: _target(address, leaf, None) for address, leaf in leaves.items()}, ignore)
    return tuple(name for group in groups for name in group.names)


def load(
    directory: Source,
    weight_map: WeightMap,
    like: Any,
    *,
    shardings: Any = None,
    dtype: Any = None,
    ignore: Sequence[str] = (),
    mapped: bool = False,
) -> Any:
    """Return a tree like `like` with the values of a checkpoint.

    All names and shapes are checked before the first tensor is read. Tensors are read one after the other, each
    device's part alone where the leaf is sharded over several, and cast to the leaf's dtype (floats to floats only).

    Args:
        directory: a directory or file, what `open_directory` returned, or any mapping from names to `Lazy` arrays.
        weight_map: rules between the tree's addresses and the checkpoint's names.
        like: a pytree of arrays or ``jax.ShapeDtypeStruct``.
        shardings: one sharding, or a pytree of them like `like`; by default those of `like`'s leaves.
        dtype: a floating-point dtype for every floating-point leaf, in place of `like`'s.
        ignore: globs over checkpoint names that no leaf needs (``"*.rotary_emb.inv_freq"``).
        mapped: on one CPU, leaves that keep dtype and values of a tensor, in whatever order of axes, are the file's own
            pages: nothing is read before it is used, and processes share it. The other leaves are copied. The files
            must stay as they are while the leaves live (one that `save` replaces does). Transposed leaves have the
            file's order of axes as their layout, for which programs are compiled.

    Raises:
        WeightsError: tensors are missing or unexpected, shapes or kinds of dtype differ, or the map does not fit; the
            message lists all of them. With `mapped`: the files do not suit, or a leaf is not for a CPU alone.
        FileNotFoundError: there is no such directory or shard.
    """
    source = _opened(directory)
    leaves = paths.flatten(like)
    targets = {address: _target(address, leaf, dtype) for address, leaf in leaves.items()}
    narrow = [a for a, t in targets.items() if jax.dtypes.canonicalize_dtype(t.dtype) != t.dtype]
    if narrow:
        raise WeightsError(
            f"these leaves have 64 bits, which jax narrows; set jax_enable_x64 or pass dtype:{listing(narrow)}"
        )
    groups = weight_map.groups(leaves)
    _check(source, groups, targets, ignore)
    places = _places(leaves, like, shardings)
    if mapped:
        if not isinstance(source, Directory):
            raise WeightsError("mapped=True with a mapping; expected a directory, whose files hold the tensors")
        check_alignment(source)
        _check_places(places)
    loaded: dict[str, jax.Array] = {}
    before: list[jax.Array] = []
    for group in groups:
        parts = group.to_ours([source[name] for name in group.names])
        arrays = [
            _place(part, targets[address].dtype, places[address], mapped)
            for part, address in zip(parts, group.addresses, strict=True)
        ]
        jax.block_until_ready(before)  # then its memory on the host is free
        loaded |= zip(group.addresses, arrays, strict=True)
        before = arrays
    jax.block_until_ready(before)
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[address] for address in leaves])


def save(
    directory: str | pathlib.Path, weight_map: WeightMap, tree: Any, *, dtype: Any = None, **options: Any
) -> pathlib.Path:
    """Write a tree under a checkpoint's names and return the directory; see `write_directory` for `options`.

    Args:
        directory: the directory to make.
        weight_map: rules between the tree's addresses and the checkpoint's names.
        tree: a pytree of arrays, all of whose parts are on this process's devices, or of `Lazy` ones.
        dtype: a floating-point dtype for every floating-point leaf, in place of its own.
        options: `max_shard_bytes`, `metadata`, `extra_files`, `overwrite` and `stem`.

    Raises:
        WeightsError: the map does not fit, or a leaf cannot be stored.
        FileExistsError: the directory exists and `overwrite` is not set.
    """
    leaves = paths.flatten(tree)
    lazies = {address: _lazy_leaf(address, leaf, dtype) for address, leaf in leaves.items()}
    tensors: dict[str, Lazy] = {}
    for group in weight_map.groups(leaves):
        made = group.to_theirs([lazies[address] for address in group.addresses])
        tensors |= zip(group.names, made, strict=True)
    return write_directory(directory, tensors, **options)


def _opened(directory: Source) -> Mapping[str, Lazy]:
    return directory if isinstance(directory, Mapping) else open_directory(directory)


def _target(address: str, leaf: Any, dtype: Any) -> Lazy:
    """Return shape and dtype that a leaf is to have."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise WeightsError(f"leaf {address} is {leaf!r:.60}; expected an array or a jax.ShapeDtypeStruct")
    dtypes.code_of(leaf.dtype)
    if dtype is not None and not dtypes.is_float(dtype):
        raise WeightsError(f"dtype is {dtype}; expected a floating-point dtype")
    target = np.dtype(dtype if dtype is not None and dtypes.is_float(leaf.dtype) else leaf.dtype)
    return Lazy(tuple(leaf.shape), target, lambda _: np.empty(0))


def _check(
    source: Mapping[str, Lazy], groups: Sequence[Group], targets: Mapping[str, Lazy], ignore: Sequence[str]
) -> None:
    errors: list[str] = []
    used = {name for group in groups for name in group.names}
    unexpected = [name for name in source if name not in used and not paths.matches(name, ignore)]
    for group in groups:
        expected = group.to_theirs([targets[address] for address in group.addresses])
        for name, want in zip(group.names, expected, strict=True):
            if name not in source:
                errors.append(f"{name}: missing; the nearest are: {nearest(name, unexpected or list(source))}")
            elif source[name].shape != want.shape:
                errors.append(f"{name}: has shape {source[name].shape}, {group.addresses[0]} needs {want.shape}")
            elif not dtypes.same_kind(source[name].dtype, want.dtype):
                errors.append(f"{name}: is {source[name].dtype}, {group.addresses[0]} needs {want.dtype}")
    errors += [f"{name}: unexpected; add it to ignore, or a rule and a leaf for it" for name in unexpected]
    if errors:
        raise WeightsError(f"the checkpoint does not fit the tree:{listing(errors)}")


def _places(leaves: Mapping[str, Any], like: Any, shardings: Any) -> dict[str, Any]:
    if shardings is None:
        return {address: getattr(leaf, "sharding", None) for address, leaf in leaves.items()}
    if isinstance(shardings, jax.sharding.Sharding):
        return dict.fromkeys(leaves, shardings)
    given = jax.tree.leaves(shardings, is_leaf=lambda x: x is None or isinstance(x, jax.sharding.Sharding))
    if len(given) != len(leaves):
        raise WeightsError(
            f"shardings has {len(given)} leaves, the tree {len(leaves)} ({jax.tree.structure(like)}); "
            "expected one sharding, or one for each leaf"
        )
    return dict(zip(leaves, given, strict=True))


def _check_places(places: Mapping[str, Any]) -> None:
    devices = {device for place in places.values() if place is not None for device in place.device_set}
    if None in places.values():
        devices.add(jax.devices()[0])
    if devices != {jax.devices("cpu")[0]}:
        found = ", ".join(sorted(map(str, devices)))
        raise WeightsError(f"mapped=True with leaves on {found}; expected {jax.devices('cpu')[0]} alone")


def _place(part: Lazy, dtype: np.dtype[Any], sharding: Any, mapped: bool) -> jax.Array:
    """Bring a lazy array to the devices. CPUs take over the copy that is made here; others widen 16 bits themselves."""
    found = in_place(part.read()) if mapped and part.dtype == dtype else None
    if found is not None:
        return found if sharding is None else jax.device_put(found, sharding)
    on_cpu = (jax.default_backend() if sharding is None else next(iter(sharding.device_set)).platform) == "cpu"
    kind = part.dtype if not on_cpu and _widens(part.dtype, dtype) else dtype

    def values(index: Any) -> np.ndarray[Any, Any]:
        value = part.read(index)
        own = value.flags.writeable or not on_cpu  # or it is a view of the file itself, which must not outlive it
        return value if value.dtype == kind and value.flags.c_contiguous and own else copied(value, kind)

    if sharding is None or len(sharding.device_set) == 1:
        array = jax.device_put(values(()), sharding)
    else:
        array = jax.make_array_from_callback(part.shape, sharding, values)
    return array if array.dtype == dtype else array.astype(dtype)


def _widens(dtype: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Tell whether numbers of 16 bits become wider, so that they travel narrow."""
    return dtype.itemsize == 2 < target.itemsize and dtypes.is_float(dtype) and dtypes.is_float(target)


def _lazy_leaf(address: str, leaf: Any, dtype: Any) -> Lazy:
    target = _target(address, leaf, dtype)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise WeightsError(f"leaf {address} is {leaf}, which has no values; expected an array")
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise WeightsError(f"leaf {address} is spread over other processes; gather it before saving")
    return Lazy(target.shape, target.dtype, lambda index: _on_host(leaf, index).astype(target.dtype, copy=False))


def _on_host(leaf: Any, index: Any) -> np.ndarray[Any, Any]:
    """Return a part of a leaf; jax keeps no copy of it on the host."""
    if isinstance(leaf, Lazy):
        return leaf.read(index)
    on_cpu = isinstance(leaf, jax.Array) and {d.platform for d in leaf.devices()} == {"cpu"}
    if not isinstance(leaf, jax.Array) or (on_cpu and len(leaf.devices()) == 1):
        return np.asarray(leaf)[index]
    return np.asarray(jax.lax.slice(leaf, [s.start for s in index], [s.stop for s in index]))
