"""Pytrees to stored arrays and back: every leaf has an address, a description and at most one stored array.

Typed random keys are stored as their data, Python numbers as 0-d arrays, dtypes that the array store does not know as
bytes; None and zero-size leaves are in the description alone.
"""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from dovetail_checkpoint.errors import TreeMismatchError
from dovetail_checkpoint.manifest import Leaf
from dovetail_protocols import paths

__all__ = ["Target", "decode", "encode", "flatten", "match", "nested", "numpy_targets"]

_PYTHON = {"bool": np.bool_, "int": np.int64, "float": np.float64, "complex": np.complex128}
_CONVERT = {"bool": bool, "int": int, "float": float, "complex": complex}
# What zarr3 holds as it is; the rest of the dtypes of at most one byte goes as uint8.
_DIRECT = frozenset(
    [
        *("bool", "int2", "int4", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float4_e2m1fn", "float8_e3m4"),
        *("float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"),
        "float8_e8m0fnu",
    ]
)
_AS_BYTES = frozenset(["uint2", "uint4", "float8_e4m3", "float6_e2m3fn", "float6_e3m2fn"])
_LISTED = 8


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Return ``{address: leaf}`` with None as a leaf, and the treedef.

    Raises:
        ValueError: two leaves share an address.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is None)
    flat: dict[str, Any] = {}
    for key_path, leaf in leaves:
        address = paths.path_of(key_path)
        if address in flat:
            raise ValueError(f"two leaves share the address {address!r}; use keys of one type in a mapping")
        flat[address] = leaf
    return flat, treedef


def encode(tree: Any) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """Describe a tree and return the arrays to store, both by address.

    Raises:
        TypeError: a leaf cannot be stored.
        ValueError: a leaf was donated or deleted, or a Python integer has more than 64 bits.
    """
    leaves: dict[str, Leaf] = {}
    arrays: dict[str, Any] = {}
    for address, value in flatten(tree)[0].items():
        leaf, array = _encode(address, value)
        leaves[address] = leaf
        if leaf.stored:
            arrays[address] = array
    return leaves, arrays


def _encode(address: str, value: Any) -> tuple[Leaf, Any]:
    if value is None:
        return Leaf("none", "", ()), None
    if type(value).__name__ in _PYTHON and isinstance(value, bool | int | float | complex):
        return _encode_number(address, value)
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"the leaf {address!r} is a traced value; save outside of jit")
    if isinstance(value, jax.Array):
        return _encode_jax(address, value)
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return _described("numpy", address, array, ""), _to_stored(array)
    raise TypeError(f"the leaf {address!r} is a {type(value).__name__}; expected an array, a number or None")


def _encode_number(address: str, value: Any) -> tuple[Leaf, Any]:
    kind = type(value).__name__
    try:
        array = np.asarray(value, _PYTHON[kind])
    except OverflowError:
        raise ValueError(f"the leaf {address!r} is {value}; a Python integer must fit 64 bits") from None
    return Leaf(kind, array.dtype.name, (), stored=array.dtype.name), array


def _encode_jax(address: str, value: Any) -> tuple[Leaf, Any]:
    if value.is_deleted():
        raise ValueError(f"the leaf {address!r} was donated or deleted; save the array that took its place")
    sharding = str(value.sharding)
    local = jax.process_count() > 1 and value.is_fully_addressable
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        impl, data = str(jax.random.key_impl(value)), jax.random.key_data(value)
        leaf = Leaf("key", impl, value.shape, sharding, stored=data.dtype.name if data.size else "")
        return leaf, np.asarray(data) if local else data
    leaf = _described("array", address, value, sharding)
    # Each process has its own copy of a process-local array; that of process 0 is stored.
    return leaf, _to_stored(np.asarray(value) if local else value) if leaf.stored else None


def _described(kind: str, address: str, array: Any, sharding: str) -> Leaf:
    name = array.dtype.name
    if name not in _DIRECT | _AS_BYTES:
        raise TypeError(f"the leaf {address!r} has dtype {array.dtype}; expected a bool, integer, float or complex one")
    stored = "" if not array.size else "uint8" if name in _AS_BYTES else name
    return Leaf(kind, name, tuple(array.shape), sharding, stored)


def _to_stored(array: Any) -> Any:
    if array.dtype.name not in _AS_BYTES:
        return array
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array).view(np.uint8).reshape(array.shape)
    return (
        array.astype(jnp.uint8)
        if array.dtype.name.startswith("uint")
        else jax.lax.bitcast_convert_type(array, jnp.uint8)
    )


def _from_stored(array: Any, dtype: np.dtype[Any]) -> Any:
    if array.dtype == dtype:
        return array
    if isinstance(array, np.ndarray):
        return array.view(dtype)
    return array.astype(dtype) if dtype.name.startswith("uint") else jax.lax.bitcast_convert_type(array, dtype)


