"""Auxiliary values of a router: losses that balance experts, and how it chooses.

The balancing loss is additive: it is made of each sequence's own counts (DeepSeek-V3, arXiv:2412.19437, eq. 17-20) and
weighed with the sequence's tokens. What is made of the counts of all tokens is called ``..._per_micro_batch``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_kernels import Routing
from dovetail_models.router import Router
from dovetail_protocols import Auxiliary

__all__ = ["has_sums", "real_tokens", "router_terms"]


class Counts(NamedTuple):
    """Sums over the tokens of each sequence, ``[sequences, experts]`` and ``[sequences, 1]``.

    Attributes:
        chosen: tokens that chose an expert.
        shares: shares of experts in the tokens' scores.
        tokens: how many.
        z: squared log-sum-exps of the logits.
        entropy: of the shares, in nats.
    """

    chosen: jax.Array
    shares: jax.Array
    tokens: jax.Array
    z: jax.Array
    entropy: jax.Array


def router_terms(router: Router, logits: jax.Array, routing: Routing, mixer: Any) -> Auxiliary:
    """Return what the router's `Selection` asks for; losses with their coefficients.

    ``loss/balance``, ``loss/router_z`` and ``loss/switch_per_micro_batch`` as there; ``loss/correction`` is 0, with a
    gradient. Statistics are, for a token, ``router/entropy`` of its scores in nats; and for a layer
    ``router/load_max_per_micro_batch``, the fullest expert's tokens relative to the mean, and
    ``router/unused_per_micro_batch``, the share of experts without any.

    Args:
        router: which chose.
        logits: of the tokens.
        routing: of the tokens.
        mixer: knows the sequences, see `dovetail_protocols.Mixer.totals`.
    """
    select, training = router.select, router.select.training
    if not (select.balance or training.z_coef or training.switch_coef or training.correct or training.statistics):
        return {}
    counts = _counts(logits, routing, mixer)
    whole = Counts(*(jnp.sum(x, axis=0) for x in counts))
    tokens = whole.tokens[0]
    terms = dict[str, tuple[jax.Array, jax.Array]]()
    if select.balance:
        terms["loss/balance"] = select.balance * jnp.sum(_uneven(counts, select.top_k)), tokens
    if training.switch_coef:
        terms["loss/switch_per_micro_batch"] = training.switch_coef * _uneven(whole, select.top_k), tokens
    if training.z_coef:
        terms["loss/router_z"] = training.z_coef * whole.z[0], tokens
    if training.correct:
        terms["loss/correction"] = _pull(router.correction.get_value(), whole.chosen), tokens
    if training.statistics:
        one, chosen = jnp.ones_like(tokens), whole.chosen
        mean = jnp.maximum(jnp.mean(chosen), jnp.finfo(chosen.dtype).tiny)
        terms["router/entropy"] = whole.entropy[0], tokens
        terms["router/load_max_per_micro_batch"] = jnp.max(chosen) / mean, one
        terms["router/unused_per_micro_batch"] = jnp.mean((chosen == 0).astype(chosen.dtype)), one
    return terms


def _counts(logits: jax.Array, routing: Routing, mixer: Any) -> Counts:
    count = routing.scores.shape[1]
    total = jnp.sum(routing.scores, axis=1, keepdims=True)
    shares = routing.scores / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
    chosen = jnp.sum(jax.nn.one_hot(routing.experts, count, dtype=shares.dtype), axis=1)
    z = jax.nn.logsumexp(logits.astype(shares.dtype), axis=1, keepdims=True) ** 2
    entropy = jnp.sum(jax.scipy.special.entr(shares), axis=1, keepdims=True)
    totals = mixer.totals(jnp.concatenate([chosen, shares, jnp.ones_like(z), z, entropy], axis=1))
    return Counts(*jnp.split(totals, [count, 2 * count, 2 * count + 1, 2 * count + 2], axis=1))


def _uneven(counts: Counts, top_k: int) -> jax.Array:
    """Return ``tokens * experts * sum(counts / (tokens * top_k) * probabilities)``; tokens where all are used alike."""
    products = jnp.sum(counts.chosen * counts.shares, axis=-1)
    return products / jnp.maximum(counts.tokens[..., 0], 1) * (counts.chosen.shape[-1] / top_k)


def _pull(correction: jax.Array, chosen: jax.Array) -> jax.Array:
    """Return 0 with the gradient ``chosen - mean(chosen)``."""
    surplus = jax.lax.stop_gradient(chosen - jnp.mean(chosen)).astype(correction.dtype)
    product = jnp.sum(correction * surplus)
    return product - jax.lax.stop_gradient(product)


def has_sums(mixer: Any, count: int) -> bool:
    """Tell whether a mixer sums over the sequences of so many tokens; one that serves does not."""
    return jax.eval_shape(mixer.totals, jax.ShapeDtypeStruct((count, 1), jnp.float32)).shape[0] > 0


def real_tokens(mixer: Any, count: int) -> jax.Array:
    """Return which of so many tokens are no padding, bool ``[tokens]``: those that sums of sequences depend on."""
    sums, pull = jax.vjp(mixer.totals, jnp.ones((count, 1), jnp.float32))
    return pull(jnp.ones_like(sums))[0][:, 0] > 0
