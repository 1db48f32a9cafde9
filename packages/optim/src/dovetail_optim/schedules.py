"""Learning-rate schedules that optax lacks, or that it gives in pieces: plain functions from a step to a rate.

Each takes a Python int or a (traced) integer array and returns a float32 array of its shape. All begin with a linear
warm-up from 0 at step 0 to `peak` at step `warmup`; with ``warmup=0`` they begin at `peak`. Those with `total_steps`
reach `floor` at that step and stay there.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

__all__ = ["Schedule", "cosine", "inverse_sqrt", "linear", "wsd"]

Schedule = Callable[[Any], jax.Array]

# What is left of (peak - floor) after the fraction x of the decay.
_SHAPES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + jnp.cos(math.pi * x)),
}


def wsd(
    peak: float,
    total_steps: int,
    *,
    warmup: int,
    decay: int,
    shape: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt",
    floor: float = 0.0,
) -> Schedule:
    """Return warm-up, stable, decay: linear to `peak`, constant, and down to `floor` over the last `decay` steps.

    With x the elapsed fraction of the decay the rate is ``floor + (peak - floor) f(x)``, f being ``1 - sqrt(x)``
    (Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", 2024), ``1 - x`` or
    half a cosine.
    With ``decay=0`` it stays at `peak`.

    Args:
        peak: the highest rate.
        total_steps: where the decay ends.
        warmup: steps of warm-up.
        decay: steps of decay.
        shape: of the decay.
        floor: the last rate.

    Raises:
        ValueError: a number is out of range, or warm-up and decay do not fit into `total_steps`.

    >>> schedule = wsd(1.0, 100, warmup=10, decay=16)
    >>> [round(float(schedule(step)), 4) for step in (0, 5, 10, 84, 88, 100, 200)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if shape not in _SHAPES:
        raise ValueError(f"wsd(shape={shape!r}); expected one of {sorted(_SHAPES)}")
    _check(peak, floor, total_steps=total_steps, warmup=warmup, decay=decay)
    if warmup + decay > total_steps:
        raise ValueError(f"wsd: warmup={warmup} + decay={decay} exceed total_steps={total_steps}; shorten one of them")
    return _warmed(peak, warmup, _falling(peak, floor, total_steps - decay, decay, _SHAPES[shape]))


def cosine(peak: float, total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Return warm-up and half a cosine from `peak` down to `floor` (Loshchilov and Hutter, SGDR, 2017).

    Raises:
        ValueError: a number is out of range, or `warmup` is not below `total_steps`.

    >>> schedule = cosine(1.0, 110, warmup=10, floor=0.1)
    >>> [round(float(schedule(step)), 4) for step in (0, 10, 60, 110, 500)]
    [0.0, 1.0, 0.55, 0.1, 0.1]
    """
    return _whole("cosine", peak, total_steps, warmup, floor)


def linear(peak: float, total_steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Return warm-up and a straight line from `peak` down to `floor`.

    Raises:
        ValueError: a number is out of range, or `warmup` is not below `total_steps`.

    >>> schedule = linear(1.0, 110, warmup=10)
    >>> [round(float(schedule(step)), 4) for step in (5, 10, 60, 110)]
    [0.5, 1.0, 0.5, 0.0]
    """
    return _whole("linear", peak, total_steps, warmup, floor)


def inverse_sqrt(peak: float, *, warmup: int, timescale: int | None = None) -> Schedule:
    """Return warm-up and then ``peak / sqrt(1 + (step - warmup) / timescale)``, which needs no end.

    Args:
        peak: the highest rate.
        warmup: steps of warm-up.
        timescale: how slowly the rate falls, in steps; `warmup` (at least 1) by default, which makes it
            ``peak sqrt(warmup / step)`` (Vaswani et al., "Attention Is All You Need", 2017).

    Raises:
        ValueError: a number is out of range.

    >>> schedule = inverse_sqrt(1.0, warmup=100)
    >>> [round(float(schedule(step)), 4) for step in (50, 100, 400, 10000)]
    [0.5, 1.0, 0.5, 0.1]
    """
    scale = max(1, warmup) if timescale is None else timescale
    _check(peak, 0.0, warmup=warmup, timescale=scale)
    if scale < 1:
        raise ValueError(f"inverse_sqrt(timescale={timescale}); give at least 1 step")
    return _warmed(peak, warmup, lambda t: peak * jax.lax.rsqrt(1 + jnp.maximum(t - warmup, 0) / scale))


def _whole(shape: str, peak: float, total_steps: int, warmup: int, floor: float) -> Schedule:
    _check(peak, floor, total_steps=total_steps, warmup=warmup)
    if warmup >= total_steps:
        raise ValueError(f"{shape}: warmup={warmup} leaves nothing of total_steps={total_steps}; shorten it")
    return _warmed(peak, warmup, _falling(peak, floor, warmup, total_steps - warmup, _SHAPES[shape]))


def _falling(
    peak: float, floor: float, start: int, length: int, shape: Callable[[jax.Array], jax.Array]
) -> Callable[[jax.Array], jax.Array]:
    if length == 0:
        return lambda t: jnp.full_like(t, peak)
    return lambda t: floor + (peak - floor) * shape(jnp.clip((t - start) / length, 0, 1))


def _warmed(peak: float, warmup: int, after: Callable[[jax.Array], jax.Array]) -> Schedule:
    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step).astype(jnp.float32)
        return jnp.where(t < warmup, peak * t / max(1, warmup), after(t))

    return schedule


def _check(peak: float, floor: float, **steps: int) -> None:
    if not (math.isfinite(peak) and peak > 0):
        raise ValueError(f"peak={peak}; give a positive, finite learning rate")
    if not 0 <= floor <= peak:
        raise ValueError(f"floor={floor}; expected 0 <= floor <= peak={peak}")
    for name, count in steps.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < (name == "total_steps"):
            least = "at least 1" if name == "total_steps" else "at least 0"
            raise ValueError(f"{name}={count!r}; give a whole number of steps, {least}")
