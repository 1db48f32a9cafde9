"""Speculative decoding: drafted tokens are kept or replaced so that the result is distributed as the target says.

Draft x is kept with probability min(1, p(x)/q(x)); the first one that is not is replaced by a draw from max(p - q, 0)
(Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dovetail_kernels._candidates import argmax
from dovetail_kernels._dtypes import int32
from dovetail_kernels._programs import partitioned
from dovetail_kernels.sampling import Sampling, checked, filter_logits, gumbel, uniform

__all__ = ["Verified", "verify_draft"]

_KEEP, _REPLACE = 1, 2  # streams of random numbers besides the one that `sample` uses


class Verified(NamedTuple):
    """What became of drafts.

    Attributes:
        tokens: the kept drafts, then one token of the target's own, then -1.
        kept: how many drafts were kept.
    """

    tokens: Int[Array, "rows drafts+1"]
    kept: Int[Array, " rows"]


def verify_draft(
    drafts: Int[Array, "rows drafts"],
    target_logits: Float[Array, "rows drafts+1 vocab"],
    how: Sampling,
    *,
    draft_logits: Float[Array, "rows drafts vocab"] | None = None,
    lengths: Int[Array, " rows"] | None = None,
) -> Verified:
    """Keep the drafts up to the first that the target rejects, and add one token.

    The tokens are distributed as if `sample` had drawn each from `target_logits`; a row without drafts gives exactly
    its token, and a row of temperature 0 keeps the drafts that are the likeliest tokens. The random numbers are
    independent of those with which `sample` draws drafts at the same seeds and positions.

    Args:
        drafts: proposed tokens; one outside ``[0, vocab)`` is never kept.
        target_logits: the model's, before each draft and after the last one; filtered as `how` says.
        how: per row; `position` is that of the first draft.
        draft_logits: what the drafts were drawn from, already filtered and divided by a temperature, as from
            `filter_logits`. None for drafts that were not drawn, such as those of a lookup.
        lengths: how many drafts each row has; None for all. What lies behind is ignored.

    Raises:
        ValueError: shapes that do not belong together.
        TypeError: as `sample`.

    >>> how = Sampling(*(jnp.asarray([x]) for x in (0.0, 0, 1.0, 0.0, jnp.uint32(0), 0)))
    >>> target = jnp.asarray([[[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])  # likeliest: 1, 0, 2
    >>> verify_draft(jnp.asarray([[1, 2]]), target, how).tokens.tolist()
    [[1, 0, -1]]
    """
    rows, steps = drafts.shape
    vocab = target_logits.shape[-1]
    if target_logits.shape != (rows, steps + 1, vocab):
        raise ValueError(f"target_logits {target_logits.shape}; expected {(rows, steps + 1, 'vocab')}, one after each")
    if draft_logits is not None and draft_logits.shape != (rows, steps, vocab):
        raise ValueError(f"draft_logits {draft_logits.shape}; expected {(rows, steps, vocab)}")
    how = checked(target_logits, how)
    lengths = jnp.full((rows,), steps, jnp.int32) if lengths is None else jnp.clip(int32(lengths), 0, steps)
    given = {"drafts": int32(drafts), "target_logits": target_logits, "how": how, "draft_logits": draft_logits}
    given["lengths"] = lengths
    return partitioned(_verify, given, lambda _, axes: PartitionSpec(axes["target_logits"][0]))


@jax.jit
def _verify(
    drafts: jax.Array, target_logits: jax.Array, how: Sampling, draft_logits: jax.Array | None, lengths: jax.Array
) -> Verified:
    rows, steps = drafts.shape
    vocab = target_logits.shape[-1]
    each = jax.tree.map(lambda x: jnp.repeat(x, steps + 1), how)
    logits = target_logits.reshape(-1, vocab).astype(jnp.float32)
    best = argmax(logits).reshape(rows, steps + 1)
    filtered = filter_logits(logits, each).reshape(target_logits.shape)
    random = (how.temperature > 0)[:, None, None]
    p = jnp.where(random, jax.nn.softmax(filtered, -1), jax.nn.one_hot(best, vocab, dtype=jnp.float32))
    q = _proposal(drafts, draft_logits, lengths, vocab)
    places = how.position[:, None] + jnp.arange(steps, dtype=jnp.int32)
    chance = uniform(jnp.repeat(how.seed, steps), places.reshape(-1), _KEEP).reshape(rows, steps)
    at = drafts[..., None]
    p_draft, q_draft = (jnp.take_along_axis(x[:, :steps], at, -1, mode="clip")[..., 0] for x in (p, q))
    keep = (chance * q_draft < p_draft) & (drafts >= 0) & (drafts < vocab)
    keep &= jnp.arange(steps, dtype=jnp.int32) < lengths[:, None]
    kept = jnp.sum(jnp.cumprod(keep.astype(jnp.int32), -1), -1, dtype=jnp.int32)
    end = kept[:, None]
    own, wanted, drafted = (jnp.take_along_axis(x, end[..., None], 1)[:, 0] for x in (filtered, p, q))
    last = _last(own, wanted, drafted, kept == lengths)
    stream = jnp.where(kept == lengths, 0, _REPLACE)
    noise = gumbel(how.seed, how.position + kept, jax.lax.broadcasted_iota(jnp.int32, (rows, vocab), 1), stream)
    drawn = argmax(jax.lax.optimization_barrier(last + noise))
    token = jnp.where(how.temperature > 0, drawn, jnp.take_along_axis(best, end, -1)[:, 0])
    place = jnp.arange(steps + 1, dtype=jnp.int32)
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(place < end, padded, jnp.where(place == end, token[:, None], -1))
    return Verified(tokens, kept)


def _proposal(
    drafts: Int[Array, "rows drafts"],
    draft_logits: Float[Array, "rows drafts vocab"] | None,
    lengths: Int[Array, " rows"],
    vocab: int,
) -> Float[Array, "rows drafts+1 vocab"]:
    """Return the probabilities that drafts had; all 0 where there is no draft, so that p - q is p."""
    drawn = None if draft_logits is None else jax.nn.softmax(draft_logits.astype(jnp.float32), -1)
    q = jax.nn.one_hot(drafts, vocab, dtype=jnp.float32) if drawn is None else drawn
    there = jnp.arange(drafts.shape[1], dtype=jnp.int32) < lengths[:, None]
    return jnp.pad(jnp.where(there[..., None], q, 0.0), ((0, 0), (0, 1), (0, 0)))


def _last(
    filtered: Float[Array, "rows vocab"],
    p: Float[Array, "rows vocab"],
    q: Float[Array, "rows vocab"],
    own: Bool[Array, " rows"],
) -> Float[Array, "rows vocab"]:
    """Return the logits of the token after the kept drafts: of what p has more than q, or the target's own."""
    rest = jnp.maximum(p - q, 0.0)
    own |= ~jnp.any(rest > 0, -1)  # equal up to rounding
    return jnp.where(own[:, None], filtered, jnp.log(rest))
