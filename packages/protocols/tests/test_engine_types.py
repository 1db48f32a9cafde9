"""Requests are refused early with a message that names the field; completions are the stream, joined."""

import dataclasses

import numpy as np
import pytest

from dovetail_protocols import Completion, Delta, Engine, Request, SamplingParams, TokenLogprob
from dovetail_protocols.testing import FakeEngine


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("stop", "text"),
        ("stop", ("",)),
        ("logprobs", -1),
        ("logprobs", 2.0),
        ("max_tokens", 4.0),
        ("max_tokens", True),
        ("top_k", 1.5),
        ("seed", 1.5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (1.5,)),
    ],
)
def test_bad_sampling_params(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        SamplingParams(**{field: value})


def test_good_limits():
    SamplingParams(max_tokens=1, temperature=0, top_k=0, top_p=1, min_p=1, stop=("a",), logprobs=0)


def test_values_are_frozen_and_prompts_not_empty():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().max_tokens = 3
    with pytest.raises(ValueError, match="at least one token"):
        Request(prompt=[])
    for prompt in ([1.5], [True], "abc", [1, None]):
        with pytest.raises(ValueError, match="expected token ids"):
            Request(prompt=prompt)
    assert Request(prompt=np.arange(3)).prompt[2] == 2


def test_join():
    logprob = TokenLogprob(-1.0, {3: -2.0})
    deltas = [
        Delta(token_ids=(1, 2), text="a", logprobs=(logprob, logprob), version=1),
        Delta(text="b", version=2),
        Delta(token_ids=(3,), logprobs=(logprob,), version=2, finish_reason="length"),
    ]
    done = Completion.join(deltas)
    assert done == Completion(
        token_ids=(1, 2, 3), text="ab", finish_reason="length", logprobs=(logprob,) * 3, versions=(1, 1, 2)
    )
    assert Completion.join([Delta(finish_reason="error", error="why")]).error == "why"


@pytest.mark.parametrize("deltas", [[], [Delta(text="a")], [Delta(finish_reason="stop"), Delta()]])
def test_join_refuses_a_stream_that_has_not_ended(deltas):
    with pytest.raises(ValueError, match="finish_reason"):
        Completion.join(deltas)


def test_the_fake_engine_is_an_engine_by_structure():
    assert isinstance(FakeEngine(), Engine)
    assert not isinstance(object(), Engine)
