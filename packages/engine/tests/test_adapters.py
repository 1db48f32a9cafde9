"""If these fail, an engine has to be made again for another adapter, or serves another one than it was given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_toys import check_greedy, tiny
from flax import nnx

from dovetail_models import LORA, add_lora, lora_of, merge, merge_lora, split, swap_lora, with_lora
from dovetail_protocols import Request, SamplingParams, paths
from dovetail_protocols.testing import FakeQuantized

WEIGHTS = ["layers/*/attention/{query,key,value,out}", "layers/*/mlp/*", "embedding", "head"]
PROMPTS = [(1, 2, 3), (7, 30, 12, 44, 9)]


def adapter(base, patterns, seed, **options):
    """Return an adapter that changes replies."""
    definition, params = split(add_lora(base, patterns, rngs=nnx.Rngs(seed), **options))
    flat, rng = paths.flatten(params), np.random.default_rng(seed)
    drawn = {a: jnp.asarray(rng.normal(0, 0.3, flat[a].shape), jnp.float32) for a in paths.select(params, LORA)}
    return lora_of(merge(definition, paths.update(params, drawn)))


@pytest.mark.thin(2)
@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_take_turns_in_one_engine(quantized, make_engine, compilations):
    """Other ranks, scales and weights, and none: nothing is compiled, and each gives the merged model's tokens."""
    build, params = tiny()
    twins = FakeQuantized.of(params, WEIGHTS) if quantized else FakeQuantized(params, params)
    dense, base = build(twins.dense), build(twins.quantized)
    slots = add_lora(base, WEIGHTS, rank=4, rngs=nnx.Rngs(0))
    definition, first = split(slots)
    engine = make_engine(functools.partial(merge, definition), first)
    adapters = [
        adapter(dense, WEIGHTS, 1, rank=4, alpha=2.0),
        adapter(dense, ["layers/1/mlp/up", "layers/0/attention/*", "head"], 2, rank=1, alpha=1.5),
        None,
    ]
    swapped = [split(swap_lora(slots, one))[1] for one in adapters]
    requests = [Request(prompt=p, sampling=SamplingParams(max_tokens=9, temperature=0.0, logprobs=0)) for p in PROMPTS]
    engine.generate(requests)
    compilations.clear()
    replies = []
    for version, new in enumerate(swapped, 1):
        engine.update_params(new, version, copy=version == 1)
        replies.append(engine.generate(requests))
    assert not compilations
    for one, done in zip(adapters, replies, strict=True):
        wanted = dense if one is None else merge_lora(with_lora(dense, one))
        compared = sum(check_greedy(p, d, build, split(wanted)[1]) for p, d in zip(PROMPTS, done, strict=True))
        assert compared > 12
    assert len({tuple(done[0].token_ids) for done in replies}) == 3


def test_an_adapter_of_another_form_is_refused(make_engine):
    """One that was put on, not swapped, would need other programs; the base is borrowed, and not copied."""
    build, params = tiny()
    base = build(params)
    slots = add_lora(base, "layers/*/mlp/up", rank=4, rngs=nnx.Rngs(0))
    definition, first = split(slots)
    engine = make_engine(functools.partial(merge, definition), first)
    other = adapter(base, "layers/*/mlp/up", 1, rank=2)
    with pytest.raises(ValueError, match=r"mlp'\]\['up'\]\.[ab] is float32\[\S+, \S+\]; expected"):
        engine.update_params(split(with_lora(base, other))[1], 1)
    swapped = split(swap_lora(slots, other))[1]
    engine.update_params(swapped, 1, copy=False)
    shared = jax.tree.map(lambda a, b: a is b, swapped, first)
    assert sum(not same for same in jax.tree.leaves(shared)) == 2 * 2  # a and b of two layers
