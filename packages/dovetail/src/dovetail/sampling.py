"""Sampling without a cache: one whole forward per token, enough to see what a small model has learned."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_kernels import DenseMixer
from dovetail_models import merge
from dovetail_protocols import Tokenizer

__all__ = ["sample"]


def sample(
    definition: Any,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int = 96,
    temperature: float = 0.7,
    seed: int = 0,
) -> list[str]:
    """Continue each prompt and return prompt and continuation, which ends early at an end token.

    Raises:
        ValueError: a prompt encodes to nothing, or `temperature` is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a positive number")
    starts = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(starts):
        raise ValueError(f"prompts={list(prompts)}; each must have at least one token")
    width = max(map(len, starts)) + tokens
    rows = np.zeros((len(starts), width), np.int32)
    for row, ids in zip(rows, starts, strict=True):
        row[: len(ids)] = ids
    lengths = jnp.asarray([len(ids) for ids in starts], jnp.int32)
    run = jax.jit(_continue, static_argnums=(0, 5))
    filled = np.asarray(run(definition, params, jnp.asarray(rows), lengths, jax.random.key(seed), tokens, temperature))
    return [_text(tokenizer, row[: len(ids) + tokens], len(ids)) for row, ids in zip(filled, starts, strict=True)]


def _continue(
    definition: Any, params: Any, rows: jax.Array, lengths: jax.Array, key: jax.Array, tokens: int, temperature: float
) -> jax.Array:
    """Append `tokens` sampled tokens to every row ``[rows, width]``; row r begins at ``lengths[r]``."""
    model = merge(definition, params)
    count, width = rows.shape
    positions = jnp.tile(jnp.arange(width, dtype=jnp.int32), count)

    def append(i: Any, rows: jax.Array) -> jax.Array:
        hidden, _, _ = model.hidden(rows.reshape(-1), positions, DenseMixer.of(rows))
        at = jnp.arange(count, dtype=jnp.int32)
        last = hidden.reshape(count, width, -1)[at, lengths + i - 1]
        chosen = jax.random.categorical(jax.random.fold_in(key, i), model.unembed(last) / temperature)
        return rows.at[at, lengths + i].set(chosen.astype(rows.dtype))

    return jax.lax.fori_loop(0, tokens, append, rows)


def _text(tokenizer: Tokenizer, ids: np.ndarray[Any, Any], prompt: int) -> str:
    end = next((i for i in range(prompt, len(ids)) if int(ids[i]) in tokenizer.eos_ids), len(ids))
    return tokenizer.decode([int(i) for i in ids[:end]])
