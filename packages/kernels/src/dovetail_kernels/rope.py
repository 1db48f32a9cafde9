"""Rotary position embeddings (Su et al., arXiv:2104.09864) in the half layout, with the usual scalings.

The table of cosines and sines is made once per forward and used by every layer.
"""

import dataclasses
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "RopeScaling",
    "RopeTable",
    "YarnScaling",
    "rope",
    "rope_frequencies",
    "rope_table",
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
    below 1). `truncate` rounds the ends of the ramp to whole features.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _positive(self, "factor", "original_max_position", "beta_slow")
        if not self.beta_fast > self.beta_slow:
            raise ValueError(f"{self}; expected beta_fast above beta_slow")
        if self.attention_factor is not None:
            _positive(self, "attention_factor")


def _positive(scaling: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(scaling, name) < math.inf:
            raise ValueError(f"{scaling}; expected {name} to be a positive number")


RopeScaling: TypeAlias = LinearScaling | Llama3Scaling | YarnScaling


class RopeTable(NamedTuple):
    """Cosines and sines of every position, ``[*positions, dim // 2]``."""

    cos: jax.Array
    sin: jax.Array


def rope_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[np.ndarray, " half"], float]:
    """Return the angular frequencies ``[dim // 2]`` (float32, radians per position) and the factor of the table.

    Args:
        dim: rotated features per head, even.
        theta: base of the geometric progression of wavelengths.
        scaling: how a longer context is reached.

    Raises:
        ValueError: `dim` is odd or not positive, or `theta` is not a number above 1.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"dim={dim}; rotary embeddings need a positive even number of features")
    if not 1 < theta < math.inf:
        raise ValueError(f"theta={theta}; expected more than 1 (10000 is usual)")
    base = 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    factor = 1.0
    match scaling:
        case None:
            pass
        case LinearScaling():
            base = base / scaling.factor
        case Llama3Scaling():
            base = _llama3(base, scaling)
        case YarnScaling():
            base = _yarn(base, dim, theta, scaling)
            paper = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
            factor = paper if scaling.attention_factor is None else scaling.attention_factor
    return base.astype(np.float32), factor


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


def rope_table(
    positions: Int[Array, "*tokens"], frequencies: Any, *, factor: float = 1.0, dtype: Any = jnp.float32
) -> RopeTable:
    """Return the cosines and sines of integer positions; angles are computed in float32.

    Args:
        positions: any shape.
        frequencies: ``[dim // 2]``, as from `rope_frequencies`.
        factor: multiplies both tables.
        dtype: of the tables.

    Raises:
        TypeError: `positions` are not integers.
    """
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions have dtype {positions.dtype}; expected integers")
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
    return RopeTable((jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype))


def rope(x: Float[Array, "*tokens heads dim"], table: RopeTable) -> Float[Array, "*tokens heads dim"]:
    """Rotate each head's features ``(x[i], x[i + dim/2])`` by the angle of its token's position.

    Args:
        x: queries or keys.
        table: of the same tokens, ``[*tokens, dim // 2]``.

    Raises:
        ValueError: the table does not belong to these tokens or this head size.
    """
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {x.shape}; expected [*tokens, heads, dim] with an even dim")
    if table.cos.shape != (*x.shape[:-2], x.shape[-1] // 2):
        raise ValueError(
            f"the table has shape {table.cos.shape}; x {x.shape} needs {(*x.shape[:-2], x.shape[-1] // 2)}"
        )
    cos, sin = table.cos[..., None, :].astype(x.dtype), table.sin[..., None, :].astype(x.dtype)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
