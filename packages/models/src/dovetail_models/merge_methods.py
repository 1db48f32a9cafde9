"""How parameters of several models become one; each is computed part by part, after one look at the whole if needed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dovetail_models.lazy_parts import Array, uniform

__all__ = ["ELEMENTS", "METHODS", "Dare", "Linear", "Method", "Part", "Slerp", "Ties"]

ELEMENTS = 1 << 20
"""Numbers that are computed with at a time."""

PARALLEL = 1e-3
"""In radians: vectors that are nearer to parallel than this, or to opposite, are averaged along the straight line."""


class Part(NamedTuple):
    """What of a parameter is merged.

    Attributes:
        name: of the parameter.
        shape: of the whole of it.
        index: of the part.
        whole: what `Method.whole` returned.
    """

    name: str
    shape: tuple[int, ...]
    index: Any
    whole: Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of merging.

    Attributes:
        weights: of the models.
        has_base: the last of the given parameters is that of the base.
        scale: factor of the merged difference to the base.
    """

    weights: tuple[float, ...]
    has_base: bool = False
    scale: float = 1.0

    def whole(self, readers: Sequence[Callable[[], Array]]) -> Any:
        """Return what `combine` must know of the whole parameter, which `readers` bring into memory."""
        del readers

    def combine(self, values: Sequence[Array], part: Part) -> Array:
        """Return the merged parameter's part.

        Args:
            values: of the models' parameters and the base's; they may be overwritten.
            part: which one.
        """
        raise NotImplementedError

    def over_base(self, values: Sequence[Array], merged: Callable[[list[Array]], Array]) -> Array:
        """Return the base and what is made of the differences to it."""
        *models, base = values
        return base + self.scale * merged([np.subtract(model, base, out=model) for model in models])


@dataclasses.dataclass(frozen=True)
class Linear(Method):
    """Weighted averages, or sums of differences."""

    def combine(self, values: Sequence[Array], part: Part) -> Array:
        """See `Method.combine`."""
        del part
        if self.has_base:
            return self.over_base(values, lambda differences: _summed(differences, self.weights))
        return _summed(values, [weight / sum(self.weights) for weight in self.weights])


@dataclasses.dataclass(frozen=True)
class Slerp(Method):
    """Along a great circle (Shoemake, "Animating rotation with quaternion curves", 1985), lengths as they are."""

    def whole(self, readers: Sequence[Callable[[], Array]]) -> tuple[float, float]:
        """Return the factors of both."""
        share = self.weights[1] / sum(self.weights)
        a, b = (read().reshape(-1) for read in readers)
        lengths = np.sqrt(_product(a, a) * _product(b, b))
        angle = float(np.arccos(np.clip(_product(a, b) / lengths, -1, 1))) if lengths > 0 else 0.0
        if not PARALLEL < angle < np.pi - PARALLEL:
            return 1 - share, share
        return float(np.sin((1 - share) * angle) / np.sin(angle)), float(np.sin(share * angle) / np.sin(angle))

    def combine(self, values: Sequence[Array], part: Part) -> Array:
        """See `Method.combine`."""
        return _summed(values, part.whole)


@dataclasses.dataclass(frozen=True)
class Ties(Method):
    """The largest differences, of one sign."""

    density: float = 1.0

    def whole(self, readers: Sequence[Callable[[], Array]]) -> list[float]:
        """Return for each model the least size of a difference that stays."""
        *models, base = readers
        there = base()
        return [_threshold(read(), there, self.density) for read in models]

    def combine(self, values: Sequence[Array], part: Part) -> Array:
        """See `Method.combine`."""

        def merged(differences: list[Array]) -> Array:
            for difference, least in zip(differences, part.whole, strict=True):
                difference[np.abs(difference) < least] = 0
            elected = np.sign(_summed(differences, self.weights))
            agree = [(elected * np.sign(difference) > 0).astype(difference.dtype) for difference in differences]
            total = _summed(agree, self.weights)
            chosen = [mask * difference for mask, difference in zip(agree, differences, strict=True)]
            return _summed(chosen, self.weights) / np.where(total > 0, total, total.dtype.type(1))

        return self.over_base(values, merged)


@dataclasses.dataclass(frozen=True)
class Dare(Method):
    """Differences of which a random share stays."""

    density: float = 1.0
    seed: int = 0

    def combine(self, values: Sequence[Array], part: Part) -> Array:
        """See `Method.combine`."""

        def merged(differences: list[Array]) -> Array:
            for place, difference in enumerate(differences):
                difference[uniform(self.seed, f"{place}/{part.name}", part.shape, part.index) >= self.density] = 0
            return _summed(differences, [weight / self.density for weight in self.weights])

        return self.over_base(values, merged)


METHODS: dict[str, type[Method]] = {"linear": Linear, "slerp": Slerp, "ties": Ties, "dare": Dare}


def _summed(parts: Sequence[Array], weights: Sequence[float]) -> Array:
    total = parts[0] * parts[0].dtype.type(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * part.dtype.type(weight)
    return total


def _product(a: Array, b: Array) -> float:
    """Return the inner product of two vectors, in float64, piece by piece."""
    pieces = range(0, len(a), ELEMENTS)
    return sum(float(a[i : i + ELEMENTS].astype(np.float64) @ b[i : i + ELEMENTS].astype(np.float64)) for i in pieces)


def _threshold(model: Array, base: Array, density: float) -> float:
    """Return the least size of a difference that stays; `model` is overwritten."""
    sizes = np.abs(np.subtract(model, base, out=model), out=model).reshape(-1)
    least = sizes.size - max(1, round(density * sizes.size))
    sizes.partition(least)
    return float(sizes[least])
