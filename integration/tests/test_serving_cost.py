"""What serving computes beyond what the tokens need: every step of the benchmark's load, priced without running it."""

import functools

import engine as subject
import jax
import numpy as np
import pytest
import workload
from flax import nnx

from dovetail_engine import Engine, EngineOptions
from dovetail_engine.runner import Runner
from dovetail_engine.steps import TOP, Sampled, decode, mixed
from dovetail_models import Llama, LlamaConfig, merge, split
from dovetail_profile import cost
from dovetail_protocols import Request, SamplingParams

LIMIT = 1.3
C = subject.MODEL
LENGTH = subject.LOAD["prompt"] + subject.LOAD["output"]
TURN = LENGTH  # places that paged attention looks at in one turn: all that a lone row's table has


@functools.cache
def model():
    """Return (build, params) with zeros in the place of weights."""
    config = LlamaConfig(
        vocab_size=C["vocab"],
        features=C["d"],
        hidden=C["ff"],
        layers=C["layers"],
        heads=C["heads"],
        kv_heads=C["kv_heads"],
    )
    definition, params = split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), params)
    return functools.partial(merge, definition), zeros


class Priced:
    """Stands for an engine's programs: adds up what each would compute, and answers with token 1."""

    prices = {}  # noqa: RUF012  (the same program costs the same in every test)

    def __init__(self, keys):
        self.keys, self.flops, self.calls = set(keys), 0, []

    def __call__(self, key, params, cache, batch):
        assert key in self.keys
        name, size, _ = key
        trips = 1 if name == "mixed" else min(int(batch.steps), int(batch.left.max()))
        self.flops += trips * self.price(key, params, cache, batch)
        self.calls.append((*key, trips))
        shape = (1, len(batch.last)) if name == "mixed" else (batch.pages.shape[1], size)
        none = np.zeros((*shape, TOP), np.int32), np.zeros((*shape, TOP), np.float32)
        return cache, Sampled(np.ones(shape, np.int32), np.zeros(shape, np.float32), *none)

    def price(self, key, params, cache, batch):
        """FLOPs of a mixed step, or of one step of a decode."""
        shape = (*key, cache.layers[0][0].shape)
        if shape not in self.prices:
            program = functools.partial({"mixed": mixed, "decode": decode}[key[0]], model()[0])
            found = cost(program, params, cache, batch, while_trips=1)
            assert not found.uncounted
            self.prices[shape] = found.matmul_flops
        return self.prices[shape]


@pytest.fixture
def serve(monkeypatch):
    """Serve a load with an engine whose programs are priced; return them and the engine's counters."""

    def run(jobs, **options):
        monkeypatch.setattr(Runner, "_compile", lambda runner, *_: Priced(runner.sizes.keys()))
        requests = [
            Request(prompt=job.prompt, sampling=SamplingParams(max_tokens=job.output, ignore_eos=True)) for job in jobs
        ]
        with Engine(*model(), options=EngineOptions(max_length=LENGTH, **options)) as engine:
            for job, done in zip(jobs, engine.generate(requests), strict=True):
                assert (len(done.token_ids), done.finish_reason) == (job.output, "length"), done.error
            return engine.programs, engine.stats()

    return run


def attention(places):
    """FLOPs of one token's attention to so many places, in all layers."""
    return 4 * places * C["d"] * C["layers"]


def products():
    """FLOPs of one token in all matrices but the unembedding, and in that."""
    kv = C["d"] // C["heads"] * C["kv_heads"]
    return 2 * C["layers"] * C["d"] * (2 * C["d"] + 2 * kv + 3 * C["ff"]), 2 * C["d"] * C["vocab"]


def needed(jobs):
    """FLOPs that the replies cannot be had without: each token once, exact causal attention, sampled logits alone."""
    body, head = products()
    return sum(
        body * length + attention(length * (length + 1) // 2) + head * job.output
        for job in jobs
        for length in [len(job.prompt) + job.output - 1]  # the last token is not computed with
    )


def load(seed):
    return workload.jobs({**subject.LOAD, "seed": seed, "vocab": C["vocab"]})


def test_a_price_is_the_closed_form(serve):
    """Prices are not those of the programs: one token at a time costs its products and the attention to all places."""
    body, head = products()
    programs, _ = serve([workload.Job([1] * 16, 9)], max_running=1)
    assert programs.calls == [("mixed", 16, 0, 1), ("decode", 1, LENGTH, 8)]
    first = 16 * (body + attention(16)) + attention(TURN) + head
    assert programs.flops == first + 8 * (body + head + attention(LENGTH + 8))


@pytest.mark.parametrize("at_once", [8, 16])
def test_flops_per_token_are_near_the_closed_form(serve, at_once):
    """Padding, recomputation or a schedule that leaves rows empty costs more than it may."""
    for seed in range(3):
        jobs = load(seed)
        programs, stats = serve(jobs, max_running=at_once)
        ratio = programs.flops / needed(jobs)
        tokens = sum(job.output for job in jobs)
        print(f"{at_once} at once, seed {seed}: {programs.flops / tokens / 1e6:.1f} MFLOP per token, {ratio:.3f} times")
        assert stats["preemptions"] == 0
        assert 1 < ratio <= LIMIT


@pytest.mark.parametrize("options", [{"max_running": 16, "cache_tokens": 320}, {"max_running": 8, "chunk_tokens": 4}])
def test_waste_is_measured(serve, options):
    """The measure does not see what is computed twice or padded: it would pass whatever the schedule does."""
    jobs = load(0)
    programs, stats = serve(jobs, **options)
    ratio = programs.flops / needed(jobs)
    print(f"{options}: {ratio:.3f} times, {stats['preemptions']:.0f} preemptions")
    assert ratio > LIMIT
