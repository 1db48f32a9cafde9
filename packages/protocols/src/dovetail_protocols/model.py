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
    "LayerIndex",
    "Mixer",
    "Recurrence",
    "RecurrentCache",
    "WindowCache",
    "add_auxiliary",
]

LayerIndex: TypeAlias = int | jax.Array
"""The index of a layer; traced, where layers run as a loop."""

Auxiliary: TypeAlias = Mapping[str, tuple[jax.Array, jax.Array]]
"""Auxiliary losses as ``{name: (sum, weight)}``, additive over rows; returned by a forward, never sown."""


def add_auxiliary(one: Auxiliary, other: Auxiliary) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the sums and weights of both, added up where both have a name.

    >>> add_auxiliary({"loss/balance": (1.0, 2.0)}, {"loss/balance": (3.0, 4.0), "dropped": (5.0, 6.0)})
    {'loss/balance': (4.0, 6.0), 'dropped': (5.0, 6.0)}
    """
    both = {name: (one[name][0] + other[name][0], one[name][1] + other[name][1]) for name in one if name in other}
    return {**one, **other, **both}


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
    """A layer with state of fixed size per sequence: names and shapes of its arrays, see `Recurrence`."""

    state: tuple[tuple[str, tuple[int, ...]], ...]


CacheSpec: TypeAlias = FullCache | WindowCache | LatentCache | RecurrentCache


@runtime_checkable
class Recurrence(Protocol):
    """What a recurrent layer does along a sequence; a pytree whose leaves are the layer's arrays.

    It knows nothing of batches and caches: `Mixer.recur` calls it with the inputs that the layer gave, split into rows,
    and with the state of each row, ``{name: array[rows, *shape]}`` as `cache_spec` says. A sequence begins with a state
    of zeros. Mixers keep states in float32, whatever the dtype of the activations; a state that is returned may have
    another float dtype. Rows are independent of each other, and a sequence may be cut anywhere: both forms continue
    what either of them began.
    """

    def cache_spec(self) -> RecurrentCache:
        """Return names and shapes of a sequence's state."""
        ...

    def chunk(
        self,
        state: Mapping[str, Float[Array, "rows ..."]],
        inputs: tuple[Float[Array, "rows time ..."], ...],
        segment_ids: Int[Array, "rows time"] | None,
    ) -> tuple[Float[Array, "rows time ..."], Mapping[str, Float[Array, "rows ..."]]]:
        """Run many tokens per row; return their outputs and the state after the last of each row.

        Args:
            state: what came before; it belongs to the first segment of a row.
            inputs: what the layer gave for each token.
            segment_ids: the state is zero again where the id changes. Tokens of segment 0 are padding, wherever they
                stand: whatever their inputs are, NaN included, they leave the state as it is, and their outputs are
                finite. None is one segment per row without padding.
        """
        ...

    def step(
        self, state: Mapping[str, Float[Array, "rows ..."]], inputs: tuple[Float[Array, "rows ..."], ...]
    ) -> tuple[Float[Array, "rows ..."], Mapping[str, Float[Array, "rows ..."]]]:
        """Run one token per row; return its output and the state after it."""
        ...


@runtime_checkable
class Mixer(Protocol):
    """Mixes the tokens of each sequence with one another; the only holder of rows, segments, pages and caches.

    A mixer is a pytree. Each method returns its output and the mixer after the call, because a serving mixer carries
    the cache that the call has written; a dense one returns itself. `layer` is the index of the calling layer.
    A mixer that does not offer a method raises NotImplementedError naming it.

    A mixer whose class has ``per_layer = False`` returns itself, and `layer` may be traced, as from a loop over stacked
    layers. Without that attribute the model calls it layer by layer, with an int.
    """

    def attend(
        self,
        layer: LayerIndex,
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
        layer: LayerIndex,
        query: Float[Array, "tokens heads key_dim"],
        latent: Float[Array, "tokens latent_dim"],
        rope_key: Float[Array, "tokens rope_dim"],
        expand: tuple[Any, Any],
        *,
        scale: float,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "Mixer"]:
        """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), causal within each sequence.

        A head's key is the expanded latent of a token, followed by the rotary key that all heads share; its value is
        another expansion of the same latent. A mixer expands the latents (naive), or caches them and multiplies the
        query and the mixed latents with the expansions instead (absorbed); the numbers are the same.

        Args:
            layer: index of the calling layer, as in `LanguageModel.cache_specs`, which has a `LatentCache` there.
            query: one vector per token and head: `nope_dim` features, then `rope_dim` that are rotated.
            latent: one vector per token, normalised.
            rope_key: one vector per token, rotated.
            expand: weights ``[latent_dim, heads, nope_dim]`` of the keys and ``[latent_dim, heads, value_dim]`` of the
                values; each is a `dovetail_protocols.Weight`.
            scale: factor of the logits.
        """
        ...

    def totals(self, values: Float[Array, "tokens values"]) -> Float[Array, "sequences values"]:
        """Return the sums of values over the tokens of each sequence, for auxiliary losses that are per sequence.

        Padding counts nowhere. There may be more rows than sequences; those are 0. A serving mixer, whose sequences
        are spread over many calls and which nobody asks for losses, returns no rows.
        """
        ...

    def choose(self, layer: LayerIndex, experts: Int[Array, "tokens k"]) -> tuple[Int[Array, "tokens k"], "Mixer"]:
        """Return the experts that tokens go to, where a router has chosen these.

        Most mixers return what they are given. One that knows what tokens chose before, as when a sampler's tokens are
        trained on (router replay, arXiv:2510.11370), returns that, with -1 for tokens that choose now; one that samples
        may keep what it is given.

        Args:
            layer: index of the calling layer.
            experts: of each token, the best first.
        """
        ...

    def recur(
        self, layer: LayerIndex, recurrence: Recurrence, inputs: tuple[Float[Array, "tokens ..."], ...]
    ) -> tuple[Float[Array, "tokens ..."], "Mixer"]:
        """Run a recurrence within each sequence, from the state that the mixer holds of it.

        Training holds none: every segment begins with zeros. Serving begins with the state after the tokens that the
        sequence had before, and keeps the state after the new ones. Ragged sequences are for the mixer to cut, to pad
        and to put together into the rows of `Recurrence.chunk`, single tokens into those of `Recurrence.step`.

        Args:
            layer: index of the calling layer, as in `LanguageModel.cache_specs`, which has the recurrence's there.
            recurrence: what to run.
            inputs: as `recurrence` takes them.
        """
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

        ``W`` is a `dovetail_protocols.Weight`.
        """
        ...

    def cache_specs(self) -> Sequence[CacheSpec]:
        """Return what each layer's mixer call must remember, in layer order."""
        ...
