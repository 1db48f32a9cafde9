"""What a request adds to its logits before they are filtered: penalties for tokens that were there, and a bias."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dovetail_kernels._dtypes import int32

__all__ = ["bias_logits", "penalize"]


def penalize(
    logits: Float[Array, "rows vocab"],
    history: Int[Array, "rows length"],
    *,
    prompt: Int[Array, "rows prompt_length"] | None = None,
    repetition: float | Float[Array, " rows"] = 1.0,
    presence: float | Float[Array, " rows"] = 0.0,
    frequency: float | Float[Array, " rows"] = 0.0,
) -> Float[Array, "rows vocab"]:
    """Make tokens that were there less likely.

    Where a token is in the history or the prompt, its logit becomes ``z / repetition`` or, if negative,
    ``z * repetition`` (Keskar et al., arXiv:1909.05858). Then ``presence`` is taken off where it is in the history, and
    ``frequency`` for each time that it is (as in OpenAI's API).

    Args:
        logits: any float dtype; the result is float32.
        history: generated tokens; those outside ``[0, vocab)``, such as -1, are padding.
        prompt: tokens that count for `repetition` only.
        repetition: per row or for all, positive; 1 for none. Arrays are not checked.
        presence: likewise; 0 for none.
        frequency: likewise; 0 for none.

    Raises:
        ValueError: another number of rows, or a `repetition` that is a number but not finite and positive.

    >>> penalize(jnp.asarray([[2.0, -2.0, 1.0]]), jnp.asarray([[0, 0, 1, -1]]), repetition=2.0, frequency=0.5)
    Array([[ 0. , -4.5,  1. ]], dtype=float32)
    """
    rows, vocab = logits.shape
    for name, ids in (("history", history), ("prompt", prompt)):
        if ids is not None and (ids.ndim != 2 or ids.shape[0] != rows):
            raise ValueError(f"{name} has shape {ids.shape}; expected {rows} rows as logits {logits.shape}")
    if isinstance(repetition, float | int) and not 0 < repetition < float("inf"):
        raise ValueError(f"repetition={repetition}; expected a finite positive number, 1 for none")
    logits = logits.astype(jnp.float32)
    count = _counts(history, rows, vocab)
    seen = count > 0
    ever = seen if prompt is None else seen | (_counts(prompt, rows, vocab) > 0)
    factor = _per_row(repetition)
    penalized = jnp.where(ever, jnp.where(logits < 0, logits * factor, logits / factor), logits)
    return penalized - jnp.where(seen, _per_row(presence), 0.0) - _per_row(frequency) * count.astype(jnp.float32)


def bias_logits(
    logits: Float[Array, "rows vocab"],
    bias: Float[Array, "rows some"],
    ids: Int[Array, "rows some"] | None = None,
) -> Float[Array, "rows vocab"]:
    """Add to the logits of every token, or of some.

    Args:
        logits: any float dtype; the result is float32.
        bias: what to add; -inf forbids a token.
        ids: which tokens; those outside ``[0, vocab)``, such as -1, are padding. None for all in order.

    Raises:
        ValueError: shapes that do not fit.

    >>> bias_logits(jnp.zeros((1, 3)), jnp.asarray([[5.0, 1.0]]), jnp.asarray([[2, -1]]))
    Array([[0., 0., 5.]], dtype=float32)
    """
    wanted = logits.shape if ids is None else (logits.shape[0], *ids.shape[1:])
    if bias.shape != wanted or (ids is not None and (ids.ndim != 2 or ids.shape[0] != logits.shape[0])):
        places = "" if ids is None else f", ids {ids.shape}"
        raise ValueError(f"bias has shape {bias.shape}{places}; expected one row per row of logits {logits.shape}")
    logits, bias = logits.astype(jnp.float32), bias.astype(jnp.float32)
    if ids is None:
        return logits + bias
    rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return logits.at[rows, _inside(ids, logits.shape[1])].add(bias, mode="drop")


def _counts(ids: Int[Array, "rows length"], rows: int, vocab: int) -> Int[Array, "rows vocab"]:
    place = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.zeros((rows, vocab), jnp.int32).at[place, _inside(ids, vocab)].add(1, mode="drop")


def _inside(ids: jax.Array, vocab: int) -> jax.Array:
    ids = int32(ids)
    return jnp.where(ids < 0, vocab, ids)


def _per_row(value: Any) -> jax.Array:
    return jnp.asarray(value, jnp.float32).reshape(-1, 1)
