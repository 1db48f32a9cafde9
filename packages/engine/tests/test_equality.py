"""Tokens and log-probabilities are those of the plain forward, whatever the schedule."""

import numpy as np
import pytest
from engine_toys import VOCAB, check_greedy

from dovetail_protocols import Request, SamplingParams


def requests(count, *, seed=0, longest=40, reply=20):
    rng = np.random.default_rng(seed)
    sampling = [
        SamplingParams(max_tokens=int(rng.integers(1, reply + 1)), temperature=0.0, ignore_eos=True, logprobs=0)
        for _ in range(count)
    ]
    return [
        Request(prompt=rng.integers(1, VOCAB, rng.integers(1, longest + 1)).tolist(), sampling=how) for how in sampling
    ]


SCHEDULES = {
    "one token per chunk": {"chunk_tokens": 1},
    "seven tokens per chunk": {"chunk_tokens": 7},
    "sixteen tokens per chunk": {"chunk_tokens": 16},
    "whole prompts": {"chunk_tokens": 64},
    "one at a time": {"max_running": 1},
    "one step at a time": {"decode_steps": 1},
    "many steps": {"decode_steps": 16},
    "pages of one token": {"page_size": 1},
    "preemption": {"cache_tokens": 64, "max_running": 4, "chunk_tokens": 64},
    "preemption amid chunks": {"cache_tokens": 64, "max_running": 4, "chunk_tokens": 7, "page_size": 1},
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_changes_no_token(name, make_engine):
    """A chunk, a neighbour, a page boundary or a recomputation changes what a request is answered."""
    engine = make_engine(**SCHEDULES[name])
    asked = requests(8, longest=8, reply=40) if name.startswith("preemption") else requests(8)
    compared = [check_greedy(r.prompt, done) for r, done in zip(asked, engine.generate(asked), strict=True)]
    assert sum(compared) >= 0.9 * sum(r.sampling.max_tokens for r in asked)
    assert engine.stats()["cache_pages_used"] == 0
    if name.startswith("preemption"):
        assert engine.stats()["preemptions"] > 0
