"""Maps between a model's addresses and a checkpoint's names, written as tables of rules."""

import dataclasses
import functools
import itertools
import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Self

from dovetail_weights.errors import WeightsError, listing, nearest
from dovetail_weights.lazy import Lazy
from dovetail_weights.transforms import Stack, Transform

__all__ = ["Group", "Rule", "StackedMap", "WeightMap"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How leaves of a model and tensors of a checkpoint become each other.

    Both sides are templates: ``{i}`` stands for one part of an address. A variable that only the names have is counted
    out with `over`: the names then are, for each template in turn, all of its numbers.

    Attributes:
        addresses: a template of leaf addresses, or several (with `Split`).
        names: a template of checkpoint names, or several (with `Concat`).
        transforms: what turns the tensors, in the order of the names, into the leaves, in the order of the addresses.
        over: variables that only the names have, outermost first, and how many numbers each has (with `Stack`).

    >>> from dovetail_weights import Stack, Transpose
    >>> Rule("layers/{i}/query/kernel", "model.layers.{i}.q_proj.weight", (Transpose(),)).names
    ('model.layers.{i}.q_proj.weight',)
    >>> Rule("experts/up", "experts.{e}.up.weight", (Transpose(), Stack(8)), over={"e": 8}).over
    {'e': 8}
    """

    addresses: str | tuple[str, ...]
    names: str | tuple[str, ...]
    transforms: Sequence[Transform] = ()
    over: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        for field in ("addresses", "names"):
            value = getattr(self, field)
            object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "transforms", tuple(self.transforms))
        known = _variables(self.addresses[0])
        if any(_variables(a) != known for a in self.addresses) or known & set(self.over):
            raise WeightsError(f"{self}: all addresses must have the same variables, and none of those in over")
        if any(_variables(name) != known | set(self.over) for name in self.names):
            raise WeightsError(f"{self}: names must have the addresses' variables, those in over, and no others")

    def match(self, address: str) -> dict[str, str] | None:
        """Return the variables' values if `address` is one of the rule's first template."""
        found = _pattern(self.addresses[0]).fullmatch(address)
        return None if found is None else found.groupdict()

    def spelled(self, pairs: Sequence[tuple[str, str]]) -> "Rule":
        """Return the rule with other names, see `WeightMap.spelled`."""
        names = self.names
        for template, other in pairs:
            found = [_pattern(template).fullmatch(name) for name in names]
            names = [name if m is None else other.format(**m.groupdict()) for name, m in zip(names, found, strict=True)]
        return dataclasses.replace(self, names=tuple(names))

    def group(self, values: Mapping[str, str]) -> "Group":
        """Return the rule with its variables filled in."""
        numbers = [dict(zip(self.over, combination, strict=True)) for combination in self._combinations()]
        names = [name.format(**values, **number) for name in self.names for number in numbers]
        return Group(tuple(a.format(**values) for a in self.addresses), tuple(names), tuple(self.transforms))

    def _combinations(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*(range(count) for count in self.over.values()))


def _variables(template: str) -> set[str]:
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


@functools.lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
    out, seen = "", set[str]()
    for text, field, _, _ in string.Formatter().parse(template):
        out += re.escape(text)
        if field is not None:
            out += f"(?P={field})" if field in seen else f"(?P<{field}>[^/]+)"
            seen.add(field)
    return re.compile(out)


@dataclasses.dataclass(frozen=True)
class Group:
    """The leaves and tensors that one rule, with its variables filled in, makes of each other."""

    addresses: tuple[str, ...]
    names: tuple[str, ...]
    transforms: tuple[Transform, ...]

    def to_ours(self, tensors: Sequence[Lazy]) -> list[Lazy]:
        """Return the leaves that the checkpoint's tensors make, in the order of `addresses`."""
        return self._run(tensors, self.transforms, self.addresses)

    def to_theirs(self, leaves: Sequence[Lazy]) -> list[Lazy]:
        """Return the checkpoint's tensors that the leaves make, in the order of `names`."""
        return self._run(leaves, [t.inverse() for t in reversed(self.transforms)], self.names)

    def _run(self, arrays: Sequence[Lazy], transforms: Sequence[Transform], wanted: Sequence[str]) -> list[Lazy]:
        current = list(arrays)
        try:
            for transform in transforms:
                current = transform.apply(current)
        except WeightsError as error:
            raise WeightsError(f"{self._what()}: {error}") from error
        if len(current) != len(wanted):
            raise WeightsError(f"{self._what()}: the transforms make {len(current)} arrays, expected {len(wanted)}")
        return current

    def _what(self) -> str:
        return f"the rule for {', '.join(self.addresses)} and {', '.join(self.names[:3])}"


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Rules, of which the first that matches a leaf's address holds.

    >>> WeightMap([Rule("embed/{x}", "model.embed.{x}")]).groups(["embed/weight"])[0].names
    ('model.embed.weight',)
    """

    rules: Sequence[Rule]

    def spelled(self, pairs: Sequence[tuple[str, str]]) -> Self:
        """Return the map for checkpoints that spell names in another way.

        Args:
            pairs: templates of a name and of what it becomes; each changes what the ones before it made.

        >>> table = WeightMap([Rule("norms/{i}", "model.{i}.weight")])
        >>> table.spelled([("model.{rest}", "{rest}"), ("{rest}.weight", "{rest}.gamma")]).groups(["norms/3"])[0].names
        ('3.gamma',)
        """
        return dataclasses.replace(self, rules=[rule.spelled(pairs) for rule in self.rules])

    def groups(self, addresses: Collection[str]) -> list[Group]:
        """Return one group for each set of leaves that belong together, in the order of the addresses.

        Raises:
            WeightsError: a leaf has no rule, a rule's other leaf is absent, or two leaves claim one tensor; the
                message lists all of them.
        """
        groups, covered, errors = list[Group](), set[str](), list[str]()
        for address in addresses:
            if address in covered:
                continue
            group = self._group_of(address)
            if group is None:
                continue
            absent = [a for a in group.addresses if a not in addresses]
            if absent:
                errors.append(f"{absent[0]}: its rule needs it, but the tree has no such leaf")
            groups.append(group)
            covered.update(group.addresses)
        templates = [a for rule in self.rules for a in rule.addresses]
        lost = [address for address in addresses if address not in covered]
        errors += [f"{a}: no rule; the nearest templates are: {nearest(a, templates)}" for a in lost]
        seen: set[str] = set()
        double = [name for group in groups for name in group.names if name in seen or seen.add(name)]
        errors += [f"{name}: two leaves claim this tensor" for name in double]
        if errors:
            raise WeightsError(f"the map does not fit the tree:{listing(errors)}")
        return groups

    def _group_of(self, address: str) -> Group | None:
        for rule in self.rules:
            values = rule.match(address)
            if values is not None:
                return rule.group(values)
        return None


@dataclasses.dataclass(frozen=True)
class StackedMap(WeightMap):
    """Rules for leaves of which some are stacked in the tree, such as those of equal layers.

    Attributes:
        rules: for the leaves one by one.
        singles: ``singles(addresses)`` returns for each address of the tree the leaves that are stacked there along a
            first axis, in order; one leaf stands for itself.

    >>> table = WeightMap([Rule("layers/{i}/w", "h.{i}.w")])
    >>> stacked = StackedMap(table.rules, lambda addresses: {"layers/w": ["layers/0/w", "layers/1/w"]})
    >>> stacked.groups(["layers/w"])[0].names
    ('h.0.w', 'h.1.w')
    """

    singles: Callable[[Collection[str]], Mapping[str, Sequence[str]]]

    def groups(self, addresses: Collection[str]) -> list[Group]:
        """See `WeightMap.groups`; what is stacked together has one group."""
        singles = self.singles(addresses)
        owners = {single: address for address in addresses for single in singles[address]}
        parts = dict[tuple[str, ...], list[Group]]()
        for group in super().groups(list(owners)):
            parts.setdefault(tuple(owners[single] for single in group.addresses), []).append(group)
        return [self._joined(ours, groups, singles) for ours, groups in parts.items()]

    def _joined(self, ours: tuple[str, ...], groups: list[Group], singles: Mapping[str, Sequence[str]]) -> Group:
        if len(singles[ours[0]]) == 1:
            return dataclasses.replace(groups[0], addresses=ours)
        return _StackedGroup(ours, tuple(name for group in groups for name in group.names), (), tuple(groups))


@dataclasses.dataclass(frozen=True)
class _StackedGroup(Group):
    """A group whose leaves stack those of others."""

    parts: tuple[Group, ...]

    def to_ours(self, tensors: Sequence[Lazy]) -> list[Lazy]:
        """See `Group`."""
        size = len(self.names) // len(self.parts)
        made = [part.to_ours(tensors[i * size : (i + 1) * size]) for i, part in enumerate(self.parts)]
        return [Stack(len(self.parts)).apply(leaves)[0] for leaves in zip(*made, strict=True)]

    def to_theirs(self, leaves: Sequence[Lazy]) -> list[Lazy]:
        """See `Group`."""
        each = [Stack(len(self.parts)).inverse().apply([leaf]) for leaf in leaves]
        layers = zip(*each, strict=True)
        return [tensor for part, layer in zip(self.parts, layers, strict=True) for tensor in part.to_theirs(layer)]
