"""Greedy replies of transformers: golden/, made by integration/oracles/golden/make_generation.py."""

import functools
from pathlib import Path

import numpy as np
import pytest

from dovetail_models import from_pretrained, merge, split
from dovetail_protocols import Request, SamplingParams

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = np.load(GOLDEN / "expected.npz")
PROMPTS = [part.tolist() for part in np.split(EXPECTED["prompts"], np.cumsum(EXPECTED["prompt_lengths"])[:-1])]
REPLY = EXPECTED["replies"].shape[1]
SCHEDULES = {
    "small chunks, preempted": {"chunk_tokens": 16, "max_running": 4, "decode_steps": 8, "cache_tokens": 64},
    "whole prompts, alone": {"chunk_tokens": 64, "max_running": 1, "decode_steps": 1},
}


@pytest.fixture(scope="module")
def model():
    definition, params = split(from_pretrained(GOLDEN))
    return functools.partial(merge, definition), params


def answers(engine, **sampling):
    how = SamplingParams(max_tokens=REPLY, temperature=0.0, ignore_eos=True, **sampling)
    return engine.generate([Request(prompt=prompt, sampling=how) for prompt in PROMPTS])


@pytest.mark.parametrize("name", SCHEDULES)
def test_replies_of_transformers(name, model, make_engine):
    """A checkpoint is answered otherwise here than where it was made: tokens, log-probabilities or ends."""
    engine = make_engine(*model, **SCHEDULES[name])
    for done, reply, rows in zip(answers(engine, logprobs=5), EXPECTED["replies"], EXPECTED["logprobs"], strict=True):
        assert list(done.token_ids) == reply.tolist()
        for token, row, entry in zip(reply, rows, done.logprobs, strict=True):
            np.testing.assert_allclose(entry.value, row[token], atol=1e-4)
            np.testing.assert_allclose(list(entry.top.values()), -np.sort(-row)[1:6], atol=1e-4)
            np.testing.assert_allclose(list(entry.top.values()), row[list(entry.top)], atol=1e-4)
    assert (engine.stats()["preemptions"] > 0) == name.endswith("preempted")

    ended = answers(engine, stop_token_ids=tuple(EXPECTED["ends"].tolist()))
    for done, reply, length in zip(ended, EXPECTED["replies"], EXPECTED["lengths_with_ends"], strict=True):
        assert list(done.token_ids) == reply[:length].tolist()
        assert done.finish_reason == ("stop" if reply[length - 1] in EXPECTED["ends"] else "length")
    assert (EXPECTED["lengths_with_ends"] < REPLY).sum() >= 2
