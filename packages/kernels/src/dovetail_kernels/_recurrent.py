"""What the recurrent operations share: where segments start, chunks of time, decays between tokens of a chunk."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = [
    "Decays",
    "Runs",
    "check_floats",
    "check_segments",
    "check_shapes",
    "decays",
    "fold",
    "fold_index",
    "initial",
    "runs",
    "unfold",
    "walk",
    "without_padding",
]

GRID = 256.0
STRONGEST = {"float32": 128.0, "float64": 1024.0}


class Runs(NamedTuple):
    """Packed segments of a batch, every array ``[batch, time]``.

    Attributes:
        valid: False for padding.
        starts: where the state is reset: another segment than the last token's that was not padding.
        number: resets so far; 0 is the segment that the initial state belongs to.
    """

    valid: jax.Array
    starts: jax.Array
    number: jax.Array


def runs(segment_ids: jax.Array | None) -> Runs | None:
    """Return where segments start; None is one segment without padding."""
    if segment_ids is None:
        return None
    valid = segment_ids != 0
    places = jnp.where(valid, jnp.arange(segment_ids.shape[1], dtype=jnp.int32), -1)
    before = jnp.pad(jax.lax.cummax(places, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    starts = valid & (before >= 0) & (previous != segment_ids)
    return Runs(valid, starts, jnp.cumsum(starts, axis=1, dtype=jnp.int32))


class Decays(NamedTuple):
    """Products of decays in chunks of `size` tokens; 0 where a segment starts between the two ends.

    Attributes:
        between: from after token j to after token i, ``[..., i, j]``, 0 for j > i.
        into: from before the chunk to after token i.
        out: from after token j to the chunk's end.
        whole: from before the chunk to its end, ``[..., 1]``.
    """

    between: jax.Array
    into: jax.Array
    out: jax.Array
    whole: jax.Array


def decays(log_decay: jax.Array, index: jax.Array | None) -> Decays:
    """Return the decays of ``[..., chunks, heads, size]``, given the runs ``[..., chunks, 1, size]``.

    Sums stay in log space, and no masked difference is exponentiated. The sums of multiples of 1/256 are exact, those
    of the rests are small: a difference of sums keeps its precision however strong the decays before it are.
    """
    size = log_decay.shape[-1]
    g = jnp.maximum(log_decay, -STRONGEST[str(log_decay.dtype)])
    coarse = jax.lax.stop_gradient(jnp.round(g * GRID) / GRID)
    sums = [jnp.cumsum(part, axis=-1) for part in (coarse, g - coarse)]
    keep = jnp.tril(jnp.ones((size, size), bool))
    carried = last = jnp.ones((), bool)
    if index is not None:
        keep = keep & (index[..., :, None] == index[..., None, :])
        ends = index[..., -1:]
        begins = jnp.pad(ends[..., :-1, :, :], [(0, 0)] * (index.ndim - 3) + [(1, 0), (0, 0), (0, 0)])
        carried, last = index == begins, index == ends
    between = sum(s[..., :, None] - s[..., None, :] for s in sums)
    into = _masked(carried, sums[0] + sums[1])
    out = _masked(last, sum(s[..., -1:] - s for s in sums))
    return Decays(_masked(keep, between), into, out, into[..., -1:])


def _masked(keep: jax.Array, exponent: Any) -> jax.Array:
    return jnp.where(keep, jnp.exp(jnp.where(keep, exponent, 0)), 0)


def without_padding(segments: Runs | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Return arrays ``[batch, time, ...]`` with zeros in place of padding, whatever stood there."""
    if segments is None:
        return arrays
    return tuple(jnp.where(segments.valid.reshape(*x.shape[:2], *(1,) * (x.ndim - 2)), x, 0) for x in arrays)


def fold(x: jax.Array, size: int) -> jax.Array:
    """Split time, ``[batch, time, ...]``, into chunks, ``[batch, chunks, size, ...]``, the last filled with zeros."""
    missing = -x.shape[1] % size
    if missing:
        x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def fold_index(index: jax.Array | None, size: int) -> jax.Array | None:
    """Split runs into ``[batch, chunks, 1, size]``; what fills the last chunk belongs to the last run."""
    if index is None:
        return None
    index = jnp.pad(index, ((0, 0), (0, -index.shape[1] % size)), mode="edge")
    return index.reshape(index.shape[0], -1, 1, size)


def unfold(x: jax.Array, time: int) -> jax.Array:
    """Join chunks again."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


def walk(step: Any, state: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
    """Scan over the second axis of `inputs`, with a state that varies over whatever mesh axes they vary over."""
    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    state, outs = jax.lax.scan(step, state, inputs)
    return state, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outs)


def initial(state: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Return the initial state, zeros by default."""
    return jnp.zeros(shape, dtype) if state is None else state.astype(dtype)


def check_floats(**arrays: jax.Array | None) -> None:
    """Raise TypeError for what is not a float."""
    for name, array in arrays.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}; expected a float")


def check_shapes(sizes: dict[str, int], **arrays: tuple[jax.Array | None, tuple[str, ...]]) -> None:
    """Raise ValueError where an array does not have the shape that names of axes give."""
    for name, (array, axes) in arrays.items():
        expected = tuple(sizes[axis] for axis in axes)
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} has shape {array.shape}; expected [{', '.join(axes)}] = {expected}")


def check_segments(segment_ids: jax.Array | None, shape: tuple[int, int]) -> None:
    """Raise where segment ids are no integers, or not one per token."""
    if segment_ids is None:
        return
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids have dtype {segment_ids.dtype}; expected integers, 0 for padding")
    if segment_ids.shape != shape:
        raise ValueError(f"segment_ids have shape {segment_ids.shape}; expected [batch, time] = {shape}")
