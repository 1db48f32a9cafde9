"""How parameters of several models become one; each is computed part by part, after one look at the whole if needed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dovetail_models.lazy_parts import Array, uniform

__all__ = ["ELEMENTS", "METHODS", "Method", "Part"]

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


class Method(NamedTuple):
    """A way of merging.

    Attributes:
        name: one of `METHODS`.
        weights: of the models.
        has_base: the last of the given parameters is that of the base.
        scale: factor of the merged difference to the base.
        density: which share of the differences stays.
        seed: of what stays, where that is drawn.
    """

    name: str
    weights: tuple[float, ...]
    has_base: bool = False
    scale: float = 1.0
    density: float = 1.0
    seed: int = 0

    def whole(self, readers: Sequence[Callable[[], Array]]) -> Any:
        """Return what `combine` must know of the whole parameter, which `readers` bring into memory."""
        looks = {"slerp": _slerp_factors, "ties": _thresholds}
        return looks[self.name](self, readers) if self.name in looks else None

    def combine(self, values: Sequence[Array], part: Part) -> Array:
        """Return the merged parameter's part.

        Args:
            values: of the models' parameters and the base's; they may be overwritten.
            part: which one.
        """
        if not self.has_base:
            return METHODS[self.name](self, list(values), part)
        *models, base = values
        differences = [np.subtract(model, base, out=model) for model in models]
        return base + self.scale * METHODS[self.name](self, differences, part)


def _linear(method: Method, values: list[Array], part: Part) -> Array:
    """Return weighted averages, or sums of differences."""
    del part
    total = 1.0 if method.has_base else sum(method.weights)
    return _summed(values, [weight / total for weight in method.weights])


def _slerp(method: Method, values: list[Array], part: Part) -> Array:
    """Return what lies on a great circle (Shoemake, "Animating rotation with quaternion curves", 1985)."""
    del method
    return _summed(values, part.whole)


def _slerp_factors(method: Method, readers: Sequence[Callable[[], Array]]) -> tuple[float, float]:
    """Return the factors of both parameters, whose lengths stay as they are."""
    share = method.weights[1] / sum(method.weights)
    a, b = (read().reshape(-1) for read in readers)
    lengths = np.sqrt(_product(a, a) * _product(b, b))
    angle = float(np.arccos(np.clip(_product(a, b) / lengths, -1, 1))) if lengths > 0 else 0.0
    if not PARALLEL < angle < np.pi - PARALLEL:
        return 1 - share, share
    return float(np.sin((1 - share) * angle) / np.sin(angle)), float(np.sin(share * angle) / np.sin(angle))


def _ties(method: Method, values: list[Array], part: Part) -> Array:
    """Return means of the largest differences that have the elected sign."""
    for difference, least in zip(values, part.whole, strict=True):
        difference[np.abs(difference) < least] = 0
    elected = np.sign(_summed(values, method.weights))
    agree = [(elected * np.sign(difference) > 0).astype(difference.dtype) for difference in values]
    total = _summed(agree, method.weights)
    chosen = [mask * difference for mask, difference in zip(agree, values, strict=True)]
    return _summed(chosen, method.weights) / np.where(total > 0, total, total.dtype.type(1))


def _thresholds(method: Method, readers: Sequence[Callable[[], Array]]) -> list[float]:
    """Return for each model the least size of a difference that stays."""
    *models, base = readers
    there = base()
    return [_threshold(read(), there, method.density) for read in models]


def _dare(method: Method, values: list[Array], part: Part) -> Array:
    """Return sums of a random share of the differences, made up for."""
    for place, difference in enumerate(values):
        drawn = uniform(method.seed, f"{place}/{part.name}", part.shape, part.index)
        difference[drawn >= method.density] = 0
    return _summed(values, [weight / method.density for weight in method.weights])


METHODS: dict[str, Callable[[Method, list[Array], Part], Array]] = {
    "linear": _linear,
    "slerp": _slerp,
    "ties": _ties,
    "dare": _dare,
}


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
