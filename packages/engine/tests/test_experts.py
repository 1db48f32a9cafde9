"""An engine that keeps experts tells those that a plain forward chooses, so that the same can be trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_toys import VOCAB, tiny
from flax import nnx
from test_equality import requests

from dovetail_engine import Engine, EngineOptions
from dovetail_kernels import DenseMixer
from dovetail_models import Qwen3Moe, Qwen3MoeConfig, merge, split
from dovetail_protocols import Request, SamplingParams

LAYERS, TOP = 3, 2


@functools.cache
def sparse():
    """Return (build, params) of a model with experts in its second layer alone."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, features=32, hidden=48, expert_hidden=24, layers=LAYERS, heads=4, kv_heads=2, experts=8,
        top_k=TOP, dense_layers=(0, 2), renormalize=True, init_std=0.4, max_position=128,
    )  # fmt: skip
    definition, params = split(Qwen3Moe(config, rngs=nnx.Rngs(0)))
    return functools.partial(merge, definition), params


@dataclasses.dataclass
class Noting:
    """Keeps what routers choose, and leaves the rest to a dense mixer."""

    inner: DenseMixer
    kept: dict

    def attend(self, layer, query, key, value, **options):
        return self.inner.attend(layer, query, key, value, **options)[0], self

    def choose(self, layer, experts):
        self.kept[layer] = experts
        return experts, self


@functools.cache
def forward():
    """Return a jitted function of 64 tokens to their experts, [layers, 64, k]."""
    build, params = sparse()

    @jax.jit
    def run(tokens):
        kept, places = {}, jnp.arange(64, dtype=jnp.int32)
        build(params).hidden(tokens, places, Noting(DenseMixer.of(tokens[None]), kept))
        return jnp.stack([kept.get(layer, jnp.full((64, TOP), -1)) for layer in range(LAYERS)])

    return run


def chosen(tokens):
    """Return the experts of a row, [layers, tokens, k]."""
    padded = np.zeros(64, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(forward()(jnp.asarray(padded)))[:, : len(tokens)]


@pytest.mark.thin(2)
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"chunk_tokens": 7, "page_size": 1, "decode_steps": 1},
        {"cache_tokens": 64, "chunk_tokens": 64},
    ],
    ids=["plain", "small pieces", "preemption"],
)
def test_experts_of_prompt_and_reply(schedule, make_engine):
    """A token's experts that stand at another's place train other experts than those that sampled it."""
    engine = make_engine(*sparse(), keep_experts=True, **schedule)
    asked = requests(6, longest=8, reply=40)
    for request, done in zip(asked, engine.generate(asked), strict=True):
        row = [*request.prompt, *done.token_ids][:-1]
        assert done.experts.shape == (LAYERS, len(row), TOP)
        assert done.experts.dtype == np.int32
        assert (done.experts == chosen(row)).mean() > 0.99  # two experts may be as good as one another
        assert (done.experts[[0, 2]] == -1).all()
    if "cache_tokens" in schedule:
        assert engine.stats()["preemptions"] > 0


def test_they_are_trained_with(make_engine):
    """The log-probabilities of a forward with the sampler's experts are the sampler's."""
    build, params = sparse()
    engine = make_engine(build, params, keep_experts=True)
    how = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0)
    done = engine.generate([Request(prompt=[3, 5, 8], sampling=how)])[0]
    row = jnp.asarray([3, 5, 8, *done.token_ids], jnp.int32)
    mixer = DenseMixer.of(row[None, :-1], choices=jnp.asarray(done.experts))
    model = build(params)
    hidden, _, _ = model.hidden(row[:-1], jnp.arange(len(row) - 1, dtype=jnp.int32), mixer)
    logits = jax.nn.log_softmax(model.unembed(hidden), axis=1)[2:]
    expected = np.take_along_axis(np.asarray(logits), np.asarray(row[3:, None]), axis=1)[:, 0]
    np.testing.assert_allclose([entry.value for entry in done.logprobs], expected, atol=1e-4)


def test_as_much_is_read_as_a_reply_needs(make_engine):
    """A short reply costs the transfer of the longest one, or a long one is cut."""
    engine = make_engine(*sparse(), keep_experts=True, max_length=300)
    sizes = {key[2] for key in engine.programs if key[0] == "experts"}
    assert sizes == {256, 300}
    del engine.programs.table[("experts", 0, 300)]
    how = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    done = engine.generate([Request(prompt=[1, 2, 3], sampling=how)])[0]
    assert done.experts.shape == (LAYERS, 6, TOP)


def test_experts_that_cannot_be_read_fail_their_request_alone(make_engine):
    """An exception behind the step stops the engine and ends every request."""
    engine = make_engine(*sparse(), keep_experts=True)
    read, failures = engine._runner.experts, []

    def fail(pages, count):
        if not failures:
            failures.append(count)
            raise MemoryError("injected")
        return read(pages, count)

    engine._runner.experts = fail
    asked = [
        Request(prompt=[1, 2], sampling=SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True))
        for count in (3, 9)
    ]
    bad, good = engine.generate(asked)
    assert (bad.finish_reason, bad.error, bad.experts) == ("error", "MemoryError: injected", None)
    assert bad.token_ids == good.token_ids[:3]
    assert (good.finish_reason, good.experts.shape) == ("length", (LAYERS, 10, TOP))
    assert engine.generate(asked[:1])[0].finish_reason == "length"
    assert engine.stats()["errors"] == 1


def test_none_are_told_unless_asked_for(make_engine):
    """They cost memory; a model without any is refused."""
    how = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    assert make_engine(*sparse()).generate([Request(prompt=[1], sampling=how)])[0].experts is None
    with pytest.raises(ValueError, match="keep_experts=True, but no layer of the model has experts"):
        Engine(*tiny(), options=EngineOptions(max_length=16, keep_experts=True))
