"""LanguageModel and Mixer: one forward for training, log-probabilities and serving.

What differs between the three is who mixes tokens: training injects a dense mixer, an engine a paged one. The model
never sees batches of rows, pages or caches. Outside the mixer activations are tokens-major, ``[tokens, features]``,
rows flattened with the batch outermost.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

__all__ = [
    "Auxiliary",
    "CacheSpec",
    "FullCache",
    "LanguageModel",
    "LatentCache",
    "Mixer",
    "RecurrentCache",
    "WindowCache",
]

Auxiliary: TypeAlias = Mapping[str, tuple[jax.Array, jax.Array]]
"""Auxiliary losses as ``{name: (sum, weight)}``, additive over rows; returned by a forward, never sown."""


@dataclasses.dataclass(frozen=True)
class FullCache:
    """A layer that attends to every earlier token: per token ``kv_heads * (key_dim + value_dim)`` numbers."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True)
class WindowCache:
    """A layer that attends to the last `window` tokens, itself included."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """A layer with multi-head latent attention: per token one latent and one shared rotary key."""

    latent_dim: int
    rope_dim: int


@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """A layer with state of fixed size per sequence: ``{name: shape}`` of its arrays."""

    state: tuple[tuple[str, tuple[int, ...]], ...]


CacheSpec: TypeAlias = FullCache | WindowCache | LatentCache | RecurrentCache


@runtime_checkable
class Mixer(Protocol):
    """Mixes the tokens of each sequence with one another; the only holder of rows, segments, pages and caches.

    A mixer is a pytree. Each method returns its output and the mixer after the call, because a serving mixer carries
    the cache that the call has written; a dense one returns itself. `layer` is the index of the calling layer.
    A mixer that does not offer a method raises NotImplementedError naming it.
    """

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
    ) -> tuple[Float[Array, "tokens heads value_dim"], "Mixer"]:
        """Causal attention within each sequence; positions are already rotated into query and key.

        Args:
            layer: index of the calling layer, as in `LanguageModel.cache_specs`.
            query: one vector per token and head; ``heads`` is a multiple of ``kv_heads``.
            key: one vector per token and key-value head.
            value: one vector per token and key-value head.
            scale: factor of the logits.
            window: how many last tokens a token sees, itself included; None for all.
            softcap: logits become ``softcap * tanh(logits / softcap)``.
            sinks: a logit per head that takes part in the softmax only (arXiv:2309.17453).
        """
        ...

    def attend_latent(
        self,
        layer: int,
        query: Float[Array, "tokens heads key_dim"],
        latent: Float[Array, "tokens latent_dim"],
        rope_key: Float[Array, "tokens rope_dim"],
        expand: Any,
        *,
        scale: float,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "Mixer"]:
        """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

        `expand` holds the up-projection ``[latent_dim, heads, nope_dim + value_dim]``; a mixer applies it to the
        cached latents or absorbs it into the query, with the same result.
        """
        ...

    def recur(self, layer: int, kernel: Any, *inputs: Any) -> tuple[Any, "Mixer"]:
        """Run a recurrent layer: `kernel` has ``chunk(state, *inputs)`` and ``step(state, *inputs)`` forms."""
        ...


@runtime_checkable
class LanguageModel(Protocol):
    """An autoregressive model whose forward is parametrised by a mixer."""

    vocab_size: int

    def hidden(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        mixer: Any,
        *,
        embeds: Float[Array, "tokens features"] | None = None,
    ) -> tuple[Float[Array, "tokens features"], Auxiliary, Any]:
        """Return the final hidden states, the auxiliary losses and the mixer after the last layer.

        Args:
            tokens: token ids of all sequences, flattened.
            positions: position of each token in its document.
            mixer: see `Mixer`.
            embeds: input vectors that replace the embedding lookup of `tokens`.
        """
        ...

    def unembed(self, hidden: Float[Array, "tokens features"]) -> Float[Array, "tokens vocab"]:
        """Return the logits of hidden states."""
        ...

    def unembedding(self) -> tuple[Any, Any | None, float | None]:
        """Return ``(W[features, vocab], bias[vocab] or None, soft cap or None)`` for losses that chunk the logits.

        ``W`` may be a QuantizedArray.
        """
        ...

    def cache_specs(self) -> Sequence[CacheSpec]:
        """Return what each layer's mixer call must remember, in layer order."""
        ...