@dataclasses.dataclass(frozen=True)
class Target:
    """What one stored leaf becomes.

    Attributes:
        leaf: its description.
        numpy: a NumPy array, a Python number or None; otherwise a jax array (or typed keys).
        load_sharding: the layout in which the array store gives it; None is a NumPy array.
        put: how a NumPy array then goes to devices: a layout, or None for the default device, uncommitted.
        scalar: a NumPy scalar rather than a 0-d array.
    """

    leaf: Leaf
    numpy: bool
    load_sharding: Any = None
    put: Any = None
    scalar: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored array."""
        return self.leaf.shape + (_key_shape(self.leaf.dtype) if self.leaf.kind == "key" else ())


def numpy_targets(leaves: Mapping[str, Leaf]) -> dict[str, Target]:
    """Return the targets of a restore without `like`: NumPy arrays; typed keys stay typed keys."""
    return {address: Target(leaf, numpy=leaf.kind != "key") for address, leaf in leaves.items()}


def match(step: int, leaves: Mapping[str, Leaf], like: Any) -> dict[str, Target]:
    """Pair the saved leaves with those of `like` by address.

    Raises:
        TreeMismatchError: a leaf is missing or left over, or its kind, shape or dtype differs.
        TypeError: a leaf of `like` has no shape and dtype.
    """
    wanted = flatten(like)[0]
    absent = [address for address in wanted if address not in leaves]
    left = [address for address in leaves if address not in wanted]
    problems = [
        f"{address or '(root)'} ({_describe(address, wanted[address])}) is not in the step"
        + _nearest(address, left, leaves)
        for address in absent
    ]
    problems += [
        f"{address or '(root)'} ({leaves[address]}) is in the step but not in `like`"
        + _nearest(address, absent, wanted)
        for address in left
    ]
    targets: dict[str, Target] = {}
    for address, value in wanted.items():
        if address in leaves:
            described = _describe(address, value)
            if not _agree(leaves[address], described):
                problems.append(f"{address or '(root)'}: saved {leaves[address]}, `like` has {described}")
            else:
                problems += _indivisible(address, leaves[address], value)
            targets[address] = _target(leaves[address], value)
    if problems:
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise TreeMismatchError(f"step {step} differs from `like`:\n  " + "\n  ".join(problems[:_LISTED]) + more)
    return targets


def _indivisible(address: str, leaf: Leaf, value: Any) -> list[str]:
    sharding = getattr(value, "sharding", None)
    try:
        if sharding is not None:
            sharding.shard_shape(leaf.shape)
    except ValueError:
        return [f"{address or '(root)'}: {leaf} cannot be divided as `like` asks, {sharding}"]
    return []


def _nearest(address: str, unmatched: Collection[str], others: Collection[str]) -> str:
    """Name similar addresses, those that found no partner themselves first."""
    near = difflib.get_close_matches(address, list(unmatched), n=2, cutoff=0.5)
    near = near or difflib.get_close_matches(address, list(others), n=2, cutoff=0.5)
    return f"; nearest: {', '.join(near)}" if near else ""


def _agree(saved: Leaf, wanted: Leaf) -> bool:
    arrays = ("array", "numpy")
    same_kind = saved.kind == wanted.kind or (saved.kind in arrays and wanted.kind in arrays)
    return same_kind and saved.dtype == wanted.dtype and saved.shape == wanted.shape


def _describe(address: str, value: Any) -> Leaf:
    kind = type(value).__name__
    if value is None:
        return Leaf("none", "", ())
    if kind in _PYTHON and isinstance(value, bool | int | float | complex):
        return Leaf(kind, np.dtype(_PYTHON[kind]).name, ())
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise TypeError(
            f"the leaf {address!r} of `like` is a {kind}; expected an array, a ShapeDtypeStruct or a number"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return Leaf("key", _key_impl(value.dtype), tuple(value.shape))
    return Leaf("array", np.dtype(value.dtype).name, tuple(value.shape))


def _target(leaf: Leaf, value: Any) -> Target:
    if value is None or isinstance(value, bool | int | float | complex | np.ndarray | np.generic):
        return Target(leaf, numpy=True, scalar=isinstance(value, np.generic))
    sharding = getattr(value, "sharding", None)
    if not getattr(value, "committed", True):
        sharding = None  # what was free to move to any device stays so
    if sharding is None or (jax.process_count() > 1 and sharding.is_fully_addressable):
        return Target(leaf, numpy=False, put=sharding)
    return Target(leaf, numpy=False, load_sharding=sharding)


def decode(target: Target, array: Any) -> Any:
    """Turn a stored array (None where nothing is stored) into the leaf that the target asks for."""
    leaf = target.leaf
    if leaf.kind == "none":
        return None
    if leaf.kind in _CONVERT:
        return _CONVERT[leaf.kind](np.asarray(array))
    dtype = np.dtype(np.uint32) if leaf.kind == "key" else jnp.dtype(leaf.dtype)
    array = np.zeros(target.stored_shape, dtype) if array is None else _from_stored(array, dtype)
    if target.numpy:
        return array[()] if target.scalar else array
    if isinstance(array, np.ndarray):
        array = _put(array, target)
    return jax.random.wrap_key_data(array, impl=leaf.dtype) if leaf.kind == "key" else array


def _put(array: np.ndarray[Any, Any], target: Target) -> Any:
    sharding = target.load_sharding if target.load_sharding is not None else target.put
    placed = jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)
    if placed.dtype != array.dtype:
        raise TreeMismatchError(
            f"a saved {target.leaf} cannot be a jax array while 64-bit types are off; "
            "set jax_enable_x64 or put a NumPy array into `like`"
        )
    return placed


def nested(leaves: Mapping[str, Any]) -> Any:
    """Turn ``{address: leaf}`` into nested dicts, keys unescaped; a lone leaf is returned as it is."""
    if list(leaves) == [""]:
        return leaves[""]
    tree: dict[str, Any] = {}
    for address, leaf in leaves.items():
        *parents, last = (part.replace("~1", "/").replace("~0", "~") for part in address.split("/"))
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _key_impl(dtype: Any) -> str:
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        if jax.eval_shape(lambda name=name: jax.random.key(0, impl=name)).dtype == dtype:
            return name
    return str(dtype)


def _key_shape(impl: str) -> tuple[int, ...]:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl))).shape
