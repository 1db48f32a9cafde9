"""Where the weights of a model are in one of transformers: what `peft` calls target modules and target parameters.

The rules of a family's weight map only move numbers about. So the place of a weight in one of theirs is found by
sending numbers through them that tell where they come from: a row and a column are enough.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from dovetail_models.family import Family
from dovetail_models.layers import without_values
from dovetail_models.lora import division
from dovetail_models.state import variables
from dovetail_weights import Group, Lazy

__all__ = ["Part", "Target", "find_targets"]

EXPERT = re.compile(r"(?P<block>.+)\.experts\.0\.\w+\.weight")
RENAMED = {"block_sparse_moe": "mlp"}
"""Modules whose names in checkpoints are not those of transformers 5."""

FUSED = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", 0)}
"""The parameter of all experts that holds each of our weights where checkpoints have them one by one, and its place."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One of our weights in one of theirs.

    Attributes:
        address: of ours.
        inputs: lengths of the axes that a product sums over.
        outputs: lengths of those of its result.
        columns: their input of each of ours.
        rows: their output of each of ours.
    """

    address: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    columns: Int[np.ndarray, " columns"]
    rows: Int[np.ndarray, " rows"]


@dataclasses.dataclass(frozen=True)
class Target:
    """A module or parameter of theirs, and which of our weights it holds.

    Attributes:
        module: its name.
        parameter: of the module, where that is no linear layer or embedding.
        table: it is an embedding.
        swapped: it is stored ``[inputs, outputs]``.
        experts: how many it has; 0 where it is none of experts.
        columns: its inputs.
        rows: its outputs.
        parts: ours.
    """

    module: str
    parameter: str | None
    table: bool
    swapped: bool
    experts: int
    columns: int
    rows: int
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """The module's, or the parameter's with its module's."""
        return self.module if self.parameter is None else f"{self.module}.{self.parameter}"


@dataclasses.dataclass(frozen=True)
class _Leaf:
    address: str
    variable: Any
    leading: int
    inputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.variable.get_value().shape)

    @property
    def flat(self) -> tuple[int, ...]:
        """Numbers of groups, inputs and outputs."""
        end = self.leading + self.inputs
        parts = self.shape[: self.leading], self.shape[self.leading : end], self.shape[end:]
        return tuple(math.prod(part) for part in parts)

    def codes(self, start: int) -> Lazy:
        """Return an array of this shape whose elements are their own places, counted from a number."""
        strides = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]

        def read(index: Any) -> Any:
            places = [
                stride * np.arange(s.start, s.stop, dtype=np.int64) for stride, s in zip(strides, index, strict=True)
            ]
            return sum(np.ix_(*places)) + start

        return Lazy(self.shape, np.dtype(np.int64), read)


def find_targets(family: Family, config: Any) -> tuple[list[Target], list[str]]:
    """Return all targets of a configuration's model, and the names of all its tensors in a checkpoint.

    What has no place of its own in a module of theirs (a convolution, say) has no target.
    """
    module = without_values(family.model, config)
    known = variables(module)
    groups = family.weight_map(config).groups(list(known))
    found: dict[str, Target] = {}
    for group in groups:
        leaves = _leaves(known, group)
        for target in [] if leaves is None else _targets(group, leaves):
            have = found.get(target.name)
            found[target.name] = target if have is None else _joined(have, target)
    return list(found.values()), [name for group in groups for name in group.names]


def _leaves(known: Mapping[str, Any], group: Group) -> list[_Leaf] | None:
    try:
        return [_Leaf(address, known[address], *division(address, known[address])) for address in group.addresses]
    except ValueError:
        return None


