"""Sampling: one token per row of logits, by parameters that are arrays, so that one program serves every request.

Filters need no sort: the smallest logit that stays is found by bisection over the ordered bits of a float32, exactly,
in 32 passes over the row. A row's token is a function of its logits, its seed and its position alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

__all__ = ["Sampling", "filter_logits", "logprobs", "sample", "top_logprobs"]


_COLDEST = 1e-30  # colder ones would make infinities of the logits; at this one only equal logits share the draws


class Sampling(NamedTuple):
    """How each row is sampled; arrays with one entry per row.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: the fewest likeliest tokens that hold this mass, in (0, 1].
        min_p: only tokens at least this fraction as likely as the likeliest, in [0, 1].
        seed: with `position` it makes the row's random numbers.
        position: place of the token to sample in its sequence.
    """

    temperature: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    seed: UInt32[Array, " rows"]
    position: Int[Array, " rows"]


def sample(logits: Float[Array, "rows vocab"], how: Sampling) -> Int[Array, " rows"]:
    """Return one token id per row.

    Rows of temperature 0 take the first of the likeliest tokens. Others are drawn from the softmax of the filtered
    logits (see `filter_logits`) by adding Gumbel noise. What no row asks for is not computed.

    Args:
        logits: any float dtype; computed in float32.
        how: see `Sampling`.

    >>> how = Sampling(*(jnp.asarray([x]) for x in (0.0, 0, 1.0, 0.0, jnp.uint32(0), 0)))
    >>> sample(jnp.asarray([[0.0, 3.0, 1.0]]), how).tolist()
    [1]
    """
    logits = logits.astype(jnp.float32)
    best = jnp.argmax(logits, -1).astype(jnp.int32)
    random = how.temperature > 0

    def draw() -> jax.Array:
        noisy = filter_logits(logits, how) + _gumbel(how.seed, how.position, logits.shape[1])
        return jnp.where(random, jnp.argmax(noisy, -1).astype(jnp.int32), best)

    return jax.lax.cond(jnp.any(random), draw, lambda: best)


def filter_logits(logits: Float[Array, "rows vocab"], how: Sampling) -> Float[Array, "rows vocab"]:
    """Return ``logits / temperature`` with the tokens that may not be sampled at -inf.

    The filters apply in the order temperature, top-k, top-p (of what top-k left), min-p, as in transformers. Tokens
    that tie with the last one that stays, stay too. The likeliest token always stays.
    """
    logits = logits.astype(jnp.float32)
    temperature = jnp.maximum(how.temperature, _COLDEST)
    scaled = logits / jnp.where(how.temperature > 0, temperature, 1.0)[:, None]
    bottom = jnp.full(scaled.shape[:1], -jnp.inf)

    def kth() -> jax.Array:
        found = _largest(scaled, lambda kept: jnp.sum(kept, -1) >= how.top_k)
        return jnp.where((how.top_k > 0) & (how.top_k < scaled.shape[1]), found, bottom)

    floor = jax.lax.cond(jnp.any(how.top_k > 0), kth, lambda: bottom)

    def nucleus() -> jax.Array:
        mass = jax.nn.softmax(jnp.where(scaled >= floor[:, None], scaled, -jnp.inf), -1)
        found = _largest(scaled, lambda kept: jnp.sum(jnp.where(kept, mass, 0.0), -1) >= how.top_p)
        return jnp.where(how.top_p < 1, jnp.maximum(found, floor), floor)

    floor = jax.lax.cond(jnp.any(how.top_p < 1), nucleus, lambda: floor)
    below = scaled - jnp.max(scaled, -1, keepdims=True)  # exact near the top, unlike a sum with the top
    stays = (scaled >= floor[:, None]) & (below >= jnp.log(how.min_p)[:, None])
    return jnp.where(stays, scaled, -jnp.inf)


def logprobs(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Return the natural log-probability of one token per row, in float32; NaN where the logits are not finite."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], -1, mode="clip")[:, 0]
    return chosen - jax.nn.logsumexp(logits, -1)


def top_logprobs(
    logits: Float[Array, "rows vocab"], count: int
) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """Return the log-probabilities and ids of the `count` likeliest tokens of each row, likeliest first."""
    logits = logits.astype(jnp.float32)
    values, ids = jax.lax.top_k(logits, count)
    return values - jax.nn.logsumexp(logits, -1, keepdims=True), ids.astype(jnp.int32)


def _gumbel(seed: jax.Array, position: jax.Array, vocab: int) -> Float[Array, "rows vocab"]:
    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocab,), jnp.float32)

    return jax.vmap(row)(seed, position)


def _largest(
    x: Float[Array, "rows vocab"], enough: Callable[[Bool[Array, "rows vocab"]], Bool[Array, " rows"]]
) -> Float[Array, " rows"]:
    """Return per row the largest value t of x for which ``enough(x >= t)``; the smallest where there is none."""
    bits = _ordered(x)
    low, high = jnp.min(bits, -1), jnp.max(bits, -1)

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the upper middle, without overflow
        good = enough(bits >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, jnp.maximum(middle - 1, low))

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jax.lax.bitcast_convert_type(_flip(low), jnp.float32)


def _ordered(x: Float[Array, "rows vocab"]) -> Int[Array, "rows vocab"]:
    """Map float32 to int32 so that integers compare as the floats do."""
    return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _flip(bits: jax.Array) -> jax.Array:
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
