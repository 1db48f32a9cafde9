"""The language model kit accepts a good model and rejects each named broken one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import (
    FullCache,
    LanguageModel,
    QuantizedArray,
    RecurrentCache,
    WindowCache,
)
from dovetail_protocols.testing import (
    ConformanceError,
    check_language_model,
)
from dovetail_protocols.testing.recurrence import Fading

FEATURES, HEADS, VOCAB = 8, 2, 11


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCAB, FEATURES), "qkv": (FEATURES, 3 * FEATURES), "out": (FEATURES, FEATURES)}
    tree = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return {**tree, "unembed": jnp.asarray(rng.standard_normal((FEATURES, VOCAB)), jnp.float32)}


def dense(w):
    return w.dequantize() if isinstance(w, QuantizedArray) else w


class Good:
    """Two attention layers, one of them windowed, with a per-token auxiliary loss."""

    vocab_size = VOCAB
    windows = (None, 3)

    def __init__(self, w=None):
        self.w = w or weights()

    def embed(self, tokens):
        return dense(self.w["embed"])[tokens]

    def contract(self, x, name):
        return x @ dense(self.w[name])

    def hidden(self, tokens, positions, mixer, *, embeds=None):
        x = self.embed(tokens) if embeds is None else embeds
        angle = (positions.astype(jnp.float32) * jnp.float32(0.1))[:, None]
        for layer, window in enumerate(self.windows):
            q, k, v = jnp.split(self.contract(x * jnp.cos(angle), "qkv"), 3, axis=-1)
            q, k, v = (t.reshape(-1, HEADS, FEATURES // HEADS) for t in (q, k, v))
            out, mixer = mixer.attend(layer, q, k, v, scale=0.5, window=window)
            x = x + self.contract(out.reshape(x.shape), "out")
        return self.finish(x), self.aux(x), mixer

    def finish(self, x):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def aux(self, x):
        return {"loss/size": (jnp.sum(x**2), jnp.float32(len(x)))}

    def unembed(self, hidden):
        logits = hidden @ dense(self.w["unembed"]) + jnp.float32(0.5)
        return 5 * jnp.tanh(logits / 5)

    def unembedding(self):
        return self.w["unembed"], jnp.full(VOCAB, 0.5), 5.0

    def cache_specs(self):
        return [FullCache(HEADS, 4, 4), WindowCache(HEADS, 4, 4, 3)]


class LeaksTheFuture(Good):
    def finish(self, x):
        return super().finish(x) + 0.01 * jnp.roll(x, -1, 0)


class LeaksThroughAMean(Good):
    def finish(self, x):
        return super().finish(x - x.mean(0))


class ShiftsFromTheRowBefore(Good):
    def finish(self, x):
        return super().finish(x) + 0.01 * jnp.roll(x, 1, 0)


class IgnoresTheMixersMask(Good):
    def finish(self, x):
        return super().finish(jnp.cumsum(x, 0))


class IgnoresPastTokens(Good):
    def finish(self, x):
        return super().finish(jnp.sin(jax.lax.stop_gradient(x) * 0 + 1))


class RandomEachTime(Good):
    count = 0

    def finish(self, x):
        self.count += 1
        return super().finish(x) + 0.001 * self.count


class AuxIsAMean(Good):
    def aux(self, x):
        return {"loss/size": (jnp.mean(x**2), jnp.float32(1))}


class AuxIsBare(Good):
    def aux(self, x):
        return {"loss/size": (jnp.sum(x**2, 0), jnp.float32(1))}


class IgnoresEmbeds(Good):
    def hidden(self, tokens, positions, mixer, *, embeds=None):
        return super().hidden(tokens, positions, mixer)


class AddsEmbeds(Good):
    def hidden(self, tokens, positions, mixer, *, embeds=None):
        both = None if embeds is None else embeds + self.embed(tokens)
        return super().hidden(tokens, positions, mixer, embeds=both)


class TransposedUnembedding(Good):
    def unembedding(self):
        weight, bias, cap = super().unembedding()
        return weight[:, ::-1], bias, cap


class ForgetsTheBias(Good):
    def unembedding(self):
        return self.w["unembed"], None, 5.0


class ForgetsTheCap(Good):
    def unembedding(self):
        return self.w["unembed"], jnp.full(VOCAB, 0.5), None


class CacheForgetsTheWindow(Good):
    def cache_specs(self):
        return [FullCache(HEADS, 4, 4)] * 2


class CacheCountsQueryHeads(Good):
    def cache_specs(self):
        return [FullCache(2 * HEADS, 4, 4), WindowCache(2 * HEADS, 4, 4, 3)]


class CacheMissesALayer(Good):
    def cache_specs(self):
        return super().cache_specs()[:1]


class Recurrent(Good):
    """A recurrent layer besides."""

    def hidden(self, tokens, positions, mixer, *, embeds=None):
        hidden, aux, mixer = super().hidden(tokens, positions, mixer, embeds=embeds)
        gate = jax.nn.sigmoid(hidden[:, 0])
        out, mixer = mixer.recur(2, Fading(jnp.ones(3), jnp.ones(3)), (hidden[:, :3], gate))
        return hidden + jnp.pad(out, ((0, 0), (0, FEATURES - 3))), aux, mixer

    def cache_specs(self):
        return [*super().cache_specs(), Fading(jnp.ones(3), None).cache_spec()]


class CacheOfAnotherState(Recurrent):
    def cache_specs(self):
        return [*super().cache_specs()[:2], RecurrentCache((("total", (3,)),))]


class BatchMajorHidden(Good):
    def finish(self, x):
        return super().finish(x).reshape(2, -1, FEATURES) if len(x) % 2 == 0 else super().finish(x)


class DropsTheMixer(Good):
    def hidden(self, *args, **kwargs):
        hidden, aux, _ = super().hidden(*args, **kwargs)
        return hidden, aux, None


class PaddedVocabulary(Good):
    def unembed(self, hidden):
        return jnp.pad(super().unembed(hidden), ((0, 0), (0, 5)))


class ReadsTheQuantizedValues(Good):
    """Uses the integers and forgets their scale."""

    def contract(self, x, name):
        w = self.w[name]
        return x @ w.qvalue.astype(jnp.float32) if isinstance(w, QuantizedArray) else x @ w


class TablesOfAnotherRow(Good):
    def embed(self, tokens):
        w = self.w["embed"]
        return dense(w)[tokens - 1] if isinstance(w, QuantizedArray) else w[tokens]


MODELS = [
    LeaksTheFuture,
    LeaksThroughAMean,
    ShiftsFromTheRowBefore,
    IgnoresTheMixersMask,
    IgnoresPastTokens,
    RandomEachTime,
    AuxIsAMean,
    AuxIsBare,
    IgnoresEmbeds,
    AddsEmbeds,
    TransposedUnembedding,
    ForgetsTheBias,
    ForgetsTheCap,
    CacheForgetsTheWindow,
    CacheCountsQueryHeads,
    CacheMissesALayer,
    CacheOfAnotherState,
    BatchMajorHidden,
    DropsTheMixer,
    PaddedVocabulary,
    ReadsTheQuantizedValues,
    TablesOfAnotherRow,
]


def check_model(kind):
    check_language_model(kind(), rebuild=lambda transform: kind({k: transform(v) for k, v in weights().items()}))


def test_a_good_model_passes():
    assert isinstance(Good(), LanguageModel)
    check_model(Good)
    check_model(Recurrent)


@pytest.mark.parametrize("mutant", MODELS, ids=lambda kind: kind.__name__)
def test_broken_models_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="LanguageModel: "):
        check_model(mutant)


def test_a_rebuild_without_weights_is_rejected():
    with pytest.raises(ConformanceError, match="rebuild"):
        check_language_model(Good(), rebuild=lambda transform: Good())
