"""The two programs of an engine as pure functions: chunks and single tokens mixed, or some rows for some steps.

Both run the model's one forward with a paged mixer and sample on the device. Nothing about a request is static: one
program serves every mix of temperatures, filters, seeds, stop tokens and log-probabilities.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dovetail_engine.mixers import DecodeMixer, Held, MixedMixer, stacked_choices
from dovetail_engine.states import Pieces
from dovetail_kernels import Sampling, logprobs, sample, top_logprobs
from dovetail_protocols import LanguageModel

__all__ = ["TOP", "DecodeBatch", "MixedBatch", "Sampled", "chosen", "decode", "mixed"]

TOP = 21
"""The likeliest tokens that a program reports, at most: twenty alternatives and the chosen one."""
Build = Callable[[Any], LanguageModel]


class Sampled(NamedTuple):
    """What the device tells the host: arrays ``[steps, rows]``, the alternatives ``[steps, rows, TOP]``."""

    tokens: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any


class MixedBatch(NamedTuple):
    """Chunks and the newest tokens of other rows, flattened and padded; see `MixedMixer`.

    Attributes:
        tokens: int ``[tokens]``.
        segments: int ``[tokens]``: which chunk or row, from 1; 0 is padding.
        positions: int ``[tokens]``.
        pages: int ``[tokens]``: where each token goes.
        context: int ``[pages]`` of the first chunk's sequence, None in programs without context.
        newest: int ``[rows]``: the places of single tokens, `tokens` where there is none.
        tables: int ``[rows, pages]`` of their sequences.
        lengths: int ``[rows]``, 0 where there is none.
        pieces: the same for recurrent layers.
        last: int ``[rows]``: the places after which a token is sampled.
        tops: whether the alternatives are wanted.
        how: one entry per place.
    """

    tokens: Any
    segments: Any
    positions: Any
    pages: Any
    context: Any
    newest: Any
    tables: Any
    lengths: Any
    pieces: Pieces
    last: Any
    tops: Any
    how: Sampling


class DecodeBatch(NamedTuple):
    """Rows that grow by at most `steps` tokens.

    Attributes:
        tokens: int ``[rows]``, the last token of each.
        lengths: int ``[rows]``: tokens before it.
        context: int ``[rows, pages]``: where those are.
        pages: int ``[rows, room]``: where new ones go.
        slots: int ``[rows]``: where the states of recurrent layers are.
        left: int ``[rows]``: how many tokens a row may grow by; 0 where there is no row.
        stops: int ``[rows, stops]``: tokens that end a row, filled up with -1.
        steps: how many steps, at most `room`.
        tops: whether the alternatives are wanted.
        how: one entry per row; the positions are those of the first tokens to sample.
    """

    tokens: Any
    lengths: Any
    context: Any
    pages: Any
    slots: Any
    left: Any
    stops: Any
    steps: Any
    tops: Any
    how: Sampling


def mixed(build: Build, params: Any, held: Held, batch: MixedBatch) -> tuple[Held, Sampled]:
    """Write chunks and single tokens to the cache and sample the token after each."""
    model = build(params)
    hidden, mixer = _run_mixed(model, held, batch, {} if held.choices is not None else None)
    sampled = _sample(model.unembed(hidden[batch.last]), batch.how, batch.tops)
    page = 1 if held.choices is None else held.choices.shape[1]
    choices = held.noted(stacked_choices(mixer.chosen, held), batch.pages, batch.positions % page)
    return Held(mixer.cache, choices), jax.tree.map(lambda x: x[None], sampled)


def chosen(build: Build, params: Any, held: Held, batch: MixedBatch) -> dict[int, Any]:
    """Return the experts of the tokens by layer; to be traced for their shapes."""
    return dict(_run_mixed(build(params), held, batch, {})[1].chosen or {})


def _run_mixed(model: LanguageModel, held: Held, batch: MixedBatch, chosen: Any) -> tuple[jax.Array, MixedMixer]:
    mixer = MixedMixer(
        held.layers,
        batch.segments,
        batch.positions,
        batch.pages,
        batch.context,
        batch.newest,
        batch.tables,
        batch.lengths,
        batch.pieces,
        chosen,
    )
    hidden, _, mixer = model.hidden(batch.tokens, batch.positions, mixer)
    return hidden, mixer


def decode(build: Build, params: Any, held: Held, batch: DecodeBatch) -> tuple[Held, Sampled]:
    """Run decode steps until all rows are at their end; write their tokens to the cache."""
    model = build(params)
    room, rows = batch.pages.shape[1], len(batch.tokens)
    mixer = DecodeMixer.load(held.layers, batch, room)

    def going(carry: Any) -> jax.Array:
        step, _, left, _, _, _ = carry
        return (step < batch.steps) & jnp.any(left > 0)

    def body(carry: Any) -> Any:
        step, tokens, left, mixer, out, choices = carry
        mixer = dataclasses.replace(mixer, chosen=None if choices is None else {})
        hidden, _, mixer = model.hidden(tokens, batch.lengths + step, mixer)
        if choices is not None:
            now = stacked_choices(mixer.chosen, held).astype(choices.dtype)
            choices = jax.lax.dynamic_update_index_in_dim(choices, now, step, 1)
        how = batch.how._replace(position=batch.how.position + step)
        sampled = _sample(model.unembed(hidden), how, batch.tops)
        out = jax.tree.map(lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, step, 0), out, sampled)
        ended = jnp.any(sampled.tokens[:, None] == batch.stops, 1)
        left = jnp.where(ended, 0, left - 1)
        return step + 1, sampled.tokens, left, DecodeMixer(mixer.work, mixer.lengths, step + 1, room), out, choices

    empty = Sampled(
        jnp.zeros((room, rows), jnp.int32),
        jnp.zeros((room, rows), jnp.float32),
        jnp.zeros((room, rows, TOP), jnp.int32),
        jnp.zeros((room, rows, TOP), jnp.float32),
    )
    kept = None if held.choices is None else jnp.zeros((rows, room, *held.choices.shape[2:]), held.choices.dtype)
    start = (jnp.int32(0), batch.tokens, batch.left, mixer, empty, kept)
    _, _, _, mixer, out, kept = jax.lax.while_loop(going, body, start)
    places = batch.lengths[:, None] + jnp.arange(room, dtype=jnp.int32)
    page = 1 if held.choices is None else held.choices.shape[1]
    return Held(mixer.store(held.layers, batch), held.noted(kept, batch.pages, places % page)), out


def _sample(logits: jax.Array, how: Sampling, tops: jax.Array) -> Sampled:
    tokens = sample(logits, how)
    rows, vocab = logits.shape
    count = min(TOP, vocab)

    def best() -> tuple[jax.Array, jax.Array]:
        values, ids = top_logprobs(logits, count)
        room = ((0, 0), (0, TOP - count))
        return jnp.pad(values, room, constant_values=-jnp.inf), jnp.pad(ids, room)

    def nothing() -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((rows, TOP), jnp.float32), jnp.zeros((rows, TOP), jnp.int32)

    values, ids = jax.lax.cond(tops, best, nothing)
    return Sampled(tokens, logprobs(logits, tokens), ids, values)
