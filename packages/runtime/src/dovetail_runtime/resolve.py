"""From logical axis names to a partition spec: conflicts are errors, indivisible dimensions fall back and say so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jax.sharding import Mesh, PartitionSpec

from dovetail_runtime.rules import AxisRules, MeshAxes, as_axis_rules

__all__ = ["Resolution", "ShardingError", "explain", "resolve"]


class ShardingError(ValueError):
    """Logical names do not fit an array or its rules."""


@dataclass(frozen=True)
class Resolution:
    """A partition spec and, in words, every place where it is less than what the rules ask for."""

    spec: PartitionSpec
    notes: tuple[str, ...] = ()


def resolve(
    names: Sequence[str | None],
    shape: Sequence[int],
    rules: Mapping[str, MeshAxes],
    mesh: Mesh,
    *,
    conflict: Literal["error", "first"] = "error",
) -> PartitionSpec:
    """Return the partition spec of an array with the given logical names, one per dimension.

    1. Each name is looked up in `rules`; None is replicated. Mesh axes that `mesh` does not have are ignored.
    2. A mesh axis that two dimensions ask for is a conflict: an error, or with ``conflict="first"`` the name that
       stands earlier in `rules` keeps it (of two equal names, the leftmost dimension). This is decided before sizes
       matter, so that rules that are wrong on eight devices are refused on one.
    3. A dimension that the product of its axes does not divide uses the longest prefix of them that does, possibly
       none (replicated). `explain` returns the reasons; `table` prints them.

    Raises:
        ShardingError: a name has no rule, the number of names is not the rank, or a conflict.

    >>> import jax
    >>> from dovetail_runtime import mesh
    >>> resolve(("embed", "mlp"), (8, 6), {"embed": "fsdp", "mlp": "tensor"}, mesh(fsdp=2, tensor=4))
    P('fsdp',)
    """
    return explain(names, shape, rules, mesh, conflict=conflict).spec


def explain(
    names: Sequence[str | None],
    shape: Sequence[int],
    rules: Mapping[str, MeshAxes],
    mesh: Mesh,
    *,
    conflict: Literal["error", "first"] = "error",
) -> Resolution:
    """Do what `resolve` does and also return the fallbacks (see there for the rules and the errors)."""
    names = tuple(names)
    if len(names) != len(shape):
        raise ShardingError(
            f"{len(names)} logical names {names} for an array of rank {len(shape)} and shape {tuple(shape)}; "
            "give one name (or None) per dimension"
        )
    axis_rules = as_axis_rules(rules)
    wanted = [_lookup(name, axis_rules, mesh) for name in names]
    notes: list[str] = []
    granted = _without_conflicts(names, wanted, axis_rules, notes, conflict)
    parts = [_dividing(name, size, axes, mesh, notes) for name, size, axes in zip(names, shape, granted, strict=True)]
    while parts and not parts[-1]:
        parts.pop()
    return Resolution(PartitionSpec(*(_entry(axes) for axes in parts)), tuple(notes))


def _lookup(name: str | None, rules: AxisRules, mesh: Mesh) -> tuple[str, ...]:
    if name is None:
        return ()
    try:
        return tuple(axis for axis in rules[name] if axis in mesh.shape)
    except KeyError as error:
        raise ShardingError(error.args[0]) from None


def _without_conflicts(
    names: tuple[str | None, ...],
    wanted: list[tuple[str, ...]],
    rules: AxisRules,
    notes: list[str],
    conflict: str,
) -> list[tuple[str, ...]]:
    rank = {name: position for position, name in enumerate(rules)}
    granted = list(wanted)
    owner: dict[str, int] = {}
    for i in sorted(range(len(names)), key=lambda i: (rank.get(names[i] or "", 0), i)):
        for axis in wanted[i]:
            if axis not in owner:
                owner[axis] = i
                continue
            first, second = sorted((owner[axis], i))
            said = f"mesh axis {axis!r} is chosen for dimension {first} ({names[first]}) and {second} ({names[second]})"
            if conflict == "error":
                fix = "give one of them another rule, name it None, or use conflict='first'"
                raise ShardingError(f"{said} of an array with names {names}; {fix}")
            notes.append(f"{said}: dimension {owner[axis]} keeps it")
            granted[i] = tuple(a for a in granted[i] if a != axis)
    return granted


def _dividing(name: str | None, size: int, axes: tuple[str, ...], mesh: Mesh, notes: list[str]) -> tuple[str, ...]:
    kept = axes
    while kept and (size == 0 or size % math.prod(mesh.shape[axis] for axis in kept)):
        kept = kept[:-1]
    if kept != axes:
        asked = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
        notes.append(
            f"{name}={size} does not divide by {asked}: {'only ' + ' x '.join(kept) if kept else 'replicated'}"
        )
    return kept


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else axes
