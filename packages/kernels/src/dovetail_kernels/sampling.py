"""Sampling: one token per row of logits, by parameters that are arrays, so that one program serves every request.

Filters need no sort and seldom look at more than a few blocks of a row (see `_candidates`). A row's token is a function
of its logits, its seed and its position alone.
"""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from dovetail_kernels._candidates import BLOCK, BLOCKS, Candidates, Sampling, argmax, everything, likeliest, stays
from dovetail_kernels._dtypes import int32
from dovetail_kernels._manual import alike
from dovetail_kernels._programs import partitioned

__all__ = ["Sampling", "filter_logits", "logprobs", "sample", "top_logprobs"]


def sample(logits: Float[Array, "rows vocab"], how: Sampling) -> Int[Array, " rows"]:
    """Return one token id per row.

    Rows of temperature 0 take the first of the likeliest tokens. Others are drawn from the softmax of the filtered
    logits (see `filter_logits`) by adding Gumbel noise. What no row asks for is not computed. NaN counts as infinite,
    at any temperature: a model that broke returns the token where it did, whose `logprobs` is NaN.

    Args:
        logits: any float dtype; computed in float32.
        how: see `Sampling`; computed in 32 bits.

    Raises:
        ValueError: `how` is of another number of rows, or there is no token to choose.
        TypeError: logits that are not floats, or fields of `how` that are no integers where they should be.

    >>> how = Sampling(*(jnp.asarray([x]) for x in (0.0, 0, 1.0, 0.0, jnp.uint32(0), 0)))
    >>> sample(jnp.asarray([[0.0, 3.0, 1.0]]), how).tolist()
    [1]
    """
    given = {"logits": logits, "how": checked(logits, how)}
    return partitioned(_sample, given, lambda _, axes: PartitionSpec(axes["logits"][0]))


@jax.jit
def _sample(logits: Float[Array, "rows vocab"], how: Sampling) -> Int[Array, " rows"]:
    logits, *fields = alike(logits.astype(jnp.float32), *how)
    how = Sampling(*fields)
    best = argmax(logits)
    random = how.temperature > 0

    def draw(among: Candidates, kept: jax.Array) -> jax.Array:
        noisy = jnp.where(kept, among.scaled, -jnp.inf) + gumbel(how.seed, how.position, among.ids)
        place = argmax(jax.lax.optimization_barrier(noisy))  # made once, not once per use
        return jnp.where(random, jnp.take_along_axis(among.ids, place[:, None], -1)[:, 0], best)

    def from_all() -> jax.Array:
        among = everything(logits, how)
        return draw(among, stays(among, how, logits.shape[1])[0])

    def from_few() -> jax.Array:
        among = likeliest(logits, how)
        kept, proven = stays(among, how, logits.shape[1])
        return jax.lax.cond(jnp.all(proven | ~random), lambda: draw(among, kept), from_all)

    return jax.lax.cond(jnp.any(random), from_few if _large(logits) else from_all, lambda: best)


def filter_logits(logits: Float[Array, "rows vocab"], how: Sampling) -> Float[Array, "rows vocab"]:
    """Return ``logits / temperature`` with the tokens that may not be sampled at -inf.

    The filters apply in the order temperature, top-k, top-p (of what top-k left), min-p, as in transformers. Tokens
    that tie with the last one that stays, stay too. The likeliest token always stays; NaN counts as infinite, and
    comes out so.

    Raises:
        ValueError: as `sample`.
        TypeError: as `sample`.
    """
    given = {"logits": logits, "how": checked(logits, how)}
    return partitioned(_filter, given, lambda _, axes: PartitionSpec(axes["logits"][0]))


@jax.jit
def _filter(logits: Float[Array, "rows vocab"], how: Sampling) -> Float[Array, "rows vocab"]:
    logits, *fields = alike(logits.astype(jnp.float32), *how)
    how = Sampling(*fields)
    among = everything(logits, how)

    def from_all() -> jax.Array:
        return jnp.where(stays(among, how, logits.shape[1])[0], among.scaled, -jnp.inf)

    if not _large(logits):
        return from_all()
    few = likeliest(logits, how)
    kept, proven = stays(few, how, logits.shape[1])

    def from_few() -> jax.Array:
        lowest = jnp.min(jnp.where(kept, few.scaled, jnp.inf), -1, keepdims=True)
        return jnp.where(among.scaled >= lowest, among.scaled, -jnp.inf)

    return jax.lax.cond(jnp.all(proven), from_few, from_all)


