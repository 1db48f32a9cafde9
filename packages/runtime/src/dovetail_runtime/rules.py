"""Rules from logical axis names to mesh axes, for weights and for activations, and presets.

The presets know the mesh axes ``data``, ``fsdp``, ``tensor``, ``context`` and ``expert`` and the logical names in
`LOGICAL_NAMES`. An axis that a mesh does not have counts as size 1, so that a preset fits any mesh that uses some of
these names.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "CONTEXT",
    "DATA",
    "EXPERT",
    "FSDP",
    "FSDP_TENSOR",
    "LOGICAL_NAMES",
    "SEQUENCE",
    "TENSOR",
    "AxisRules",
    "Rules",
]

MeshAxes = str | tuple[str, ...] | None

LOGICAL_NAMES = (
    "batch", "tokens", "residual", "time", "embed", "mlp", "heads", "kv_heads", "head_dim", "vocab", "layers", "experts"
)  # fmt: skip


class AxisRules(Mapping[str, tuple[str, ...]]):
    """An ordered, immutable, hashable mapping ``{logical name: mesh axes}``; earlier names have priority.

    Values are given as one mesh axis, a tuple of them (the dimension is split over all, the first outermost) or None
    (replicated) and are kept as tuples.

    Raises:
        ValueError: a logical name is given twice (possible with pairs), or a mesh axis twice in one rule.
        TypeError: a name or an axis is not a str.
    """

    def __init__(self, rules: Mapping[str, MeshAxes] | Iterable[tuple[str, MeshAxes]] = ()) -> None:
        self._axes: dict[str, tuple[str, ...]] = {}
        pairs: Any = rules.items() if isinstance(rules, Mapping) else rules
        for name, axes in pairs:
            if name in self._axes:
                raise ValueError(f"the logical name {name!r} has two rules: {self._axes[name]} and {axes}; keep one")
            self._axes[name] = _axes(name, axes)
        self._hash = hash(tuple(self._axes.items()))

    def __getitem__(self, name: str) -> tuple[str, ...]:
        try:
            return self._axes[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._axes, n=3, cutoff=0.0)
            raise KeyError(f"no rule for the logical name {name!r}; the nearest names are {near}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    def __contains__(self, name: object) -> bool:
        return name in self._axes

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AxisRules) and list(self._axes.items()) == list(other._axes.items())

    def __repr__(self) -> str:
        return f"AxisRules({self._axes})"


def _axes(name: str, axes: MeshAxes) -> tuple[str, ...]:
    parts = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    if not isinstance(name, str) or not all(isinstance(part, str) for part in parts):
        raise TypeError(f"rule {name!r}: {axes!r} is not a mesh axis, a tuple of them, or None")
    if len(set(parts)) != len(parts):
        raise ValueError(f"rule {name!r} names a mesh axis twice: {parts}")
    return parts


@dataclass(frozen=True)
class Rules:
    """How a run is laid out: `weights` for parameters, `activations` for what `constrain` and `put_batch` see.

    Attributes:
        weights: rules of parameters; a plain mapping is accepted.
        activations: rules of activations; those of `weights` if not given.
        conflict: what to do when one array would use a mesh axis for two dimensions: ``"error"``, or ``"first"``: the
            name that stands earlier in the rules keeps the axis (of two equal names, the leftmost dimension).

    >>> Rules({"embed": "fsdp", "mlp": ("tensor", "expert"), "layers": None}).weights["mlp"]
    ('tensor', 'expert')
    """

    weights: Mapping[str, MeshAxes]
    activations: Mapping[str, MeshAxes] | None = None
    conflict: Literal["error", "first"] = "error"

    def __post_init__(self) -> None:
        if self.conflict not in ("error", "first"):
            raise ValueError(f"conflict={self.conflict!r} is neither 'error' nor 'first'")
        object.__setattr__(self, "weights", as_axis_rules(self.weights))
        given = self.weights if self.activations is None else self.activations
        object.__setattr__(self, "activations", as_axis_rules(given))

    def of(self, kind: Literal["weights", "activations"]) -> AxisRules:
        """Return the rules of one kind of array."""
        return as_axis_rules(self.weights if kind == "weights" else self.activations or {})


def as_axis_rules(rules: Mapping[str, MeshAxes]) -> AxisRules:
    """Return `rules` as `AxisRules`, unchanged if they are that already."""
    return rules if isinstance(rules, AxisRules) else AxisRules(rules)


def _preset(weights: dict[str, MeshAxes], rows: MeshAxes, activations: dict[str, MeshAxes] | None = None) -> Rules:
    def complete(chosen: dict[str, MeshAxes]) -> dict[str, MeshAxes]:
        return {name: chosen.get(name) for name in (*chosen, *LOGICAL_NAMES)}

    placed = dict.fromkeys(("batch", "tokens", "residual"), rows)
    return Rules(complete(weights), complete(placed | (activations or {})))


_SPLIT = {"mlp": "tensor", "heads": "tensor", "kv_heads": "tensor", "vocab": "tensor"}
_ROWS = ("data", "fsdp")

DATA = _preset({}, "data")
"""Data parallelism: weights replicated, rows split over ``data``."""

FSDP = _preset({"embed": "fsdp"}, _ROWS)
"""Fully sharded data parallelism: weights split over ``fsdp``, rows over ``data`` and ``fsdp``."""

TENSOR = _preset({**_SPLIT}, "data", {**_SPLIT})
"""Tensor parallelism: heads, hidden features and vocabulary split over ``tensor``, rows over ``data``."""

FSDP_TENSOR = _preset({"embed": "fsdp", **_SPLIT}, _ROWS, {**_SPLIT})
"""Both: weights split over ``fsdp`` and ``tensor``."""

SEQUENCE = _preset({"embed": "fsdp", **_SPLIT}, _ROWS, {**_SPLIT, "residual": (*_ROWS, "tensor")})
"""`FSDP_TENSOR` whose residual stream, which no weight is split over, is split over ``tensor`` by tokens (sequence
parallelism of Korthikanti et al., arXiv:2205.05198)."""

CONTEXT = _preset(
    {"embed": "fsdp"}, _ROWS, {"time": "context", **dict.fromkeys(("tokens", "residual"), (*_ROWS, "context"))}
)
"""`FSDP` for long rows: each is split over ``context``, too. Attention needs a mixer that knows, see `split_of`."""

EXPERT = _preset({"embed": "fsdp", "experts": "expert"}, (*_ROWS, "expert"), {"experts": "expert"})
"""`FSDP` with experts: they are split over ``expert``, as rows are, and rows travel to them."""
