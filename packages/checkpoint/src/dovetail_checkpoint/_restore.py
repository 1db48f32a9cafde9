"""Choosing a good step and reading it."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import xxhash

from dovetail_checkpoint import _files, _orbax, _tree
from dovetail_checkpoint.errors import CorruptCheckpointError
from dovetail_checkpoint.manifest import DATA, Manifest, verify

__all__ = ["choose", "load"]


def choose(root: Path, step: int | None, level: Literal["full", "sizes", "off"], on_corrupt: str, below: float) -> int:
    """Return the step to restore: the one asked for, or the newest one smaller than `below` that passes.

    Raises:
        FileNotFoundError: there is no such step.
        CorruptCheckpointError: it is bad, or all are.
    """
    available = [number for number in _files.steps(root) if number < below]
    if step is not None and step not in available:
        raise FileNotFoundError(f"there is no step {step} in {root}; the last ones are {available[-5:]}")
    if not available:
        raise FileNotFoundError(f"there is no committed step in {root}")
    newest: CorruptCheckpointError | None = None
    for number in [step] if step is not None else reversed(available):
        try:
            verify(root / str(number), level)
        except (CorruptCheckpointError, FileNotFoundError) as error:
            if not (root / str(number)).exists():
                continue  # the saving process has just deleted it
            if on_corrupt == "error" or not isinstance(error, CorruptCheckpointError):
                raise
            _files.set_aside(root, number, error)
            newest = newest or error
        else:
            return number
    if newest is None:
        raise FileNotFoundError(f"all steps of {root} were deleted while they were verified")
    raise CorruptCheckpointError(f"no step of {root} is good; the newest: {newest}")


def load(directory: Path, like: Any, with_data: bool) -> tuple[Any, Manifest, Any]:
    """Read a step's state as `like` says, its manifest, and its data position if asked for."""
    manifest = Manifest.read(directory)
    position = _position(directory, manifest) if with_data else None
    if like is None:
        targets = _tree.numpy_targets(manifest.leaves)
        return _tree.nested(_read(directory, targets)), manifest, position
    targets = _tree.match(manifest.step, manifest.leaves, like)
    wanted, treedef = _tree.flatten(like)
    leaves = _read(directory, targets)
    return jax.tree_util.tree_unflatten(treedef, [leaves[address] for address in wanted]), manifest, position


def _read(directory: Path, targets: dict[str, _tree.Target]) -> dict[str, Any]:
    wanted = {
        address: _orbax.target(target.stored_shape, jnp.dtype(target.leaf.stored), target.load_sharding)
        for address, target in targets.items()
        if target.leaf.stored
    }
    arrays = _orbax.unnest(_orbax.load(directory, _orbax.nest(wanted)), list(wanted)) if wanted else {}
    return {address: _tree.decode(target, arrays.pop(address, None)) for address, target in targets.items()}


def _position(directory: Path, manifest: Manifest) -> Any:
    if manifest.data is None:
        raise ValueError(f"step {manifest.step} was saved without a loader; restore it without `data`")
    try:
        text = (directory / DATA).read_bytes()
    except FileNotFoundError:
        raise CorruptCheckpointError(f"step {manifest.step} is corrupt: {directory / DATA} is missing") from None
    if xxhash.xxh3_128_hexdigest(text) != manifest.data:
        raise CorruptCheckpointError(f"step {manifest.step} is corrupt: {os.fspath(directory / DATA)} has changed")
    return json.loads(text)
