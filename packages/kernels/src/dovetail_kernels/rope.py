"""Rotary position embeddings (Su et al., arXiv:2104.09864).

The table of cosines and sines is made once per forward and used by every layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["RopeTable", "rope", "rope_axes", "rope_table"]


class RopeTable(NamedTuple):
    """Cosines and sines of every position, ``[*positions, dim // 2]``."""

    cos: jax.Array
    sin: jax.Array


def rope_axes(sections: Sequence[int], *, interleaved: bool = False) -> Int[np.ndarray, " half"]:
    """Return which axis of a position each frequency reads, where positions have several (time, height, width).

    Args:
        sections: frequencies per axis; ``[16, 24, 24]`` in Qwen2-VL, ``[dim // 4, dim // 4]`` in a vision encoder (then
            with the frequencies of ``dim // 2``, twice).
        interleaved: axes take turns, and the first has the rest, as in Qwen3-VL; else one after the other.

    Raises:
        ValueError: a section that is negative, or none; one that has no room when axes take turns.

    >>> rope_axes([2, 1, 1]).tolist(), rope_axes([4, 2, 1], interleaved=True).tolist()
    ([0, 0, 1, 2], [0, 1, 2, 0, 1, 0, 0])
    """
    if not len(sections) or min(sections) < 0:
        raise ValueError(f"sections={list(sections)}; expected a number of frequencies for each axis")
    if not interleaved:
        return np.repeat(np.arange(len(sections), dtype=np.int32), sections)
    axes = np.zeros(sum(sections), np.int32)
    for axis in range(1, len(sections)):
        axes[axis : sections[axis] * len(sections) : len(sections)] = axis
    if (counts := np.bincount(axes, minlength=len(sections)).tolist()) != list(sections):
        raise ValueError(f"sections={list(sections)}; taking turns makes them {counts}, expected larger ones first")
    return axes


def rope_table(
    positions: Int[Array, "*tokens"],
    frequencies: Any,
    *,
    factor: float = 1.0,
    axes: Any = None,
    dtype: Any = jnp.float32,
) -> RopeTable:
    """Return the cosines and sines of integer positions; angles are computed in float32.

    Args:
        positions: any shape; with `axes` the last axis holds a token's position on each of them.
        frequencies: ``[dim // 2]``, as from `rope_frequencies`.
        factor: multiplies both tables.
        axes: ``[dim // 2]``, which axis of the position each frequency reads, as from `rope_axes`.
        dtype: of the tables.

    Raises:
        TypeError: `positions` are not integers.
        ValueError: `axes` do not fit the frequencies or the positions.

    >>> positions = jnp.asarray([[0, 2], [1, 3]])  # row and column of two patches
    >>> rope_table(positions, [1.0, 1.0], axes=rope_axes([1, 1])).cos.shape
    (2, 2)
    """
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"positions have dtype {positions.dtype}; expected integers")
    frequencies = jnp.asarray(frequencies, jnp.float32)
    places = positions.astype(jnp.float32)[..., None]
    if axes is not None:
        axes = np.asarray(axes)
        if (
            axes.shape != frequencies.shape
            or not positions.ndim
            or not 0 <= axes.min() <= axes.max() < positions.shape[-1]
        ):
            raise ValueError(
                f"axes {axes.tolist()}; expected one of the axes of positions {positions.shape} for each of the "
                f"{frequencies.shape[0]} frequencies"
            )
        places = places[..., axes, 0]
    angles = places * frequencies
    return RopeTable((jnp.cos(angles) * factor).astype(dtype), (jnp.sin(angles) * factor).astype(dtype))


def rope(
    x: Float[Array, "*tokens heads dim"], table: RopeTable, *, rotated: int | None = None, interleaved: bool = False
) -> Float[Array, "*tokens heads dim"]:
    """Rotate pairs of each head's features by the angle of its token's position.

    Args:
        x: queries or keys.
        table: of the same tokens, ``[*tokens, rotated // 2]``.
        rotated: only this many first features are rotated; None for all.
        interleaved: the pairs are ``(x[2i], x[2i + 1])``, as in GPT-J; else ``(x[i], x[i + rotated // 2])``.

    Raises:
        ValueError: the table does not belong to these tokens or this head size.
        TypeError: `x` is not a float.

    >>> quarter_turn = RopeTable(jnp.zeros((1, 1)), jnp.ones((1, 1)))
    >>> rope(jnp.asarray([[[1.0, 0.0, 5.0]]]), quarter_turn, rotated=2)
    Array([[[0., 1., 5.]]], dtype=float32)
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected a float")
    dim = x.shape[-1] if rotated is None and x.ndim else rotated or 0
    if x.ndim < 2 or dim % 2 or not 0 <= dim <= x.shape[-1]:
        raise ValueError(f"x has shape {x.shape}, rotated={rotated}; expected [*tokens, heads, dim] with an even dim")
    if table.cos.shape != (*x.shape[:-2], dim // 2):
        raise ValueError(f"the table has shape {table.cos.shape}; x {x.shape} needs {(*x.shape[:-2], dim // 2)}")
    cos, sin = table.cos[..., None, :].astype(x.dtype), table.sin[..., None, :].astype(x.dtype)
    turned = x[..., :dim]
    if interleaved:
        pairs = turned.reshape(*x.shape[:-1], dim // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out if dim == x.shape[-1] else jnp.concatenate([out, x[..., dim:]], axis=-1)
