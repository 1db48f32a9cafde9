"""Mutants of valid requests: never a 500, never a hang, and enough of them get past the JSON parser."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail_serve.fields import CHAT, COMPLETION

SEEDS = {
    "completions": [
        {"model": "tiny", "prompt": "Hi", "max_tokens": 2},
        {"model": "tiny", "prompt": [[1, 2], [3]], "n": 2, "logprobs": 2, "max_tokens": 2, "seed": 3, "stop": ["a"]},
        {"model": "tiny", "prompt": None, "stream": True, "stream_options": {"include_usage": True}, "echo": True},
    ],
    "chat/completions": [
        {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
        {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "é"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": ""},
            ],
            "logprobs": True,
            "top_logprobs": 3,
            "max_completion_tokens": 2,
            "response_format": {"type": "text"},
        },
    ],
}
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    1e300,
    2**63,
    10**40,
    "",
    "a",
    "\u0000",
    "\U0001f642",
    [],
    [[]],
    {},
    [None],
    {"a": 1},
]
FIELDS = {"completions": COMPLETION, "chat/completions": CHAT}


def places(value, path=()):
    """Every place inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def mutate(value, rng, kind):
    """Replace, drop, add or double something in a JSON value."""
    value = json.loads(json.dumps(value))
    path = rng.choice([p for p in places(value) if p])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    action = rng.randrange(4)
    if action == 0:
        holder[path[-1]] = rng.choice(ODD)
    elif action == 1:
        del holder[path[-1]]
    elif action == 2:
        value[rng.choice(FIELDS[kind]).name] = rng.choice(ODD)
    elif isinstance(holder, list):
        holder.append(rng.choice([*ODD, holder[path[-1]]]))
    else:
        holder[rng.choice(["name", "text", "role", "include_usage", "x"])] = rng.choice(ODD)
    return value


def scramble(data, rng):
    """Damage some bytes."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(data))
        data[place : place + rng.randrange(2)] = bytes([rng.randrange(256)])
    return bytes(data)


def mutant(seed):
    """A kind of request and a body."""
    rng = random.Random(seed)
    kind = rng.choice(list(SEEDS))
    value = rng.choice(SEEDS[kind])
    for _ in range(rng.randrange(1, 4)):
        value = mutate(value, rng, kind) if value else value
    data = json.dumps(value).encode()
    return kind, scramble(data, rng) if rng.random() < 0.3 else data


@pytest.fixture(scope="module")
def tally(api):
    counts = {"all": 0, "parsed": 0, "answered": 0}
    yield counts
    assert counts["parsed"] >= 0.3 * counts["all"], counts


def test_mutants(api, tally, soak):
    """Some combination of values reaches code that expects others."""

    @settings(
        max_examples=5000 if soak else 500, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(st.integers(0, 2**64))
    def check(seed):
        kind, data = mutant(seed)
        status, headers, body = api.call("POST", f"/v1/{kind}", data)
        assert status in (200, 400, 404), (status, data, body)
        error = {} if status == 200 else json.loads(body)["error"]
        if status == 200 and headers["content-type"].startswith("text/event-stream"):
            assert b'"error"' not in body
        tally["all"] += 1
        tally["parsed"] += error.get("code") != "invalid_json"
        tally["answered"] += status == 200

    check()
    assert tally["answered"] > 0
    assert api.engine.stats()["running"] == 0
