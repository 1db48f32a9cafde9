"""The mixer kit accepts a good mixer and rejects each named broken one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import (
    Mixer,
    QuantizedArray,
)
from dovetail_protocols.testing import (
    ConformanceError,
    MixerCase,
    ReferenceMixer,
    attention,
    check_mixer,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MutantMixer(ReferenceMixer):
    fault: str = dataclasses.field(default="", metadata={"static": True})

    def attend(self, layer, query, key, value, *, scale, window=None, softcap=None, sinks=None):
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
        if fault == "ignores the soft cap":
            softcap = None
        if fault == "ignores sinks":
            sinks = None
        if fault == "looks into the future":
            key, value = (jnp.roll(x, -1, 0) for x in (key, value))
        out, _ = inner.attend(layer, query, key, value, scale=scale, window=window, softcap=softcap, sinks=sinks)
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

    def attend_latent(self, layer, query, latent, rope_key, expand, *, scale):
        fault, ids, nope = self.fault.partition("latents: ")[2], self.segment_ids, expand[0].shape[2]
        if fault == "segments are one":
            ids = jnp.ones_like(ids)
        if fault == "another scale":
            scale = query.shape[-1] ** -0.5
        if fault == "no rotary part":
            rope_key = jnp.zeros_like(rope_key)
        if fault == "rotary part first":
            query = jnp.concatenate([query[..., nope:], query[..., :nope]], -1)
        if fault == "the future":
            latent = jnp.roll(latent, -1, 0)
        if fault == "one value for all heads":
            expand = expand[0], jnp.broadcast_to(expand[1][:, :1], expand[1].shape)
        if fault == "fixed expansions":
            expand = jax.lax.stop_gradient(expand)
        if fault == "quantized ones as stored":
            expand = tuple(x.qvalue.astype(x.dtype) if isinstance(x, QuantizedArray) else x for x in expand)
        out, _ = ReferenceMixer(ids).attend_latent(layer, query, latent, rope_key, expand, scale=scale)
        if fault == "NaN for padding":
            out = jnp.where((self.segment_ids != 0).reshape(-1, 1, 1), out, jnp.float32(np.nan))
        if fault == "flat heads":
            return out.reshape(len(out), -1), self
        return out, (self, jnp.zeros(())) if fault == "another structure" else self

    def recur(self, layer, recurrence, inputs):
        fault, ids = self.fault, self.segment_ids
        if fault == "state outlives its segment":
            ids = jnp.where(ids != 0, 1, 0)
        if fault == "padding is a token":
            ids = jnp.maximum(ids, 1)
        if fault == "state of another row":
            ids = ids.reshape(1, -1)
        if fault == "runs backwards":
            inputs = tuple(x[::-1] for x in inputs)
        if fault == "fixed parameters":
            recurrence = jax.lax.stop_gradient(recurrence)
        if fault == "fixed inputs":
            inputs = jax.lax.stop_gradient(inputs)
        out, _ = ReferenceMixer(ids).recur(layer, recurrence, inputs)
        if fault == "NaN for padding":
            out = jnp.where((self.segment_ids != 0).reshape(-1, 1), out, jnp.float32(np.nan))
        if fault == "rows of time":
            return out.reshape(*self.segment_ids.shape, -1), self
        return out, (self, jnp.zeros(())) if fault == "state in the mixer" else self

    def totals(self, values):
        rows = super().totals(values)
        if self.fault == "totals of rows":
            return values.reshape(*self.segment_ids.shape, -1).sum(1)
        if self.fault == "totals with padding":
            return MutantMixer(self.segment_ids + 1).totals(values)
        if self.fault == "totals of one row only":
            return rows[: self.segment_ids.shape[1]]
        if self.fault == "totals batch-major":
            return rows.reshape(*self.segment_ids.shape, -1)
        return rows

    def choose(self, layer, experts):
        if self.fault == "choose sorts":
            return jnp.sort(experts, axis=1), self
        if self.fault == "choose forgets one":
            return experts[:, 1:], self
        return experts, (self, jnp.zeros(())) if self.fault == "choose keeps experts" else self


FAULTS = [
    "ignores segments",
    "ignores the window",
    "ignores the soft cap",
    "ignores sinks",
    "window off by one",
    "ignores the scale",
    "groups heads interleaved",
    "looks into the future",
    "padding is NaN",
    "stops gradients",
    "half precision",
    "batch-major output",
    "another structure",
    "totals of rows",
    "totals with padding",
    "totals of one row only",
    "totals batch-major",
]

LATENT_FAULTS = [
    "segments are one",
    "another scale",
    "no rotary part",
    "rotary part first",
    "the future",
    "one value for all heads",
    "fixed expansions",
    "quantized ones as stored",
    "NaN for padding",
    "flat heads",
    "another structure",
]

RECUR_FAULTS = [
    "state outlives its segment",
    "padding is a token",
    "state of another row",
    "runs backwards",
    "fixed parameters",
    "fixed inputs",
    "NaN for padding",
    "rows of time",
    "state in the mixer",
]


def test_a_good_mixer_passes():
    assert isinstance(ReferenceMixer(jnp.ones((1, 1), jnp.int32)), Mixer)
    check_mixer(ReferenceMixer)
    check_mixer(MutantMixer, cases=[MixerCase(heads=6, kv_heads=3, window=2, softcap=0.7, sinks=True)])


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_mixers_are_rejected(fault):
    case = MixerCase(heads=4, window=5, softcap=0.7, sinks=True)
    with pytest.raises(ConformanceError, match="Mixer: "):
        check_mixer(lambda segments: MutantMixer(segments, fault), cases=[case])


@pytest.mark.parametrize("fault", LATENT_FAULTS)
def test_broken_latent_attention_is_rejected(fault):
    with pytest.raises(ConformanceError, match=r"Mixer: .*attend_latent"):
        check_mixer(lambda segments: MutantMixer(segments, f"latents: {fault}"), cases=[])


@pytest.mark.parametrize("fault", RECUR_FAULTS)
def test_broken_recurrences_of_mixers_are_rejected(fault):
    with pytest.raises(ConformanceError, match=r"Mixer: .*recur"):
        check_mixer(lambda segments: MutantMixer(segments, fault), cases=[])


@pytest.mark.parametrize("fault", ["choose sorts", "choose forgets one", "choose keeps experts"])
def test_broken_choices_of_experts_are_rejected(fault):
    with pytest.raises(ConformanceError, match=r"Mixer: .*choose"):
        check_mixer(lambda segments: MutantMixer(segments, fault), cases=[])


def test_a_mixer_may_offer_attention_alone():
    class Attends(ReferenceMixer):
        def attend_latent(self, *args, **options):
            raise NotImplementedError("Attends.attend_latent")

        def recur(self, layer, recurrence, inputs):
            raise NotImplementedError("Attends.recur")

    check_mixer(Attends, cases=[])


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
