"""The only module that calls Orbax (the V1 API of orbax-checkpoint 0.12.8 and later).

Trees given to Orbax are nested dicts with string keys and array leaves: what plain Orbax then reads is the same.
Orbax is called from the thread of the caller; only `Pending.wait` may run in another one.
"""

import asyncio
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dovetail_checkpoint.manifest import STATE

__all__ = ["EMPTY", "Pending", "barrier", "load", "nest", "save_async", "target", "unnest"]

# Orbax refuses a tree without arrays; no escaped key contains "~" before another character than 0, 1 or 2.
EMPTY = "~empty"


class Pending:
    """A save that Orbax writes in the background."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def wait(self) -> None:
        """Return when Orbax has finalised its directory, on all processes.

        Raises:
            OSError: the writing failed; the message is the beginning of the array store's, which runs to pages.
        """
        try:
            self._response.result()
        except Exception as error:
            reason = str(error).partition("[tensorstore_spec")[0][:300].strip()
            raise OSError(f"the arrays could not be written: {reason or type(error).__name__}") from error


def nest(arrays: dict[str, Any]) -> dict[str, Any]:
    """Turn ``{address: array}`` into the nested dict that Orbax stores.

    Orbax joins keys with dots into the name of an array, so that ``{"a.b": x}`` and ``{"a": {"b": x}}`` would collide:
    a dot inside a key is written ``~2``.
    """
    tree: dict[str, Any] = {} if arrays else {EMPTY: np.zeros(1, np.uint8)}
    for address, array in arrays.items():
        *parents, last = address.replace(".", "~2").split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = array
    return tree


def unnest(tree: dict[str, Any], addresses: list[str]) -> dict[str, Any]:
    """Take the leaves at the addresses out of a tree that `nest` made."""
    found: dict[str, Any] = {}
    for address in addresses:
        node: Any = tree
        for part in address.replace(".", "~2").split("/"):
            node = node[part]
        found[address] = node
    return found


def save_async(directory: Path, tree: dict[str, Any], *, compress: bool) -> Pending:
    """Begin to write a tree into a new directory; the values are taken before this returns."""
    context = ocp.Context()
    context.array.saving.use_compression = compress
    with context:
        return Pending(ocp.save_async(str(directory), tree, checkpointable_name=STATE))


def load(directory: Path, targets: dict[str, Any]) -> dict[str, Any]:
    """Read a tree as the targets say: NumPy arrays, or jax arrays with a sharding."""
    with ocp.Context():
        return ocp.load(str(directory), targets, checkpointable_name=STATE)


def target(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None) -> Any:
    """Return what `load` must be given for one array; without a sharding it becomes a NumPy array."""
    if sharding is None:
        return np.broadcast_to(np.zeros((), dtype), shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def barrier(name: str, timeout_s: int = 1200) -> None:
    """Wait for all processes through the coordination service, which a background thread may do; alone, do nothing."""
    if jax.process_count() > 1:
        asyncio.run(ocp.multihost.sync_global_processes(name, operation_id="dovetail", timeout=timeout_s))
