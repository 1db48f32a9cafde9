"""Frequencies of rotary embeddings and how a longer context is reached with them. Plain NumPy, made once."""

import dataclasses
import math
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float

__all__ = [
    "DynamicScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "RopeScaling",
    "YarnScaling",
    "rope_frequencies",
]


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., arXiv:2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _positive(self, "factor")


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a linear blend between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "low_freq_factor", "original_max_position")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(f"{self}; expected high_freq_factor above low_freq_factor")


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv:2309.00071): a ramp between interpolation and extrapolation, and warmer attention.

    `attention_factor` multiplies cosines and sines; None is the paper's ``0.1 ln(factor) + 1`` (1 for a factor
    below 1), or with both `mscale` and `mscale_all_dim` the quotient of ``0.1 mscale ln(factor) + 1`` with each.
    `truncate` rounds the ends of the ramp to whole features. `logit_factor` is for models that warm all of the logits
    (DeepSeek), not only those of rotated features.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @property
    def warmth(self) -> float:
        """What multiplies cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._warmth(self.mscale) / self._warmth(self.mscale_all_dim)
        return self._warmth(1.0)

    @property
    def logit_factor(self) -> float:
        """What the scale of all logits is multiplied with."""
        return self._warmth(self.mscale_all_dim or 0.0) ** 2

    def _warmth(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(max(self.factor, 1.0)) + 1.0

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_max_position", "beta_slow")
        for name in ("mscale", "mscale_all_dim"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{self}; expected {name} to be a number of at least 0, or None")
        if not self.beta_fast > self.beta_slow:
            raise ValueError(f"{self}; expected beta_fast above beta_slow")
        if self.attention_factor is not None:
            _positive(self, "attention_factor")


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: a base that grows with the length once it is above `original_max_position`."""

    factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_max_position")


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (Ding et al., arXiv:2402.13753): wavelengths times a factor of their own, others for long sequences.

    `long_factor` holds where the length is above `original_max_position`. `attention_factor` multiplies cosines and
    sines; None is ``sqrt(1 + ln(factor) / ln(original_max_position))``, where `factor` is how much longer it got (1 for
    a factor of at most 1).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position: int
    factor: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_max_position")
        if len(self.short_factor) != len(self.long_factor) or not min(*self.short_factor, *self.long_factor, 1.0) > 0:
            raise ValueError(f"{self}; expected as many short as long factors, all positive")
        if self.attention_factor is not None:
            _positive(self, "attention_factor")
        elif self.factor > 1 and self.original_max_position <= 1:
            raise ValueError(f"{self}; expected original_max_position above 1, or an attention_factor")


def _positive(scaling: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(scaling, name) < math.inf:
            raise ValueError(f"{scaling}; expected {name} to be a positive number")


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling


def rope_frequencies(
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    *,
    rotated: int | None = None,
    length: int | None = None,
) -> tuple[Float[np.ndarray, " half"], float]:
    """Return the angular frequencies ``[dim // 2]`` (float32, radians per position) and the factor of the table.

    A model that rotates the first features only has the frequencies of a smaller head of `dim` features (GPT-NeoX,
    Phi, GLM), or those of the whole head, all but the first of them 0: `rotated` ("proportional", Gemma).

    Args:
        dim: features per head that the table is for, even.
        theta: base of the geometric progression of wavelengths.
        scaling: how a longer context is reached.
        rotated: how many of the features have a frequency above 0; None for all.
        length: of the longest sequence, which `DynamicScaling` and `LongRopeScaling` depend on; None for one within
            ``original_max_position``.

    Raises:
        ValueError: `dim` is odd or not positive, `theta` is not a number above 1, `rotated` or a scaling does not fit.

    >>> rope_frequencies(4, 100.0)[0].tolist()
    [1.0, 0.10000000149011612]
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim={dim}; rotary embeddings need a positive even number of features")
    if not 1 < theta < math.inf:
        raise ValueError(f"theta={theta}; expected more than 1 (10000 is usual)")
    if rotated is not None and (rotated % 2 or not 0 <= rotated <= dim):
        raise ValueError(f"rotated={rotated}; expected an even number of at most dim={dim} features")
    base, factor = _scaled(1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim), theta, scaling, length)
    if rotated is not None:
        base = np.where(np.arange(dim // 2) < rotated // 2, base, 0.0)
    return base.astype(np.float32), factor


def _scaled(
    base: Float[np.ndarray, " half"], theta: float, scaling: RopeScaling | None, length: int | None
) -> tuple[Float[np.ndarray, " half"], float]:
    dim = 2 * len(base)
    match scaling:
        case None:
            return base, 1.0
        case LinearScaling():
            return base / scaling.factor, 1.0
        case Llama3Scaling():
            return _llama3(base, scaling), 1.0
        case YarnScaling():
            return _yarn(base, dim, theta, scaling), scaling.warmth
        case DynamicScaling():
            return _dynamic(base, scaling, length), 1.0
        case LongRopeScaling():
            return _longrope(base, scaling, length)


def _dynamic(
    base: Float[np.ndarray, " half"], scaling: DynamicScaling, length: int | None
) -> Float[np.ndarray, " half"]:
    dim, longer = 2 * len(base), max(1.0, (length or 0) / scaling.original_max_position)
    if dim == 2:
        return base
    growth = (scaling.factor * longer - (scaling.factor - 1)) ** (dim / (dim - 2))
    return base / growth ** (np.arange(0, dim, 2) / dim)


def _longrope(
    base: Float[np.ndarray, " half"], scaling: LongRopeScaling, length: int | None
) -> tuple[Float[np.ndarray, " half"], float]:
    factors = scaling.long_factor if (length or 0) > scaling.original_max_position else scaling.short_factor
    if len(factors) != len(base):
        raise ValueError(f"{len(factors)} factors; expected one for each of the {len(base)} frequencies")
    return base / np.asarray(factors), _longrope_attention(scaling)


def _longrope_attention(scaling: LongRopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position))


def _llama3(base: Float[np.ndarray, " half"], scaling: Llama3Scaling) -> Float[np.ndarray, " half"]:
    turns = scaling.original_max_position * base / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return blend * base + (1 - blend) * base / scaling.factor


def _yarn(base: Float[np.ndarray, " half"], dim: int, theta: float, scaling: YarnScaling) -> Float[np.ndarray, " half"]:
    def feature_with(turns: float) -> float:
        return dim * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = feature_with(scaling.beta_fast), feature_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return base / scaling.factor * ramp + base * (1 - ramp)
