"""The real client: completions, chats, choices, models, errors, many at once."""

import asyncio

import openai
import pytest

from dovetail_protocols import Request, SamplingParams
from dovetail_protocols.testing import FakeEngine
from dovetail_serve import ServeOptions
from dovetail_serve.testing import ByteTokenizer

CHAT = [{"role": "user", "content": "Hi"}]


def expected(prompt, seed, tokens):
    sampling = SamplingParams(max_tokens=tokens, seed=seed)
    return FakeEngine().generate([Request(prompt=list(prompt), sampling=sampling)])[0].text


def test_completion(api):
    """The text is not the engine's, or the counts are not those of its tokens."""
    answer = api.client.completions.create(model="tiny", prompt="Hi", seed=5, max_tokens=20)
    assert answer.choices[0].text == expected(b"Hi", 5, 20)
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (2, 20, 22)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == "tiny"
    assert answer.system_fingerprint.endswith("_v0")
    assert abs(answer.created - api.server._uvicorn._state.created) < 1000
    assert answer._request_id == answer.id


def test_chat(api):
    """The template is not applied, or its generation prompt is missing."""
    answer = api.client.chat.completions.create(model="tiny", messages=CHAT, seed=5, max_tokens=20)
    assert answer.choices[0].message.content == expected(b"user: Hi\nassistant: ", 5, 20)
    assert answer.choices[0].message.role == "assistant"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.usage.prompt_tokens == len("user: Hi\nassistant: ")


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hi", [b"Hi"]),
        (["Hi", "you"], [b"Hi", b"you"]),
        ([72, 105], [b"Hi"]),
        ([[72], [105, 33]], [b"H", b"i!"]),
        (None, [[256]]),
    ],
)
def test_forms_of_prompts(api, prompt, prompts):
    """One of the four forms of a prompt, or null for an empty document, is read wrongly."""
    before = len(api.engine.requests)
    answer = api.client.completions.create(model="tiny", prompt=prompt, max_tokens=3, seed=1)
    assert [list(request.prompt) for request in api.engine.requests[before:]] == [list(p) for p in prompts]
    assert [choice.index for choice in answer.choices] == list(range(len(prompts)))
    assert [choice.text for choice in answer.choices] == [expected(p, 1, 3) for p in prompts]


def test_choices_have_their_own_seeds(api):
    """Choice i of a prompt is not the reply to seed + i, or choices are in another order."""
    answer = api.client.completions.create(model="tiny", prompt=["Hi", "you"], n=3, seed=7, max_tokens=12)
    texts = [expected(p, 7 + i, 12) for p in (b"Hi", b"you") for i in range(3)]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 72


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi é", list("Hi é".encode())])
def test_echo(api, prompt, stream):
    """The echo is missing, comes twice, or is not the prompt's text."""
    answer = api.client.completions.create(
        model="tiny", prompt=prompt, echo=True, max_tokens=5, seed=1, n=2, stream=stream
    )
    texts = ["", ""]
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["Hi é" + expected("Hi é".encode(), seed, 5) for seed in (1, 2)]


def test_echo_with_logprobs_is_refused(api):
    """Log-probabilities of the prompt seem to be there and are not."""
    with pytest.raises(openai.BadRequestError) as caught:
        api.client.completions.create(model="tiny", prompt="Hi", echo=True, logprobs=1)
    assert caught.value.param == "echo"


def test_models(api):
    """A client that lists models or looks one up fails."""
    assert [model.id for model in api.client.models.list()] == ["tiny"]
    assert api.client.models.retrieve("tiny").owned_by == "dovetail"
    with pytest.raises(openai.NotFoundError) as caught:
        api.client.models.retrieve("large")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_another_model_is_refused(api, kind):
    """A request for another model is answered by this one."""
    status, body = api.post(kind, model="large")
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
    assert "tiny" in body["error"]["message"]


def test_a_reply_that_ends(launch, recorder):
    """The engine's end is not `stop`."""
    with launch(recorder(reply=lambda request: b"Hello")) as api:
        choice = api.client.chat.completions.create(model="tiny", messages=CHAT).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("Hello", "stop")
        choice = api.client.completions.create(
            model="tiny", prompt="a", max_tokens=9, extra_body={"ignore_eos": True}
        ).choices[0]
        assert (choice.text, choice.finish_reason) == ("Hello", "length")


def test_too_long_for_the_engine(api):
    """The engine's refusal becomes a server error, or a part of the replies goes on."""
    with pytest.raises(openai.BadRequestError) as caught:
        api.client.completions.create(model="tiny", prompt="Hi", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    assert "4096" in caught.value.message
    assert api.engine.stats()["running"] == 0


def test_context_length_of_the_server(launch):
    """A known limit is not used: chats without max_tokens should get what is left, the rest a clear error."""
    with launch(options=ServeOptions(context_length=40, prompt_prefix=(1, 2))) as api:
        api.client.chat.completions.create(model="tiny", messages=CHAT)
        assert api.engine.requests[-1].sampling.max_tokens == 40 - len("user: Hi\nassistant: ")
        api.client.completions.create(model="tiny", prompt="Hi")
        assert list(api.engine.requests[-1].prompt) == [1, 2, *b"Hi"]
        with pytest.raises(openai.BadRequestError) as caught:
            api.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 40}])
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        with pytest.raises(openai.BadRequestError) as caught:
            api.client.completions.create(model="tiny", prompt="Hi", max_tokens=37)
        assert "at most 40" in caught.value.message


def test_no_chat_template(launch):
    """A base model's chat fails without saying why."""
    with launch(tokenizer=ByteTokenizer(chat_template=False)) as api:
        with pytest.raises(openai.BadRequestError) as caught:
            api.client.chat.completions.create(model="tiny", messages=CHAT)
        assert caught.value.param == "messages"
        assert "chat template" in caught.value.message


@pytest.mark.parametrize("streams", [32])
def test_many_streams_at_once(api, streams):
    """Streams mix up their deltas, lose some, or wait for each other."""

    async def one(client, seed):
        stream = await client.completions.create(model="tiny", prompt="Hi", seed=seed, max_tokens=40, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything():
        async with openai.AsyncOpenAI(base_url=api.server.base_url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(streams)))

    assert asyncio.run(everything()) == [expected(b"Hi", seed, 40) for seed in range(streams)]
