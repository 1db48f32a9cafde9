"""Kit of `LanguageModel`: one forward whose tokens see only their own past, whoever mixes them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_protocols.model import FullCache, LanguageModel, LatentCache, WindowCache
from dovetail_protocols.testing._rules import close_to, difference, require
from dovetail_protocols.testing.quantized import FakeQuantized
from dovetail_protocols.testing.reference import ReferenceMixer
from dovetail_protocols.weight import as_array

__all__ = ["check_language_model"]

MakeMixer = Callable[[Any], Any]
Rebuild = Callable[[Callable[[Any], Any]], LanguageModel]


def check_language_model(
    model: LanguageModel,
    *,
    make_mixer: MakeMixer = ReferenceMixer,
    time: int = 8,
    rebuild: Rebuild | None = None,
    tolerance: float = 1e-4,
) -> None:
    """Check a language model of small shapes and random parameters.

    Args:
        model: the model.
        make_mixer: ``make_mixer(segment_ids[batch, time])`` returns the dense mixer to inject.
        time: the length of the rows that are tried, at least 4.
        rebuild: ``rebuild(transform)`` returns the model with ``transform(leaf)`` in place of every weight that goes
            through the `einsum`/`take` seam; with it the kit compares quantized weights with dense ones of the same
            values.
        tolerance: of hidden states and logits, relative to the largest value.

    Raises:
        ConformanceError: a rule is broken.
    """
    run = _Run(model, make_mixer, time, tolerance)
    tokens = run.tokens()
    _check_shapes(run, tokens)
    _check_caches(run, tokens)
    _check_unembedding(run, tokens)
    _check_causal(run, tokens)
    _check_rows(run, tokens)
    _check_packed(run, tokens)
    _check_embeds(run, tokens)
    _check_pure(run, tokens)
    if rebuild is not None:
        _check_quantized(run, rebuild, tokens)


@dataclasses.dataclass(frozen=True)
class _Run:
    model: LanguageModel
    make_mixer: MakeMixer
    time: int
    tolerance: float

    def tokens(self, seed: int = 0) -> np.ndarray:
        """Two rows of random ids."""
        return np.random.default_rng(seed).integers(0, self.model.vocab_size, (2, self.time)).astype(np.int32)

    @functools.cached_property
    def compiled(self) -> Callable[..., Any]:
        def hidden(tokens: Any, positions: Any, mixer: Any, embeds: Any) -> Any:
            return self.model.hidden(tokens, positions, mixer, **({} if embeds is None else {"embeds": embeds}))

        return jax.jit(hidden)

    def arguments(self, tokens: np.ndarray, segments: Any = None, positions: Any = None) -> tuple[Any, Any, Any]:
        """The positional arguments of `hidden`; by default every row is one document."""
        segments = np.ones(tokens.shape, np.int32) if segments is None else segments
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        places = places if positions is None else positions
        flat = jnp.asarray(tokens.reshape(-1)), jnp.asarray(places.reshape(-1))
        return *flat, self.make_mixer(jnp.asarray(segments))

    def __call__(self, tokens: np.ndarray, embeds: Any = None, **given: Any) -> tuple[Any, Any, Any]:
        return self.compiled(*self.arguments(tokens, **given), embeds)

    def states(self, tokens: np.ndarray, **given: Any) -> np.ndarray:
        """Hidden states as float32 ``[batch, time, features]``."""
        hidden = np.asarray(self(tokens, **given)[0].astype(jnp.float32))
        return hidden.reshape(*tokens.shape, hidden.shape[-1])

    def compare(self, rule: str, got: Any, expected: Any, **values: Any) -> None:
        error = close_to(got, expected, self.tolerance)
        require(error is None, rule, error=error, **values)


def _check_shapes(run: _Run, tokens: np.ndarray) -> None:
    hidden, aux, mixer = run(tokens)
    rule = "LanguageModel: hidden is [tokens, features], rows flattened with the batch outermost"
    require(hidden.ndim == 2 and hidden.shape[0] == tokens.size, rule, shape=hidden.shape, tokens=tokens.size)
    require(np.isfinite(hidden.astype(jnp.float32)).all(), "LanguageModel: hidden states are finite")
    logits = run.model.unembed(hidden)
    expected = (tokens.size, run.model.vocab_size)
    require(
        logits.shape == expected, "LanguageModel: unembed gives [tokens, vocab]", shape=logits.shape, expected=expected
    )
    for name, term in aux.items():
        scalar = len(term) == 2 and all(jnp.shape(value) == () for value in term)
        require(scalar, "LanguageModel: aux is {name: (scalar sum, scalar weight)}", name=name, term=term)
    before = jax.tree.structure(run.make_mixer(jnp.ones(tokens.shape, jnp.int32)))
    same = jax.tree.structure(mixer) == before
    require(same, "LanguageModel: the third result is the mixer after the last layer", mixer=type(mixer).__name__)


def _check_pure(run: _Run, tokens: np.ndarray) -> None:
    first, second = (run.model.hidden(*run.arguments(tokens))[:2] for _ in range(2))
    diff = difference(second, first)
    require(diff is None, "LanguageModel: the same call gives the same bits", diff=diff)
    run.compare("LanguageModel: it gives under jit what it gives without", run(tokens)[0], first[0])


@jax.tree_util.register_pytree_node_class
class _Recorder:
    """A mixer that notes each call and passes it on."""

    def __init__(self, inner: Any, calls: list[tuple[int, Any]]) -> None:
        self.inner, self.calls = inner, calls

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        return (self.inner,), _Identity(self.calls)

    @classmethod
    def tree_unflatten(cls, aux: "_Identity", children: tuple[Any]) -> "_Recorder":
        return cls(children[0], aux.calls)

    def attend(
        self, layer: int, query: Any, key: Any, value: Any, *, window: int | None = None, **options: Any
    ) -> tuple[Any, "_Recorder"]:
        shape = (key.shape[1], key.shape[2], value.shape[2])
        self.calls.append((layer, FullCache(*shape) if window is None else WindowCache(*shape, window)))
        out, inner = self.inner.attend(layer, query, key, value, window=window, **options)
        return out, _Recorder(inner, self.calls)

    def attend_latent(
        self, layer: int, query: Any, latent: Any, rope_key: Any, expand: Any, *, scale: float
    ) -> tuple[Any, "_Recorder"]:
        self.calls.append((layer, LatentCache(latent.shape[1], rope_key.shape[1])))
        out, inner = self.inner.attend_latent(layer, query, latent, rope_key, expand, scale=scale)
        return out, _Recorder(inner, self.calls)

    def recur(self, layer: int, recurrence: Any, inputs: Any) -> tuple[Any, "_Recorder"]:
        self.calls.append((layer, recurrence.cache_spec()))
        out, inner = self.inner.recur(layer, recurrence, inputs)
        return out, _Recorder(inner, self.calls)

    def totals(self, values: Any) -> Any:
        return self.inner.totals(values)

    def choose(self, layer: int, experts: Any) -> tuple[Any, "_Recorder"]:
        chosen, inner = self.inner.choose(layer, experts)
        return chosen, _Recorder(inner, self.calls)


@dataclasses.dataclass(frozen=True, eq=False)
class _Identity:
    calls: list[tuple[int, Any]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.calls is other.calls

    def __hash__(self) -> int:
        return id(self.calls)


def _check_caches(run: _Run, tokens: np.ndarray) -> None:
    specs = list(run.model.cache_specs())
    calls: list[tuple[int, Any]] = []
    ids, positions, mixer = run.arguments(tokens)
    jax.eval_shape(run.model.hidden, ids, positions, _Recorder(mixer, calls))
    rule = "LanguageModel: cache_specs says, in layer order, what each layer gives its mixer"
    require(calls == list(enumerate(specs)), rule, specs=specs, calls=calls)


def _check_causal(run: _Run, tokens: np.ndarray) -> None:
    base = run.states(tokens)
    for place in (run.time // 2, run.time - 1):
        changed = tokens.copy()
        changed[0, place] = (changed[0, place] + 1) % run.model.vocab_size
        states = run.states(changed)
        rule = "LanguageModel: a token sees itself and its past, never the future or another row"
        run.compare(rule, states[0, :place], base[0, :place], changed=(0, place), seen_by="earlier tokens")
        run.compare(rule, states[1], base[1], changed=(0, place), seen_by="the other row")
        moved = [float(np.abs(states[0, at] - base[0, at]).max()) for at in range(place, run.time)]
        require(all(moved), "LanguageModel: a token's own and later states depend on it", place=place, changes=moved)


def _check_rows(run: _Run, tokens: np.ndarray) -> None:
    whole, parts = run(tokens), [run(row[None]) for row in tokens]
    joined = jnp.concatenate([part[0] for part in parts])
    run.compare("LanguageModel: a row gives the same alone and among others", joined, whole[0])
    for name, term in whole[1].items():
        total = [sum(float(part[1][name][i]) for part in parts) for i in range(2)]
        run.compare("LanguageModel: aux sums and weights are additive over rows", total, jnp.stack(term), name=name)


def _check_packed(run: _Run, tokens: np.ndarray) -> None:
    cut = run.time // 2
    lengths = [cut, run.time - cut]
    segments = np.repeat(np.array([[1, 2]], np.int32), lengths, axis=1)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])[None]
    packed = run.states(tokens[:1], segments=segments, positions=positions)
    alone = [run.states(tokens[:1, part]) for part in (slice(0, cut), slice(cut, None))]
    rule = "LanguageModel: documents packed into one row give what each gives alone"
    run.compare(rule, packed, np.concatenate(alone, axis=1))


def _check_embeds(run: _Run, tokens: np.ndarray) -> None:
    features = run(tokens)[0].shape[-1]
    rng = np.random.default_rng(2)
    embeds = [jnp.asarray(rng.standard_normal((tokens.size, features)), run(tokens)[0].dtype) for _ in range(2)]
    first, other_ids = run.states(tokens, embeds=embeds[0]), run.states(run.tokens(1), embeds=embeds[0])
    run.compare("LanguageModel: embeds replace the lookup of tokens", other_ids, first)
    other = run.states(tokens, embeds=embeds[1])
    require((other != first).any(), "LanguageModel: embeds replace the lookup of tokens", effect="none")


def _check_unembedding(run: _Run, tokens: np.ndarray) -> None:
    hidden = run(tokens)[0]
    weight, bias, cap = run.model.unembedding()
    logits = np.asarray(hidden, np.float64) @ np.asarray(as_array(weight), np.float64)
    logits = logits if bias is None else logits + np.asarray(bias, np.float64)
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    rule = "LanguageModel: unembed(hidden) is softcap(hidden @ W + bias) with what unembedding() returns"
    run.compare(rule, run.model.unembed(hidden), logits)


def _check_quantized(run: _Run, rebuild: Rebuild, tokens: np.ndarray) -> None:
    seen: list[Any] = []

    def quantize(leaf: Any) -> Any:
        seen.append(leaf)
        return FakeQuantized.of(leaf).quantized

    dense = dataclasses.replace(run, model=rebuild(lambda leaf: FakeQuantized.of(leaf).dense))
    quantized = dataclasses.replace(run, model=rebuild(quantize))
    require(seen, "LanguageModel: rebuild passes the weights through the transform")
    rule = "LanguageModel: quantized weights give what dense weights of the same values give"
    run.compare(rule, quantized.states(tokens), dense.states(tokens))
    hidden = dense(tokens)[0]
    run.compare(f"{rule} (logits)", quantized.model.unembed(hidden), dense.model.unembed(hidden))
    _check_unembedding(quantized, tokens)
