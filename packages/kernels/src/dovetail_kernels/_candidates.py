"""Which tokens may be sampled, without a sort.

Most filters leave few tokens, and those are in the blocks of the row with the largest maxima: `likeliest` picks these
blocks, and `stays` says whether the tokens that stay are provably all among them: then nothing else needs the whole
row. The smallest logit that stays is found by bisection over the ordered bits of a float32, exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dovetail_kernels._manual import alike

__all__ = ["BLOCK", "BLOCKS", "Candidates", "Sampling", "argmax", "everything", "likeliest", "stays", "warmth"]

BLOCK = 32
BLOCKS = 128
_COLDEST = 1e-30  # colder ones would make infinities of the logits; at this one only equal logits share the draws
_HOTTEST = 1e30  # hotter ones would make NaN of infinite logits; at this one all finite logits are the same


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


class Candidates(NamedTuple):
    """Some tokens of each row.

    Attributes:
        scaled: logits divided by the temperature; infinite where they are NaN.
        ids: which tokens these are.
        outside: no other token is above this.
        whole: per row, the sum of ``exp(scaled - max(scaled))`` over all tokens; called where it is needed.
    """

    scaled: Float[Array, "rows some"]
    ids: Int[Array, "rows some"]
    outside: Float[Array, " rows"]
    whole: Callable[[], Float[Array, " rows"]]


def warmth(how: Sampling) -> Float[Array, "rows 1"]:
    """Return what logits are divided by; 1 for rows that take the likeliest token."""
    return jnp.where(how.temperature > 0, jnp.clip(how.temperature, _COLDEST, _HOTTEST), 1.0)[:, None]


def everything(logits: Float[Array, "rows vocab"], how: Sampling) -> Candidates:
    """Return all tokens."""
    scaled = _ranked(logits) / warmth(how)
    ids, _ = alike(jax.lax.broadcasted_iota(jnp.int32, scaled.shape, 1), scaled)
    outside, _ = alike(jnp.full(scaled.shape[:1], -jnp.inf, jnp.float32), scaled)
    return Candidates(scaled, ids, outside, lambda: jnp.sum(_mass(scaled), -1))


def likeliest(logits: Float[Array, "rows vocab"], how: Sampling) -> Candidates:
    """Return the tokens of the `BLOCKS` blocks with the largest maxima."""
    heat, peaks = warmth(how), _peaks(logits)
    tops, blocks = jax.lax.top_k(peaks, BLOCKS + 1)
    values, ids = _tokens(logits, blocks[:, :BLOCKS])
    top = tops[:, :1]

    def whole() -> jax.Array:
        return jnp.sum(jnp.exp(logits / heat - top / heat), -1)

    return Candidates(_ranked(values) / heat, ids, tops[:, -1] / heat[:, 0], whole)


def argmax(logits: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """Return the first of the likeliest tokens; NaN counts as infinite. XLA's own argmax is slow on a CPU."""
    if logits.shape[1] <= BLOCK:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    block = jnp.argmax(_peaks(logits), -1).astype(jnp.int32)
    values, ids = _tokens(logits, block[:, None])
    return jnp.take_along_axis(ids, jnp.argmax(values, -1)[:, None], -1)[:, 0]


def _peaks(logits: Float[Array, "rows vocab"]) -> Float[Array, "rows blocks"]:
    rest = -logits.shape[1] % BLOCK
    seen = _ranked(logits)  # a maximum over a window may pass over NaN
    return jax.lax.reduce_window(seen, -jnp.inf, jax.lax.max, (1, BLOCK), (1, BLOCK), ((0, 0), (0, rest)))


def _ranked(logits: Float[Array, "rows some"]) -> Float[Array, "rows some"]:
    return jnp.where(jnp.isnan(logits), jnp.inf, logits)