def logprobs(logits: Float[Array, "rows vocab"], tokens: Int[Array, " rows"]) -> Float[Array, " rows"]:
    """Return the natural log-probability of one token per row, in float32.

    NaN where a logit is NaN or infinite, and for a token outside ``[0, vocab)``.
    """
    logits, tokens = logits.astype(jnp.float32), int32(tokens)
    chosen = jnp.take_along_axis(logits, tokens[:, None], -1, mode="clip")[:, 0]
    known = (tokens >= 0) & (tokens < logits.shape[1])
    return jnp.where(known, chosen, jnp.nan) - jax.nn.logsumexp(logits, -1)


def top_logprobs(
    logits: Float[Array, "rows vocab"], count: int
) -> tuple[Float[Array, "rows count"], Int[Array, "rows count"]]:
    """Return the log-probabilities and ids of the `count` likeliest tokens of each row, likeliest first."""
    logits = logits.astype(jnp.float32)
    values, ids = jax.lax.top_k(logits, count)
    return values - jax.nn.logsumexp(logits, -1, keepdims=True), ids.astype(jnp.int32)


def checked(logits: Float[Array, "rows *steps vocab"], how: Sampling) -> Sampling:
    """Return the parameters in 32 bits, if they are those of these rows."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits have dtype {logits.dtype}; expected a float")
    if not logits.shape[-1]:
        raise ValueError(f"logits have shape {logits.shape}; expected at least one token to choose")
    for name, x in how._asdict().items():
        if x.shape != logits.shape[:1]:
            raise ValueError(f"how.{name} has shape {x.shape}; expected {logits.shape[:1]}, one per row of logits")
        if name in ("top_k", "seed", "position") and not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"how.{name} has dtype {x.dtype}; expected integers")
    temperature, top_p, min_p = (jnp.asarray(x, jnp.float32) for x in (how.temperature, how.top_p, how.min_p))
    seed = jnp.asarray(how.seed, jnp.uint32)
    return Sampling(temperature, int32(how.top_k), top_p, min_p, seed, int32(how.position))


def _large(logits: Float[Array, "rows vocab"]) -> bool:
    return logits.shape[1] > 2 * BLOCK * BLOCKS


def gumbel(
    seed: UInt32[Array, " rows"],
    position: Int[Array, " rows"],
    ids: Int[Array, "rows some"],
    stream: Int[Array, " rows"] | None = None,
) -> Float[Array, "rows some"]:
    """Return the Gumbel noise of some tokens of each row: what `jax.random.gumbel` gives them in a row of any length.

    Threefry is counter-based, so that the noise of a few tokens needs no more than these few. A stream other than 0 is
    independent of the noise that `sample` uses.
    """

    def row(key: jax.Array, ids: jax.Array) -> jax.Array:
        places = ids.astype(jnp.uint32)
        high, low = jnp.split(threefry_2x32(key, jnp.concatenate([jnp.zeros_like(places), places])), 2)
        fraction = jax.lax.bitcast_convert_type(((high ^ low) >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1
        return -jnp.log(-jnp.log(jnp.maximum(fraction, jnp.finfo(jnp.float32).tiny)))

    stream = jnp.zeros(seed.shape, jnp.int32) if stream is None else stream
    return jax.vmap(row)(_keys(seed, position, stream), ids)


def uniform(seed: UInt32[Array, " draws"], position: Int[Array, " draws"], stream: int) -> Float[Array, " draws"]:
    """Return one number in [0, 1) per seed and position, from a stream of its own."""
    keys = _keys(seed, position, jnp.full(seed.shape, stream, jnp.int32))

    def row(key: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.wrap_key_data(key, impl="threefry2x32"), dtype=jnp.float32)

    return jax.vmap(row)(keys)


def _keys(seed: jax.Array, position: jax.Array, stream: jax.Array) -> UInt32[Array, "rows 2"]:
    def row(seed: jax.Array, position: jax.Array, stream: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        other = jax.random.fold_in(key, stream)
        return jnp.where(stream == 0, jax.random.key_data(key), jax.random.key_data(other))

    return jax.vmap(row)(seed, position, stream)
