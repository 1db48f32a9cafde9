"""Every field of the openai package's calls has a test of its effect or of its refusal."""

import inspect
import json

import openai
import pytest
from openai.resources.chat.completions import Completions as Chat
from openai.resources.completions import Completions

from dovetail_serve.errors import ApiError
from dovetail_serve.fields import CHAT, COMPLETION, parse

KINDS = {"completions": COMPLETION, "chat/completions": CHAT}
TRANSPORT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
EXTENSIONS = {"top_k", "min_p", "stop_token_ids", "ignore_eos"}
# Fields whose effect has a test of its own, here or in the named file.
EFFECTS = {
    "model": "test_openai.py",
    "prompt": "test_openai.py",
    "messages": "test_messages.py",
    "temperature": "here",
    "top_p": "here",
    "top_k": "here",
    "min_p": "here",
    "max_tokens": "here",
    "max_completion_tokens": "here",
    "n": "test_openai.py",
    "seed": "here",
    "stop": "here",
    "stop_token_ids": "here",
    "ignore_eos": "here",
    "stream": "test_streams.py",
    "stream_options": "test_streams.py",
    "user": "here",
    "echo": "test_openai.py",
    "logprobs": "test_logprobs.py",
    "top_logprobs": "test_logprobs.py",
}
# A value that asks for something, for every field that is refused.
ASKING = {
    "frequency_penalty": 0.5,
    "presence_penalty": -1,
    "logit_bias": {"65": 5},
    "best_of": 2,
    "suffix": "end",
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "auto",
    "functions": [{"name": "f"}],
    "metadata": {"a": "b"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "safety_identifier": "s",
    "service_tier": "flex",
    "store": True,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "verbosity": "low",
    "web_search_options": {},
}
NEUTRAL = {
    "frequency_penalty": [0, 0.0, None],
    "presence_penalty": [0, 0.0],
    "logit_bias": [{}, None],
    "best_of": [1, None],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tool_choice": ["none"],
    "tools": [[]],
    "functions": [[]],
    "function_call": ["none"],
    "metadata": [{}],
    "parallel_tool_calls": [True],
    "verbosity": ["medium"],
}
REFUSED = [(kind, field.name) for kind, fields in KINDS.items() for field in fields if not field.applied]


@pytest.mark.parametrize(("kind", "create"), [("completions", Completions.create), ("chat/completions", Chat.create)])
def test_the_table_has_every_field_of_the_client(kind, create):
    """A field that the client can send is unknown here, so that nobody decided what becomes of it."""
    theirs = set(inspect.signature(create).parameters) - TRANSPORT
    ours = {field.name for field in KINDS[kind]}
    assert theirs <= ours
    assert ours - theirs == EXTENSIONS, "fields beside OpenAI's are named in the README"


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_has_a_test(kind):
    """A field was added to the table without a test of its effect or of its refusal."""
    for field in KINDS[kind]:
        assert field.name in (EFFECTS if field.applied else ASKING), field.name


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_refused_fields_name_themselves(api, kind, name):
    """A client believes that a setting acts that does not."""
    status, body = api.post(kind, **{name: ASKING[name]})
    assert status == 400
    assert body["error"]["param"] == name
    assert body["error"]["code"] == "unsupported_parameter"
    assert "leave it out" in body["error"]["message"]


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_values_that_ask_for_nothing_are_accepted(api, kind, name):
    """Clients that write out defaults cannot use the server."""
    for value in [None, *NEUTRAL.get(name, [])]:
        status, body = api.post(kind, max_tokens=1, **{name: value})
        assert status == 200, body


def sampled(api, kind="completions", **fields):
    status, body = api.post(kind, **{"max_tokens": 4, **fields})
    assert status == 200, body
    return api.engine.requests[-1].sampling


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0.5),
        ("temperature", 0),
        ("top_p", 0.25),
        ("top_k", 7),
        ("min_p", 0.125),
        ("max_tokens", 9),
        ("seed", -3),
        ("stop_token_ids", [5, 6]),
        ("ignore_eos", True),
        ("stop", ["a", "b"]),
    ],
)
def test_sampling_fields_reach_the_engine(api, kind, name, value):
    """A sampling parameter is accepted and not applied."""
    expected = tuple(value) if isinstance(value, list) else value
    assert getattr(sampled(api, kind, **{name: value}), name) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_those_of_openai(api, kind):
    """A request that says nothing is sampled in another way than elsewhere."""
    status, _ = api.post(kind)
    sampling = api.engine.requests[-1].sampling
    assert status == 200
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (sampling.seed, sampling.stop, sampling.logprobs, sampling.ignore_eos) == (None, (), None, False)
    assert sampling.max_tokens == (16 if kind == "completions" else 1024)


def test_max_completion_tokens(api):
    """The newer name is ignored, or two different limits are both accepted."""
    assert sampled(api, "chat/completions", max_tokens=None, max_completion_tokens=3).max_tokens == 3
    assert sampled(api, "chat/completions", max_tokens=3, max_completion_tokens=3).max_tokens == 3
    status, body = api.post("chat/completions", max_tokens=3, max_completion_tokens=4)
    assert (status, body["error"]["param"]) == (400, "max_tokens")


