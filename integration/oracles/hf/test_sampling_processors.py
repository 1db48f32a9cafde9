"""`dovetail_kernels.filter_logits` against the sampling processors of transformers, alone and chained in its order.

Three differences are allowed, and counted. Where the last token of the nucleus ties with others we keep all of them and
transformers keeps those that its sort puts last. Where a token is within rounding of a boundary either may keep it.
Dividing by a temperature rounds too, by an ulp that may make or break a tie: such rows are judged by our quotients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dovetail_kernels import Sampling, filter_logits

ROUNDING = 1e-6
VOCABULARIES = (1, 7, 2047, 32000)
KINDS = ("wide", "narrow", "peaked", "ties", "equal", "extreme", "masked")


@dataclasses.dataclass(frozen=True)
class How:
    """One row's parameters."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def theirs(self, logits: np.ndarray) -> np.ndarray:
        """Return what `generate` would make of one row of logits, with its processors in its order."""
        processors = LogitsProcessorList()
        if self.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            processors.append(MinPLogitsWarper(self.min_p))
        return processors(None, torch.from_numpy(logits)[None])[0].numpy()


SINGLE = (
    [How(temperature=t) for t in (0.1, 0.7, 2.5)]
    + [How(top_k=k) for k in (1, 5, 50, 2046, 40000)]
    + [How(top_p=p) for p in (1e-4, 0.1, 0.5, 0.9, 0.99)]
    + [How(min_p=p) for p in (1e-3, 0.05, 0.5, 1.0)]
)


def chained(rng: np.random.Generator, count: int) -> list[How]:
    return [
        How(
            temperature=float(rng.choice([0.3, 0.8, 1.0, 1.7])),
            top_k=int(rng.choice([0, 3, 20, 1000])),
            top_p=float(rng.choice([0.2, 0.75, 0.95, 1.0])),
            min_p=float(rng.choice([0.0, 0.01, 0.3])),
        )
        for _ in range(count)
    ]


def draw(rng: np.random.Generator, kind: str, shape: tuple[int, int]) -> np.ndarray:
    normal = rng.standard_normal(shape)
    logits = {
        "wide": normal * 3,
        "narrow": normal * 0.01 - 20,
        "peaked": normal + 30 * (rng.random(shape) < 2 / shape[1]),
        "ties": np.round(normal * 2),
        "equal": np.full(shape, -7.25),
        "extreme": normal * 1e4,
        "masked": np.where(rng.random(shape) < 0.3, -np.inf, normal * 2),
    }[kind]
    logits[:, 0] = np.where(np.isneginf(logits[:, 0]), 0.0, logits[:, 0])  # some token is always possible
    return logits.astype(np.float32)


@functools.cache
def jitted() -> "jax.stages.Wrapped":
    return jax.jit(filter_logits)


def ours(logits: np.ndarray, rows: list[How]) -> np.ndarray:
    columns = [[getattr(how, field.name) for how in rows] for field in dataclasses.fields(How)]
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    zeros = jnp.zeros(len(rows))
    how = [jnp.asarray(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    return np.array(jitted()(jnp.asarray(logits), Sampling(*how, zeros.astype(jnp.uint32), zeros.astype(jnp.int32))))


def undecided(scaled: np.ndarray, how: How) -> np.ndarray:
    """Return which tokens are within rounding of a boundary, in float64, from logits that temperature divided."""
    x = scaled.astype(np.float64)
    if 0 < how.top_k < len(x):
        x = np.where(x >= np.sort(x)[-how.top_k], x, -np.inf)
    mass = np.exp(x - x.max())
    near = np.abs(mass - how.min_p) <= how.min_p * ROUNDING
    if how.top_p < 1:
        order = np.argsort(-x, kind="stable")
        above = np.empty_like(mass)
        cumulative = np.cumsum(mass[order]) / mass.sum()
        above[order] = cumulative - mass[order] / mass.sum()
        near |= np.abs(above - how.top_p) <= ROUNDING
    return near


def unexplained(got: np.ndarray, scaled: np.ndarray, how: How) -> tuple[np.ndarray, bool, bool]:
    """Compare with their filters on divided logits: which tokens differ for no reason; whether ties, rounding did."""
    expected = dataclasses.replace(how, temperature=1.0).theirs(scaled)
    kept = np.isfinite(expected)
    differs = np.isfinite(got) != kept
    ties = differs & ~kept & (scaled == scaled[kept].min()) & (how.top_p < 1)
    near = differs & ~ties & undecided(scaled, how)
    return differs & ~ties & ~near, bool(ties.any()), bool(near.any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_same_tokens_stay(vocab: int, kind: str) -> None:
    """A recipe's temperature, top-k, top-p and min-p mean something else here, alone or together."""
    rng = np.random.default_rng([vocab, KINDS.index(kind)])
    rows = SINGLE + chained(rng, 60 - len(SINGLE))
    logits = draw(rng, kind, (len(rows), vocab))
    filtered = ours(logits, rows)
    quotients = ours(logits, [How(temperature=how.temperature) for how in rows])
    equal = tied = rounded = 0
    for row, how, got, quotient in zip(logits, rows, filtered, quotients, strict=True):
        scaled = How(temperature=how.temperature).theirs(row)
        np.testing.assert_allclose(quotient, scaled, rtol=3e-7)
        kept = np.isfinite(got)
        assert kept[np.argmax(row)]
        np.testing.assert_array_equal(got[kept], quotient[kept])
        equal += np.array_equal(kept, np.isfinite(how.theirs(row)))
        wrong, by_tie, by_rounding = unexplained(got, scaled, how)
        if wrong.any():
            wrong, by_tie, _ = unexplained(got, quotient, how)
            by_rounding = True
        assert not wrong.any(), f"{how}: tokens {np.flatnonzero(wrong)[:5]}, ours keeps {kept[wrong][:5]}"
        tied += by_tie
        rounded += by_rounding
    print(f"{vocab} tokens, {kind}: {len(rows)} rows, {equal} equal, {tied} differ in a tie, {rounded} in rounding")
    assert equal >= len(rows) - tied - rounded
    assert tied == 0 or kind in ("ties", "equal", "narrow")
    assert rounded <= 0.05 * len(rows)
