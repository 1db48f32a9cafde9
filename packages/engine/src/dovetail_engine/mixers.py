"""Mixers over a paged cache, what a model's forward is given in place of the dense mixer of training.

The cache of a layer is two arrays ``[pages, kv_heads, page_size, dim]``, or one ``[pages, 1, page_size, dim]`` of
latents with their rotary keys. A mixed step attends inside its chunks, and
from single tokens to the pages of their sequences; all are written to their pages. Decode works for several steps on
copies of its sequences' pages, with room for the new tokens at the end, ``[rows, kv_heads, context + steps, dim]``;
afterwards `DecodeMixer.store` writes the new ones to their pages. What recurrent layers keep is in `states`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dovetail_engine.states import Pieces, advance, run_pieces
from dovetail_kernels import einsum, gather_pages, paged_attention, paged_latent_attention, update_pages
from dovetail_protocols import Recurrence

__all__ = ["Cache", "DecodeMixer", "Held", "MixedMixer", "stacked_choices"]

Cache = tuple[Any, ...]
"""Keys and values of every layer, latents alone, or the `States` of a recurrent one."""
_HIDDEN = -1e30  # finite: a row that sees nothing must not become NaN


class Held(NamedTuple):
    """What an engine holds of all sequences.

    Attributes:
        layers: what each layer looks at.
        choices: int16 ``[pages, page_size, layers, k]``, the experts of each token; None where they are not kept.
    """

    layers: Cache
    choices: Any = None

    def noted(self, chosen: Any, pages: jax.Array, slots: jax.Array) -> Any:
        """Return the choices with those of tokens, ``[tokens, layers, k]``, that have these pages and slots."""
        if self.choices is None:
            return None
        return self.choices.at[pages, slots].set(chosen.astype(self.choices.dtype))


def stacked_choices(chosen: Mapping[int, jax.Array] | None, held: Held) -> Any:
    """Return the choices of all layers, ``[tokens, layers, k]``; -1 in layers without; None where none are kept."""
    if held.choices is None or not chosen:
        return None
    absent = jnp.full_like(next(iter(chosen.values())), -1)
    return jnp.stack([chosen.get(layer, absent) for layer in range(held.choices.shape[2])], 1)


class _Mixer:
    def totals(self, values: Float[Array, "tokens values"]) -> Float[Array, "sequences values"]:
        """Return no rows: whoever serves wants no losses. See `dovetail_protocols.Mixer.totals`."""
        return values[:0]

    def choose(self, layer: int, experts: Int[Array, "tokens k"]) -> tuple[Int[Array, "tokens k"], Any]:
        """Return the router's choice, and note it where choices are kept. See `dovetail_protocols.Mixer.choose`."""
        mixer: Any = self
        if mixer.chosen is None:
            return experts, self
        return experts, dataclasses.replace(mixer, chosen={**mixer.chosen, layer: experts})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedMixer(_Mixer):
    """Attention of chunks of several sequences and of the newest tokens of others, all flattened.

    The first chunk may continue a sequence whose start is cached. A newest token is a chunk of its own to the others,
    and reads its sequence from the pages.

    Attributes:
        cache: of all layers.
        segments: int ``[tokens]``: which sequence, from 1; 0 is padding.
        positions: int ``[tokens]``.
        pages: int ``[tokens]``: the page that each token goes to.
        context: int ``[pages]`` of the first sequence's start, or None where no chunk continues one.
        newest: int ``[rows]``: where the newest token of each decoding sequence stands; `tokens` where there is none.
        tables: int ``[rows, pages_per_row]`` of these sequences.
        lengths: int ``[rows]``: how many tokens they have, the newest included; 0 where there is none.
        pieces: the same chunks and single tokens, as recurrent layers run them; None in models without.
        chosen: the experts of the tokens by layer, so far; None where they are not kept.
    """

    cache: Cache
    segments: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]
    pages: Int[Array, " tokens"]
    context: Int[Array, " pages"] | None
    newest: Int[Array, " rows"]
    tables: Int[Array, "rows pages_per_row"]
    lengths: Int[Array, " rows"]
    pieces: Pieces | None = None
    chosen: Mapping[int, jax.Array] | None = None

    def recur(
        self, layer: int, recurrence: Recurrence, inputs: tuple[Float[Array, "tokens ..."], ...]
    ) -> tuple[Float[Array, "tokens ..."], "MixedMixer"]:
        """See `dovetail_protocols.Mixer.recur`."""
        assert self.pieces is not None
        out, pool = run_pieces(recurrence, self.cache[layer], inputs, self.pieces)
        slots = self.pieces.newest
        newest = tuple(x.at[self.newest].get(mode="clip") for x in inputs)
        alone, state = advance(recurrence, {name: held[slots] for name, held in pool.items()}, newest)
        pool = {name: held.at[slots].set(state[name]) for name, held in pool.items()}
        cache = (*self.cache[:layer], pool, *self.cache[layer + 1 :])
        return out.at[self.newest].set(alone, mode="drop"), dataclasses.replace(self, cache=cache)

    def attend(
        self,
        layer: int,
        query: Float[Array, "tokens heads key_dim"],
        key: Float[Array, "tokens kv_heads key_dim"],
        value: Float[Array, "tokens kv_heads value_dim"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "MixedMixer"]:
        """See `dovetail_protocols.Mixer.attend`."""
        return self._attend(layer, query, (key, value), _Logits(scale, softcap, sinks, window))

    def attend_latent(
        self,
        layer: int,
        query: Float[Array, "tokens heads key_dim"],
        latent: Float[Array, "tokens latent_dim"],
        rope_key: Float[Array, "tokens rope_dim"],
        expand: tuple[Any, Any],
        *,
        scale: float,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "MixedMixer"]:
        """See `dovetail_protocols.Mixer.attend_latent`: absorbed, all heads read the one cached vector of a token."""
        absorbed, token = _absorbed(query, latent, rope_key, expand[0])
        mixed, mixer = self._attend(layer, absorbed, (token,), _Logits(scale))
        return einsum("thl,lhv->thv", mixed[..., : latent.shape[1]], expand[1]), mixer

    def _attend(
        self, layer: int, query: jax.Array, new: tuple[jax.Array, ...], kind: "_Logits"
    ) -> tuple[jax.Array, "MixedMixer"]:
        """Attend to what is cached and new: keys and values, or one array that is both."""
        pools = self.cache[layer]
        slots = self.positions % pools[0].shape[2]
        pools = tuple(update_pages(pool, x, self.pages, slots) for pool, x in zip(pools, new, strict=True))
        mixed = self._chunks(pools, query, new, kind)
        alone = self._alone(pools, query.at[self.newest].get(mode="clip"), kind)
        cache = (*self.cache[:layer], pools, *self.cache[layer + 1 :])
        return mixed.at[self.newest].set(alone, mode="drop"), dataclasses.replace(self, cache=cache)

    def _alone(self, pools: tuple[Any, ...], newest: jax.Array, kind: "_Logits") -> jax.Array:
        if len(pools) == 1:
            latents = jnp.squeeze(pools[0], 1)
            width = latents.shape[2]
            return paged_latent_attention(
                newest, latents, self.tables, self.lengths, latent_dim=width, scale=kind.scale
            )
        keys, values = pools
        return paged_attention(newest, keys, values, self.tables, self.lengths, **kind._asdict())

    def _chunks(
        self, pools: tuple[Any, ...], query: jax.Array, new: tuple[jax.Array, ...], kind: "_Logits"
    ) -> Float[Array, "tokens heads value_dim"]:
        near = tuple(x.astype(pool.dtype).transpose(1, 0, 2) for x, pool in zip(new, pools, strict=True))
        seen = self._inside(kind.window)
        if self.context is not None:
            near = tuple(jnp.concatenate([self._held(pool), x], 1) for x, pool in zip(near, pools, strict=True))
            seen = jnp.concatenate([self._before(pools[0].shape[2], kind.window), seen], 1)
        near_k, near_v = near[0], near[-1]
        grouped = _groups(query, near_k.shape[0]).transpose(1, 2, 0, 3)  # [kv_heads, group, tokens, dim]
        products = jnp.einsum("kgtd,ksd->kgts", grouped, near_k.astype(query.dtype))
        weights, total = kind.softmax(products, seen, (*grouped.shape[:2], 1, 1))
        mixed = jnp.einsum("kgts,ksd->kgtd", weights.astype(query.dtype), near_v.astype(query.dtype)) / total
        return mixed.astype(query.dtype).transpose(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _inside(self, window: int | None) -> jax.Array:
        """Return which token sees which token of the chunks."""
        distance = self.positions[:, None] - self.positions[None]
        seen = (self.segments[:, None] == self.segments[None]) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    def _held(self, pool: jax.Array) -> Float[Array, "kv_heads places dim"]:
        """Return the first sequence's cached positions, and 0 beyond them."""
        assert self.context is not None
        return gather_pages(pool, self.context[None], self.positions[:1])[0]

    def _before(self, page_size: int, window: int | None) -> jax.Array:
        """Return which token sees which cached position of the first sequence."""
        assert self.context is not None
        places = jnp.arange(self.context.shape[0] * page_size, dtype=jnp.int32)[None]
        seen = (self.segments == 1)[:, None] & (places < self.positions[0])
        return seen if window is None else seen & (self.positions[:, None] - places < window)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeMixer(_Mixer):
    """Attention of one token per row to the row's context and to the tokens that this program made before.

    Attributes:
        work: per layer, keys and values ``[rows, kv_heads, context + steps, dim]``, or latents; states
            ``[rows, *shape]`` where it is recurrent.
        lengths: int ``[rows]``: cached tokens per row when the program began.
        step: how many tokens it made before this one.
        steps: room for new tokens.
        chosen: the experts of the tokens by layer, so far; None where they are not kept.
    """

    work: Cache
    lengths: Int[Array, " rows"]
    step: Int[Array, ""]
    steps: int = dataclasses.field(metadata={"static": True})
    chosen: Mapping[int, jax.Array] | None = None

    @classmethod
    def load(cls, cache: Cache, batch: Any, steps: int) -> "DecodeMixer":
        """Copy what a `DecodeBatch` needs of the cache, with room for `steps` tokens per row; 0 beyond its tokens."""

        def gather(pool: jax.Array) -> jax.Array:
            held = gather_pages(pool, batch.context, batch.lengths)
            return jnp.pad(held, ((0, 0), (0, 0), (0, steps), (0, 0)))

        def copy(held: Any) -> Any:
            if isinstance(held, dict):
                return {name: pool[batch.slots] for name, pool in held.items()}
            return tuple(gather(pool) for pool in held)

        return cls(tuple(copy(held) for held in cache), batch.lengths, jnp.int32(0), steps)

    def store(self, cache: Cache, batch: Any) -> Cache:
        """Return the cache with the new tokens, and the states after them, of all rows of a `DecodeBatch`."""
        places = self.lengths[:, None] + jnp.arange(self.steps, dtype=jnp.int32)

        def scatter(pool: Any, work: jax.Array) -> Any:
            new = work[:, :, -self.steps :].transpose(0, 2, 1, 3)  # [rows, steps, kv_heads, dim]
            new = new.reshape(-1, *new.shape[2:])
            return update_pages(pool, new, batch.pages.reshape(-1), (places % pool.shape[2]).reshape(-1))

        def put(held: Any, work: Any) -> Any:
            if isinstance(held, dict):
                return {name: pool.at[batch.slots].set(work[name]) for name, pool in held.items()}
            return tuple(scatter(pool, new) for pool, new in zip(held, work, strict=True))

        return tuple(put(held, work) for held, work in zip(cache, self.work, strict=True))

    def recur(
        self, layer: int, recurrence: Recurrence, inputs: tuple[Float[Array, "rows ..."], ...]
    ) -> tuple[Float[Array, "rows ..."], "DecodeMixer"]:
        """See `dovetail_protocols.Mixer.recur`."""
        out, state = advance(recurrence, self.work[layer], inputs)
        work = (*self.work[:layer], state, *self.work[layer + 1 :])
        return out, dataclasses.replace(self, work=work)

    def attend(
        self,
        layer: int,
        query: Float[Array, "rows heads key_dim"],
        key: Float[Array, "rows kv_heads key_dim"],
        value: Float[Array, "rows kv_heads value_dim"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "rows heads value_dim"], "DecodeMixer"]:
        """See `dovetail_protocols.Mixer.attend`."""
        return self._attend(layer, query, (key, value), _Logits(scale, softcap, sinks, window))

    def attend_latent(
        self,
        layer: int,
        query: Float[Array, "rows heads key_dim"],
        latent: Float[Array, "rows latent_dim"],
        rope_key: Float[Array, "rows rope_dim"],
        expand: tuple[Any, Any],
        *,
        scale: float,
    ) -> tuple[Float[Array, "rows heads value_dim"], "DecodeMixer"]:
        """See `dovetail_protocols.Mixer.attend_latent`: absorbed, all heads read the one cached vector of a token."""
        absorbed, token = _absorbed(query, latent, rope_key, expand[0])
        mixed, mixer = self._attend(layer, absorbed, (token,), _Logits(scale))
        return einsum("thl,lhv->thv", mixed[..., : latent.shape[1]], expand[1]), mixer

    def _attend(
        self, layer: int, query: jax.Array, new: tuple[jax.Array, ...], kind: "_Logits"
    ) -> tuple[jax.Array, "DecodeMixer"]:
        """Attend to what was copied and is new: keys and values, or one array that is both."""
        context = self.work[layer][0].shape[2] - self.steps
        at = (0, 0, context + self.step, 0)
        held = tuple(
            jax.lax.dynamic_update_slice(old, x[:, :, None].astype(old.dtype), at)
            for old, x in zip(self.work[layer], new, strict=True)
        )
        grouped = _groups(query, new[0].shape[1])
        products = jnp.einsum("rkgd,rksd->rkgs", grouped, held[0].astype(query.dtype))
        seen = self._seen(context, kind.window)[:, None, None]
        weights, total = kind.softmax(products, seen, (1, *grouped.shape[1:3], 1))
        mixed = jnp.einsum("rkgs,rksd->rkgd", weights.astype(query.dtype), held[-1].astype(query.dtype)) / total
        work = (*self.work[:layer], held, *self.work[layer + 1 :])
        return mixed.astype(query.dtype).reshape(*query.shape[:2], -1), dataclasses.replace(self, work=work)

    def _seen(self, context: int, window: int | None) -> jax.Array:
        old = jnp.arange(context, dtype=jnp.int32)[None]
        new = jnp.arange(self.steps, dtype=jnp.int32)[None]
        here = (self.lengths + self.step)[:, None]
        seen_old, seen_new = old < self.lengths[:, None], new <= self.step
        if window is not None:
            seen_old = seen_old & (here - old < window)
            seen_new = seen_new & (self.step - new < window)
        return jnp.concatenate([seen_old, jnp.broadcast_to(seen_new, (len(self.lengths), self.steps))], 1)


def _groups(query: jax.Array, kv_heads: int) -> jax.Array:
    """Return ``[tokens, kv_heads, group, dim]``."""
    tokens, heads, dim = query.shape
    return query.reshape(tokens, kv_heads, heads // kv_heads, dim)


def _absorbed(
    query: jax.Array, latent: jax.Array, rope_key: jax.Array, expand: Any
) -> tuple[Float[Array, "tokens heads dim"], Float[Array, "tokens 1 dim"]]:
    """Return the query for latents in place of keys, and what is cached: the latent and the rotary key of a token."""
    nope = query.shape[2] - rope_key.shape[1]
    inner = einsum("thn,lhn->thl", query[..., :nope], expand)
    token = jnp.concatenate([latent, rope_key], axis=-1)[:, None]
    return jnp.concatenate([inner, query[..., nope:]], axis=-1), token


class _Logits(NamedTuple):
    """How products of queries and keys become weights, and which keys count."""

    scale: float
    softcap: float | None = None
    sinks: jax.Array | None = None
    window: int | None = None

    def softmax(self, products: jax.Array, seen: jax.Array, heads: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        """Return exponentials and their sums: fewer numbers are divided after the product with the values.

        Args:
            products: keys last.
            seen: which of them count.
            heads: shape that the sinks need.
        """
        logits = products.astype(jnp.float32) * self.scale
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        logits = jnp.where(seen, logits, _HIDDEN)
        peak = jnp.max(logits, -1, keepdims=True)
        if self.sinks is None:
            weights = jnp.exp(logits - peak)
            return weights, jnp.sum(weights, -1, keepdims=True)
        sinks = self.sinks.astype(jnp.float32).reshape(heads)
        peak = jnp.maximum(peak, sinks)
        weights = jnp.exp(logits - peak)
        return weights, jnp.sum(weights, -1, keepdims=True) + jnp.exp(sinks - peak)