def _tokens(
    logits: Float[Array, "rows vocab"], blocks: Int[Array, "rows picked"]
) -> tuple[Float[Array, "rows some"], Int[Array, "rows some"]]:
    rows, vocab = logits.shape
    ids = blocks[..., None] * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
    ids = ids.reshape(rows, blocks.shape[1] * BLOCK)
    values = jnp.take_along_axis(logits, jnp.minimum(ids, vocab - 1), -1, mode="clip")
    return jnp.where(ids < vocab, values, -jnp.inf), ids


def stays(among: Candidates, how: Sampling, vocab: int) -> tuple[Bool[Array, "rows some"], Bool[Array, " rows"]]:
    """Return which candidates may be sampled, and for which rows it is proven that no other token may.

    The filters apply in the order top-k, top-p (of what top-k left), min-p.
    """
    scaled, outside = among.scaled, among.outside
    peak = jnp.max(scaled, -1, keepdims=True)
    bottom, _ = alike(jnp.full(outside.shape, -jnp.inf, jnp.float32), outside)
    by_k, by_p = (how.top_k > 0) & (how.top_k < vocab), how.top_p < 1

    def kth() -> jax.Array:
        return jnp.where(by_k, _largest(scaled, lambda kept: jnp.sum(kept, -1, dtype=jnp.int32) >= how.top_k), bottom)

    floor = jax.lax.cond(jnp.any(by_k), kth, lambda: bottom)
    proven = ~by_k | (floor > outside)

    def nucleus() -> jax.Array:
        mass = jnp.where(scaled >= floor[:, None], _mass(scaled), 0.0)
        total = jax.lax.cond(jnp.all(by_k | ~by_p), lambda: bottom, among.whole)
        needed = how.top_p * jnp.where(by_k, jnp.sum(mass, -1), total)
        found = _largest(scaled, lambda kept: jnp.sum(jnp.where(kept, mass, 0.0), -1) >= needed)
        return jnp.where(by_p, jnp.maximum(found, floor), floor)

    floor = jax.lax.cond(jnp.any(by_p), nucleus, lambda: floor)
    proven &= ~by_p | (floor > outside)
    lowest = jnp.log(how.min_p)
    proven &= (outside < floor) | (outside - peak[:, 0] < lowest)  # what is outside is filtered out
    proven = (proven | jnp.isneginf(outside)) & jnp.isfinite(peak[:, 0])
    return (scaled >= floor[:, None]) & (_below(scaled) >= lowest[:, None]), proven


def _mass(scaled: Float[Array, "rows some"]) -> Float[Array, "rows some"]:
    return jnp.exp(_below(scaled))


def _below(scaled: Float[Array, "rows some"]) -> Float[Array, "rows some"]:
    """Return the differences to the largest, exact near it; 0 where it is it, be it infinite."""
    peak = jnp.max(scaled, -1, keepdims=True)
    return jnp.where(scaled == peak, 0.0, scaled - peak)


def _largest(
    x: Float[Array, "rows some"], enough: Callable[[Bool[Array, "rows some"]], Bool[Array, " rows"]]
) -> Float[Array, " rows"]:
    """Return per row the largest value t of x for which ``enough(x >= t)``; -inf where there is none."""
    bits = _ordered(x)
    low, high = jnp.min(bits, -1), jnp.max(bits, -1)

    def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # the upper middle, without overflow
        good = enough(bits >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, jnp.maximum(middle - 1, low))

    low, _ = jax.lax.while_loop(lambda bounds: jnp.any(bounds[0] < bounds[1]), narrow, (low, high))
    found = jax.lax.bitcast_convert_type(_flip(low), jnp.float32)
    return jnp.where(enough(bits >= low[:, None]), found, -jnp.inf)


def _ordered(x: Float[Array, "rows some"]) -> Int[Array, "rows some"]:
    """Map float32 to int32 so that integers compare as the floats do."""
    return _flip(jax.lax.bitcast_convert_type(x, jnp.int32))


def _flip(bits: jax.Array) -> jax.Array:
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))
