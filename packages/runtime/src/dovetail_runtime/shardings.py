"""Shardings of whole trees of parameters by their logical names, and the table that explains them."""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail_protocols import paths
from dovetail_runtime.resolve import Resolution, ShardingError, explain
from dovetail_runtime.rules import Rules

__all__ = ["Row", "Table", "shardings", "shardings_like", "table"]

_log = logging.getLogger("dovetail_runtime")

Names = tuple[str | None, ...]


@dataclass(frozen=True)
class Row:
    """One array of a `Table`: `bytes_per_device` is what each device holds; `notes` are the fallbacks."""

    address: str
    shape: tuple[int, ...]
    dtype: str
    names: Names
    spec: PartitionSpec
    bytes_per_device: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What each array's sharding is and why; ``print`` it."""

    rows: tuple[Row, ...]
    bytes_per_device: int

    def __str__(self) -> str:
        cells = [("address", "shape", "names", "spec", "bytes/device", "fallback")]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            names = ",".join(name or "-" for name in row.names)
            spec = f"P({', '.join(map(repr, row.spec))})"
            notes = "; ".join(row.notes)
            cells.append((row.address, f"{row.dtype}[{shape}]", names, spec, f"{row.bytes_per_device:,}", notes))
        cells.append(("total", "", "", "", f"{self.bytes_per_device:,}", ""))
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        )


def shardings(tree: Any, names: Any, rules: Rules, mesh: Mesh) -> Any:
    """Return a tree of `NamedSharding` shaped like `tree`, by the weight rules.

    Args:
        tree: arrays or ``jax.ShapeDtypeStruct``.
        names: the logical names of each leaf, one per dimension: a tree like `tree` with tuples as leaves (None for a
            replicated leaf of any rank), or ``{pattern: names}`` over addresses (first match wins).
        rules: their `weights` are used.
        mesh: from `mesh`.

    Raises:
        ShardingError: a leaf has no names, or names that do not fit its shape or the rules; says which leaf.
        PatternError: a pattern matches no leaf.

    >>> from dovetail_runtime import FSDP, mesh
    >>> w = jax.ShapeDtypeStruct((16, 4), "float32")
    >>> shardings({"w": w}, {"**": ("embed", "mlp")}, FSDP, mesh(fsdp=8))["w"].spec
    P('fsdp',)
    """
    found: dict[str, NamedSharding] = {}
    for address, _, _, resolution in _resolved(tree, names, rules, mesh):
        for note in resolution.notes:
            _log.warning("sharding of %s: %s", address, note)
        found[address] = NamedSharding(mesh, resolution.spec)
    return jax.tree_util.tree_map_with_path(lambda key_path, _: found[paths.path_of(key_path)], tree)


def table(tree: Any, names: Any, rules: Rules, mesh: Mesh) -> Table:
    """Return what `shardings` would choose for each leaf, with bytes per device and the reasons of fallbacks.

    >>> from dovetail_runtime import FSDP, mesh
    >>> w = jax.ShapeDtypeStruct((12, 4), "float32")
    >>> print(table({"w": w}, {"w": ("embed", "mlp")}, FSDP, mesh(fsdp=8)))
    address  shape          names      spec  bytes/device  fallback
    w        float32[12x4]  embed,mlp  P()   192           embed=12 does not divide by fsdp=8: replicated
    total                                    192
    """
    rows: list[Row] = []
    for address, leaf, chosen, resolution in _resolved(tree, names, rules, mesh):
        shard = NamedSharding(mesh, resolution.spec).shard_shape(tuple(leaf.shape))
        size = math.prod(shard) * leaf.dtype.itemsize
        rows.append(Row(address, tuple(leaf.shape), str(leaf.dtype), chosen, resolution.spec, size, resolution.notes))
    return Table(tuple(rows), sum(row.bytes_per_device for row in rows))


def shardings_like(state: Any, params: Any, param_shardings: Any) -> Any:
    """Return shardings for a tree that contains copies of the parameters, such as an optimizer's state.

    A leaf whose address ends with the address of a parameter of the same shape (``0/mu/layers/0/kernel``) gets that
    parameter's sharding; every other leaf (counters, factored moments) is replicated on the same mesh.

    Args:
        state: arrays or ``jax.ShapeDtypeStruct``, for example ``jax.eval_shape(optimizer.init, params)``.
        params: arrays or ``jax.ShapeDtypeStruct``.
        param_shardings: from `shardings`.

    Raises:
        ValueError: there is no parameter.
    """
    shapes = paths.flatten(params)
    known = paths.flatten(param_shardings)
    if not known:
        raise ValueError("the tree of parameter shardings has no leaves; pass what shardings(...) returned")
    replicated = NamedSharding(next(iter(known.values())).mesh, PartitionSpec())

    def pick(key_path: Any, leaf: Any) -> NamedSharding:
        parts = paths.path_of(key_path).split("/")
        for start in range(len(parts)):
            address = "/".join(parts[start:])
            if address in known and shapes[address].shape == leaf.shape:
                return known[address]
        return replicated

    return jax.tree_util.tree_map_with_path(pick, state)


def _is_names(node: Any) -> bool:
    return node is None or (isinstance(node, tuple) and all(n is None or isinstance(n, str) for n in node))


def _names_of(tree: Any, names: Any) -> dict[str, Names | None]:
    if isinstance(names, Mapping) and names and all(isinstance(k, str) and _is_names(v) for k, v in names.items()):
        for pattern in names:
            paths.select(tree, pattern)
        found = {address: [p for p in names if paths.matches(address, p)] for address in paths.flatten(tree)}
        return {address: names[patterns[0]] for address, patterns in found.items() if patterns}
    leaves = jax.tree_util.tree_leaves_with_path(names, is_leaf=_is_names)
    return {paths.path_of(key_path): leaf for key_path, leaf in leaves}


def _resolved(tree: Any, names: Any, rules: Rules, mesh: Mesh) -> Iterator[tuple[str, Any, Names, Resolution]]:
    known = _names_of(tree, names)
    for address, leaf in paths.flatten(tree).items():
        if address not in known:
            near = difflib.get_close_matches(address, known, n=3, cutoff=0.0)
            raise ShardingError(f"no logical names for the leaf {address!r}; names are given for {near} and others")
        given = known[address]
        if given is not None and not _is_names(given):
            raise ShardingError(f"{address}: logical names are a tuple of str and None, not {given!r}")
        chosen = (None,) * len(leaf.shape) if given is None else given
        try:
            yield address, leaf, chosen, explain(chosen, leaf.shape, rules.of("weights"), mesh, conflict=rules.conflict)
        except ShardingError as error:
            raise ShardingError(f"{address}: {error}") from None
