"""From the rows that one process has loaded to global arrays on the mesh."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_protocols import paths
from dovetail_runtime.resolve import ShardingError
from dovetail_runtime.rules import Rules

__all__ = ["batch_sharding", "put_batch"]


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
    """Return the sharding of a batch's leading axis: the activation rule of the name ``batch``.

    Raises:
        ShardingError: the rules have no ``batch``.
    """
    try:
        axes = tuple(axis for axis in rules.of("activations")["batch"] if axis in mesh.shape)
    except KeyError as error:
        raise ShardingError(f"the activation rules place no batch: {error.args[0]}") from None
    return NamedSharding(mesh, PartitionSpec(axes if len(axes) != 1 else axes[0]) if axes else PartitionSpec())


def put_batch(batch: Any, mesh: Mesh, rules: Rules) -> Any:
    """Return `batch` as global arrays, the leading axis split by `batch_sharding`.

    Args:
        batch: a pytree of NumPy arrays with the rows of this process: with several processes the global batch is
            their concatenation in the order of the mesh. 64-bit integers become 32-bit ones where jax's 64-bit mode
            is off, if every value fits.
        mesh: from `mesh`.
        rules: see `batch_sharding`.

    Raises:
        ValueError: leaves disagree on the number of rows, or the rows do not divide over this process's devices.
        TypeError: a leaf has no leading axis, a dtype that jax lacks, or one that jax would silently round.

    >>> import numpy as np
    >>> from dovetail_runtime import DATA, mesh
    >>> put_batch({"tokens": np.ones((8, 4), np.int32)}, mesh(data=8), DATA)["tokens"].sharding.spec
    P('data',)
    """
    sharding = batch_sharding(mesh, rules)
    flat = {address: _checked(address, leaf) for address, leaf in paths.flatten(batch).items()}
    _check_rows({address: leaf.shape[0] for address, leaf in flat.items()}, _local_shards(sharding), mesh)

    def put(key_path: Any, _: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, flat[paths.path_of(key_path)])

    return jax.tree_util.tree_map_with_path(put, batch)


def _checked(address: str, leaf: Any) -> np.ndarray:
    array = np.array(leaf)  # a copy: on CPU jax shares the memory of NumPy arrays, and a loader may reuse it
    if array.ndim == 0:
        raise TypeError(f"batch leaf {address!r} has no leading axis: its shape is (); give every leaf a batch axis")
    if array.dtype.kind in "USOMm" or array.dtype.names:
        raise TypeError(f"batch leaf {address!r} has dtype {array.dtype}, which jax lacks; drop or encode it")
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    if array.dtype.kind in "iu" and np.array_equal(array, array.astype(dtype)):
        return array.astype(dtype)
    fix = f"convert it to {dtype} where it is made, or enable jax's 64-bit mode"
    raise TypeError(f"batch leaf {address!r} is {array.dtype} and jax would change its values to {dtype}; {fix}")


def _local_shards(sharding: NamedSharding) -> int:
    shards = max(1, sharding.mesh.size)
    rows = sharding.addressable_devices_indices_map((shards,)).values()
    return len({str(index) for index in rows})


def _check_rows(rows: dict[str, int], shards: int, mesh: Mesh) -> None:
    if len(set(rows.values())) > 1:
        raise ValueError(f"the leaves of the batch disagree on the number of rows: {rows}")
    count = next(iter(rows.values()), 0)
    if count % shards:
        sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
        raise ValueError(f"{count} rows do not divide over {shards} local batch shards of the mesh ({sizes})")
