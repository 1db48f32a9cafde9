"""The kits of losses, mixers, models and the weights seam accept good ones and reject each named broken one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import (
    FullCache,
    LanguageModel,
    LossOutput,
    Mixer,
    QuantizedArray,
    Term,
    WindowCache,
    split_rows,
)
from dovetail_protocols.testing import (
    ConformanceError,
    FakeQuantized,
    MixerCase,
    ReferenceMixer,
    attention,
    check_language_model,
    check_loss,
    check_mixer,
    check_quantized,
)

# Losses ---------------------------------------------------------------------------------------------------------

PARAMS = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), jnp.float32), "scale": jnp.float32(1.5)}
WEIGHTS = np.array([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0.5, 1]], np.float32)
BATCH = jax.tree.map(jnp.asarray, split_rows(np.random.default_rng(1).integers(0, 5, (3, 5)), loss_weights=WEIGHTS))


def good_loss(params, batch):
    logits = params["w"][batch.tokens] * params["scale"]
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
    weights = batch.loss_weights
    balance = jnp.sum(jnp.mean(logits**2, axis=(1, 2)))
    right = jnp.sum(jnp.where(logits.argmax(-1) == batch.targets, weights, 0.0))
    aux = {"loss/balance": Term(balance, jnp.float32(len(weights))), "accuracy": Term(right, weights.sum())}
    return LossOutput(-jnp.sum(logp * weights), weights.sum(), aux)


def pre_divided_mean(params, batch):
    out = good_loss(params, batch)
    return out._replace(sum=out.sum / jnp.maximum(out.weight, 1))


def mean_with_weight_one(params, batch):
    return pre_divided_mean(params, batch)._replace(weight=jnp.float32(1))


def weight_depends_on_params(params, batch):
    out = good_loss(params, batch)
    confident = jax.nn.softmax(params["w"][batch.tokens]).max(-1) > 0.5
    return out._replace(weight=jnp.sum(jnp.where(confident, batch.loss_weights, 0.0)) + jnp.sum(batch.loss_weights))


def aux_is_a_batch_mean(params, batch):
    out = good_loss(params, batch)
    term = out.aux["loss/balance"]
    return out._replace(aux={**out.aux, "loss/balance": Term(term.sum / term.weight, jnp.float32(1))})


def aux_across_rows(params, batch):
    """The batch-level form of router balancing: a square of a sum over rows."""
    out = good_loss(params, batch)
    return out._replace(aux={"loss/balance": Term(jnp.sum(params["w"][batch.tokens]) ** 2, out.weight)})


def aux_weight_depends_on_params(params, batch):
    out = good_loss(params, batch)
    return out._replace(aux={"accuracy": Term(out.sum, out.weight + jnp.sum(params["w"]) * len(batch.tokens))})


def gradient_is_nan(params, batch):
    out = good_loss(params, batch)
    distance = jnp.sum(jnp.sqrt((params["scale"] - params["scale"]) ** 2) * batch.loss_weights)
    return out._replace(sum=out.sum + distance)


def aux_gradient_is_nan(params, batch):
    out = good_loss(params, batch)
    bad = jnp.sqrt(params["scale"] - params["scale"]) * len(batch.tokens)
    return out._replace(aux={"loss/bad": Term(bad, out.weight)})


def counts_masked_targets(params, batch):
    out = good_loss(params, batch)
    return out._replace(weight=jnp.float32(batch.tokens.size))


def learns_masked_targets(params, batch):
    return good_loss(params, batch._replace(loss_weights=jnp.ones_like(batch.loss_weights)))


def sum_per_row(params, batch):
    return good_loss(params, batch)._replace(weight=batch.loss_weights.sum(1))


def plain_tuple(params, batch):
    return tuple(good_loss(params, batch))


def infinite(params, batch):
    return good_loss(params, batch)._replace(sum=jnp.float32(np.inf))


COUNTER = [0]


def remembers(params, batch):
    COUNTER[0] += 1
    return good_loss(params, batch)._replace(sum=good_loss(params, batch).sum + COUNTER[0])


def names_depend_on_the_batch(params, batch):
    out = good_loss(params, batch)
    return out._replace(aux={f"rows_{len(batch.tokens)}": Term(out.sum, out.weight)})


LOSSES = [
    pre_divided_mean,
    mean_with_weight_one,
    weight_depends_on_params,
    aux_is_a_batch_mean,
    aux_across_rows,
    aux_weight_depends_on_params,
    gradient_is_nan,
    aux_gradient_is_nan,
    counts_masked_targets,
    learns_masked_targets,
    sum_per_row,
    plain_tuple,
    infinite,
    remembers,
    names_depend_on_the_batch,
]


def test_a_good_loss_passes():
    check_loss(good_loss, PARAMS, BATCH)


@pytest.mark.parametrize("mutant", LOSSES, ids=lambda f: f.__name__)
def test_broken_losses_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="Loss: "):
        check_loss(mutant, PARAMS, BATCH)


def test_one_row_is_not_enough():
    with pytest.raises(ValueError, match="at least two"):
        check_loss(good_loss, PARAMS, jax.tree.map(lambda leaf: leaf[:1], BATCH))


# Mixers ---------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MutantMixer(ReferenceMixer):
    fault: str = dataclasses.field(default="", metadata={"static": True})

    def attend(self, layer, query, key, value, *, scale, window=None):
        fault, inner = self.fault, ReferenceMixer(self.segment_ids)
        if fault == "ignores segments":
            inner = ReferenceMixer(jnp.ones_like(self.segment_ids))
        if fault == "ignores the window":
            window = None
        if fault == "window off by one":
            window = window and window + 1
        if fault == "ignores the scale":
            scale = query.shape[-1] ** -0.5
        if fault == "groups heads interleaved":
            group = query.shape[1] // key.shape[1]
            key, value = (jnp.tile(x, (1, group, 1)) for x in (key, value))
        if fault == "looks into the future":
            key, value = (jnp.roll(x, -1, 0) for x in (key, value))
        out, _ = inner.attend(layer, query, key, value, scale=scale, window=window)
        if fault == "padding is NaN":
            out = jnp.where((self.segment_ids != 0).reshape(-1)[:, None, None], out, jnp.float32(np.nan))
        if fault == "stops gradients":
            out = jax.lax.stop_gradient(out)
        if fault == "half precision":
            out = out.astype(jnp.bfloat16)
        if fault == "batch-major output":
            return out.reshape(*self.segment_ids.shape, *out.shape[1:]), self
        if fault == "another structure":
            return out, (self, jnp.zeros(()))
        return out, self


FAULTS = [
    "ignores segments",
    "ignores the window",
    "window off by one",
    "ignores the scale",
    "groups heads interleaved",
    "looks into the future",
    "padding is NaN",
    "stops gradients",
    "half precision",
    "batch-major output",
    "another structure",
]


def test_a_good_mixer_passes():
    assert isinstance(ReferenceMixer(jnp.ones((1, 1), jnp.int32)), Mixer)
    check_mixer(ReferenceMixer)
    check_mixer(MutantMixer, cases=[MixerCase(heads=6, kv_heads=3, window=2)])


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_mixers_are_rejected(fault):
    with pytest.raises(ConformanceError, match="Mixer: "):
        check_mixer(lambda segments: MutantMixer(segments, fault), cases=[MixerCase(heads=4, window=5)])


def test_a_mixer_without_a_method_is_rejected():
    class Alone:
        def __init__(self, segments):
            self.attend = ReferenceMixer(segments).attend

    with pytest.raises(ConformanceError, match="attend_latent"):
        check_mixer(Alone, cases=[])


def test_reference_attention_of_one_token_is_its_value():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 1, 4)) for _ in range(3))
    np.testing.assert_allclose(attention(q, k, v, np.array([[1, 2, 3]]), scale=1.0), v)
    np.testing.assert_allclose(attention(q, k, v, np.array([[1, 1, 0]]), scale=0.0)[1, 0], v[:2, 0].mean(0))
    assert not attention(q, k, v, np.zeros((1, 3), int), scale=1.0).any()


# Models ---------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("mutant", MODELS, ids=lambda kind: kind.__name__)
def test_broken_models_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="LanguageModel: "):
        check_model(mutant)


def test_a_rebuild_without_weights_is_rejected():
    with pytest.raises(ConformanceError, match="rebuild"):
        check_language_model(Good(), rebuild=lambda transform: Good())


# The weights seam -----------------------------------------------------------------------------------------------


def good_einsum(spec, x, w):
    return jnp.einsum(spec, x, dense(w))


def good_take(w, ids):
    return dense(w)[ids]


def without(field):
    def strip(w):
        return dense(dataclasses.replace(w, **{field: None})) if isinstance(w, QuantizedArray) else w

    return strip


def no_scale(w):
    return w.qvalue.astype(w.dtype) if isinstance(w, QuantizedArray) else w


def first_scale(w):
    if not isinstance(w, QuantizedArray):
        return w
    one = w.scale[(slice(0, 1),) * w.ndim]
    return dense(dataclasses.replace(w, scale=one))


def always_float32(w):
    return dense(dataclasses.replace(w, dtype=jnp.float32)) if isinstance(w, QuantizedArray) else w


def wrap_int8(w):
    """Keeps the integers in int8, where zero points overflow."""
    if not isinstance(w, QuantizedArray) or w.zero_point is None:
        return dense(w)
    return dense(dataclasses.replace(w, qvalue=w.qvalue.astype(jnp.int8), zero_point=w.zero_point.astype(jnp.int8)))


SEAMS = {
    "ignores the zero point": without("zero_point"),
    "ignores the scale": no_scale,
    "reads only the first scale": first_scale,
    "overflows in int8": wrap_int8,
}


def test_a_good_seam_passes():
    check_quantized(good_einsum, good_take)


@pytest.mark.parametrize("fault", SEAMS)
@pytest.mark.parametrize("part", ["einsum", "take"])
def test_broken_seams_are_rejected(fault, part):
    read = SEAMS[fault]
    einsum = (lambda spec, x, w: jnp.einsum(spec, x, read(w))) if part == "einsum" else good_einsum
    take = (lambda w, ids: read(w)[ids]) if part == "take" else good_take
    with pytest.raises(ConformanceError, match=f"Seam: .*{part}"):
        check_quantized(einsum, take)


def test_other_broken_seams_are_rejected():
    def wide(spec, x, w):
        return jnp.einsum(spec, x.astype(jnp.float32), always_float32(w).astype(jnp.float32))

    def blind(spec, x, w):
        return (
            jax.lax.stop_gradient(good_einsum(spec, x, w)) if isinstance(w, QuantizedArray) else good_einsum(spec, x, w)
        )

    for einsum, rule in ((wide, "logical dtype"), (blind, "gradient of x")):
        with pytest.raises(ConformanceError, match=rule):
            check_quantized(einsum, good_take)
    with pytest.raises(ConformanceError, match="take"):
        check_quantized(good_einsum, lambda w, ids: dense(w)[jnp.minimum(ids, 7)])


def test_fake_quantized_holds_the_same_numbers_twice():
    tree = {"a": {"w": weights()["qkv"], "half": weights()["out"].astype(jnp.bfloat16)}, "bias": jnp.ones(3)}
    twins = FakeQuantized.of(tree)
    for name in ("w", "half"):
        quantized, plain = twins.quantized["a"][name], twins.dense["a"][name]
        assert isinstance(quantized, QuantizedArray)
        assert plain.dtype == tree["a"][name].dtype
        np.testing.assert_array_equal(quantized.dequantize(), plain)
        scale = np.asarray(quantized.scale)
        error = np.abs(np.asarray(plain, np.float32) - np.asarray(tree["a"][name], np.float32))
        assert (error <= scale * 0.51).all()
        assert (np.log2(scale) % 1 == 0).all()
    assert twins.quantized["bias"] is tree["bias"]
    chosen = FakeQuantized.of(tree, ["a/w"]).quantized
    assert isinstance(chosen["a"]["w"], QuantizedArray)
    assert not isinstance(chosen["a"]["half"], QuantizedArray)
    assert float(FakeQuantized.of(jnp.zeros((2, 2))).dense.max()) == 0