def test_user_is_in_the_engine_request(api):
    """Who asked is lost, so that the log of the engine cannot tell."""
    sampled(api, user="alice")
    assert api.engine.requests[-1].id.endswith("-0 user=alice")


def test_stop_and_seed_change_the_reply(api):
    """Stop strings and seeds pass through and do nothing."""
    replies = [api.post("completions", seed=seed, max_tokens=30)[1]["choices"][0]["text"] for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]
    cut = replies[0][3]
    choice = api.post("completions", seed=1, max_tokens=30, stop=cut)[1]["choices"][0]
    assert choice["text"] == replies[0].split(cut)[0]
    assert choice["finish_reason"] == "stop"


WRONG = [
    ("model", 3),
    ("model", None),
    ("temperature", 2.1),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("seed", 1.5),
    ("seed", 1 << 63),
    ("seed", 10**30),
    ("stop", ""),
    ("stop", [""]),
    ("stop", ["a"] * 17),
    ("stop", 3),
    ("stream", 1),
    ("stream", "yes"),
    ("max_tokens", 0),
    ("max_tokens", "ten"),
    ("top_k", -1),
    ("min_p", 1.1),
    ("stop_token_ids", 3),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["a"]),
    ("ignore_eos", "no"),
    ("user", 3),
]
WRONG_COMPLETION = [
    ("prompt", []),
    ("prompt", 3),
    ("prompt", ["a", 1]),
    ("prompt", [True]),
    ("prompt", [[]]),
    ("prompt", ""),
    ("prompt", [300]),
    ("prompt", {"text": "a"}),
    ("echo", "yes"),
    ("logprobs", True),
    ("logprobs", 21),
    ("logprobs", -1),
]
WRONG_CHAT = [("logprobs", 1), ("top_logprobs", 21), ("top_logprobs", 1), ("max_completion_tokens", 0)]
WRONG_CHAT += [("messages", []), ("messages", "Hi"), ("messages", None)]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *(("completions", *case) for case in WRONG + WRONG_COMPLETION),
        *(("chat/completions", *case) for case in WRONG + WRONG_CHAT),
    ],
)
def test_wrong_values_are_named(api, kind, name, value):
    """A value of a wrong type or out of range is rounded, ignored, or an error that does not say which."""
    status, body = api.post(kind, **{name: value})
    assert status == 400, body
    assert body["error"]["param"].startswith(name)
    assert body["error"]["type"] == "invalid_request_error"
    assert "expected" in body["error"]["message"]


def test_prompt_paths_say_which(api):
    """Among many prompts the wrong one is not named."""
    assert api.post("completions", prompt=[[1], [2, -1]])[1]["error"]["param"] == "prompt[1]"


@pytest.mark.parametrize("options", [3, {"include_usage": 1}, {"usage": True}, {"include_obfuscation": True}])
def test_wrong_stream_options_are_refused(api, options):
    """A misspelt stream option is ignored."""
    status, body = api.post("completions", stream=True, stream_options=options)
    assert status == 400
    assert body["error"]["param"].startswith("stream_options")


def test_stream_options_need_a_stream(api):
    """Usage was asked for in a way that cannot give it."""
    status, body = api.post("completions", stream_options={"include_usage": True})
    assert (status, body["error"]["param"]) == (400, "stream_options")


def test_seeds_of_all_choices_must_fit(api):
    """The last choice's seed overflows in the engine."""
    largest = (1 << 63) - 1
    assert api.post("completions", seed=largest, max_tokens=1)[0] == 200
    status, body = api.post("completions", seed=largest, n=2)
    assert (status, body["error"]["param"]) == (400, "seed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "near"), [("max_token", "max_tokens"), ("temprature", "temperature")])
def test_unknown_fields_are_refused_with_the_nearest(api, kind, name, near):
    """A misspelt field is ignored."""
    status, body = api.post(kind, **{name: 1})
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, name, "unknown_parameter")
    assert near in body["error"]["message"]


@pytest.mark.parametrize(("kind", "name"), [("completions", "prompt"), ("chat/completions", "messages")])
def test_missing_fields_are_named(api, kind, name):
    """A request without a prompt is answered."""
    for missing in (name, "model"):
        body = {"model": "tiny", name: "Hi" if name == "prompt" else [{"role": "user", "content": "Hi"}]}
        del body[missing]
        status, _, answer = api.call("POST", f"/v1/{kind}", body)
        assert status == 400
        assert json.loads(answer)["error"]["param"] == missing


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff", b'{"a":NaN}', b"[" * 100000, b'"\xed\xa0\x80"', b'{"n":' + b"9" * 9000]
)
def test_bodies_that_are_no_json_object(body):
    """A malformed body ends in an exception other than the one for clients."""
    with pytest.raises(ApiError) as caught:
        parse(body, COMPLETION)
    assert caught.value.status == 400


def test_the_client_gets_its_own_exceptions(api):
    """The openai package does not understand our errors."""
    with pytest.raises(openai.BadRequestError) as caught:
        api.client.completions.create(model="tiny", prompt="Hi", presence_penalty=1)
    assert caught.value.param == "presence_penalty"
    assert caught.value.code == "unsupported_parameter"