def _targets(group: Group, leaves: Sequence[_Leaf]) -> list[Target]:
    name, *others = group.names
    expert = EXPERT.fullmatch(name)
    if expert and len(leaves) == 1 and leaves[0].leading == 1:
        block = ".".join(RENAMED.get(part, part) for part in expert["block"].split("."))
        parameter, _ = FUSED[leaves[0].address.rpartition("/")[2]]
        return _probed(group, leaves, f"{block}.experts", parameter, single=True)
    if others:
        return []
    block, _, last = name.rpartition(".")
    router = leaves[0].variable.get_metadata()["axes"][-1] == "experts"
    block = ".".join(RENAMED.get(part, part) for part in block.split(".")) if router else block
    return _probed(group, leaves, block, last if router or last != "weight" else None)


def _probed(
    group: Group, leaves: Sequence[_Leaf], module: str, parameter: str | None, *, single: bool = False
) -> list[Target]:
    """Return the target of a group, if it is a matrix, or one for each expert, whose rows are our outputs."""
    starts = np.cumsum([0, *(math.prod(leaf.shape) for leaf in leaves)])
    codes = [leaf.codes(int(start)) for leaf, start in zip(leaves, starts, strict=False)]
    theirs = group.to_theirs(codes)[0]
    experts = leaves[0].shape[0] if leaves[0].leading else 0
    wide = 3 if experts and not single else 2
    if len(theirs.shape) != wide or any(leaf.leading != leaves[0].leading for leaf in leaves):
        return []
    probe = _Probe(theirs, leaves, starts, wide == 3)
    swapped = not probe.same_output(axis=1)
    if swapped and not probe.same_output(axis=0):
        return []
    columns, rows = theirs.shape[-2:] if swapped else theirs.shape[:-3:-1]
    parts = tuple(probe.part(i, swapped) for i in range(len(leaves)))
    table = bool(leaves[0].variable.get_metadata()["table"])
    return [Target(module, parameter, table, swapped, experts, columns, rows, parts)]


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Reads lines of a tensor of theirs whose elements tell where they come from."""

    theirs: Lazy
    leaves: Sequence[_Leaf]
    starts: Int[np.ndarray, " leaves"]
    has_experts: bool

    def line(self, axis: int, at: int = 0) -> tuple[Any, Any, Any]:
        """Return the leaf, input and output of each element along an axis of the (first) matrix."""
        other = slice(at, at + 1), slice(None)
        index = other if axis == 1 else other[::-1]
        codes = self.theirs.read((slice(0, 1), *index) if self.has_experts else index).reshape(-1)
        which = np.searchsorted(self.starts, codes, side="right") - 1
        inputs, outputs = np.zeros_like(codes), np.zeros_like(codes)
        for i, leaf in enumerate(self.leaves):
            mine = which == i
            _, inputs[mine], outputs[mine] = np.unravel_index(codes[mine] - self.starts[i], leaf.flat)
        return which, inputs, outputs

    def same_output(self, axis: int) -> bool:
        """Whether elements along an axis are inputs of one output."""
        which, _, outputs = self.line(axis)
        return bool((which == which[0]).all() and (outputs == outputs[0]).all())

    def part(self, i: int, swapped: bool) -> Part:
        """Return the place of a leaf."""
        leaf, (along_outputs, along_inputs) = self.leaves[i], (1, 0) if swapped else (0, 1)
        which, _, outputs = self.line(along_outputs)
        mine = np.flatnonzero(which == i)
        _, inputs, _ = self.line(along_inputs, int(mine[0]))
        end = leaf.leading + leaf.inputs
        return Part(
            leaf.address,
            leaf.shape[leaf.leading : end],
            leaf.shape[end:],
            columns=np.argsort(inputs),
            rows=mine[np.argsort(outputs[mine])],
        )


def _joined(one: Target, other: Target) -> Target:
    """Return the target of gates and of the other factors of experts, which follow them."""
    first, second = sorted((one, other), key=lambda t: FUSED[t.parts[0].address.rpartition("/")[2]][1])
    moved = (dataclasses.replace(part, rows=part.rows + first.rows) for part in second.parts)
    return dataclasses.replace(first, rows=first.rows + second.rows, parts=(*first.parts, *moved))
