"""Log-probabilities in both formats, and how tokens are shown."""

import math

import pytest

from dovetail_protocols import TokenLogprob
from dovetail_serve.testing import ByteTokenizer
from dovetail_serve.tokens import TokenTexts, ranked

REPLY = "aé🙂b".encode()
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def spelling(launch, recorder):
    with launch(recorder(reply=lambda request: REPLY)) as api:
        yield api


def test_completion_logprobs(spelling):
    """Tokens, values or offsets are not those of the reply."""
    answer = spelling.client.completions.create(model="tiny", prompt="Hi", max_tokens=8, logprobs=2)
    found = answer.choices[0].logprobs
    assert found.tokens == ["a", *(rf"bytes:\x{byte:02x}" for byte in REPLY[1:7]), "b"]
    assert found.token_logprobs == [-0.125 * (1 + token % 4) for token in REPLY]
    assert found.text_offset == [0, 1, 1, 2, 2, 2, 2, 3]
    assert list(found.top_logprobs[0].items()) == [("a", -0.25), ("b", -0.75)]
    assert all(len(likely) == 2 for likely in found.top_logprobs)


def test_completion_logprobs_of_zero(spelling):
    """Zero alternatives means none at all, or fails."""
    answer = spelling.client.completions.create(model="tiny", prompt="Hi", max_tokens=1, logprobs=0)
    assert answer.choices[0].logprobs.top_logprobs == [{"a": -0.25}]


def test_chat_logprobs(spelling):
    """Entries lack the bytes, or the alternatives are not the likeliest tokens in order."""
    answer = spelling.client.chat.completions.create(model="tiny", messages=CHAT, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens == 9, "the end token counts as well"
    assert b"".join(bytes(entry.bytes) for entry in entries[:-1]) == REPLY
    assert entries[0].token == "a"
    assert entries[1].token == r"bytes:\xc3"
    assert entries[-1].token == "<end>"
    assert [(top.token, top.logprob) for top in entries[0].top_logprobs] == [("a", -0.25), ("b", -0.75)]


def test_chat_logprobs_without_alternatives(spelling):
    """logprobs alone gives alternatives, or nothing."""
    answer = spelling.client.chat.completions.create(model="tiny", messages=CHAT, logprobs=True)
    assert all(entry.top_logprobs == [] for entry in answer.choices[0].logprobs.content)
    plain = spelling.client.chat.completions.create(model="tiny", messages=CHAT)
    assert plain.choices[0].logprobs is None


@pytest.mark.parametrize("chat", [False, True])
def test_streams_have_the_same_logprobs(spelling, chat):
    """A stream's log-probabilities, put together, differ from those of the whole answer."""
    if chat:
        create = spelling.client.chat.completions.create
        fields = {"messages": CHAT, "logprobs": True, "top_logprobs": 3}
    else:
        create, fields = spelling.client.completions.create, {"prompt": "Hi", "logprobs": 3}
    whole = create(model="tiny", max_tokens=8, **fields).choices[0]
    chunks = [chunk.choices[0] for chunk in create(model="tiny", max_tokens=8, stream=True, **fields)]
    parts = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    if chat:
        assert [entry for part in parts for entry in part.content] == whole.logprobs.content
        assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
        return
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(whole.logprobs, name)
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_ranked_with_and_without_the_chosen_among_the_alternatives():
    """An engine that counts the chosen token among the alternatives gets it shown twice."""
    values = {1: -0.5, 2: -1.0, 3: -3.0}
    for top in (values, {2: -1.0, 3: -3.0}):
        chosen, best = ranked(1, TokenLogprob(-0.5, top), 2)
        assert chosen == (1, -0.5)
        assert best == [(1, -0.5), (2, -1.0)]
    unlikely, best = ranked(9, TokenLogprob(-math.inf, {1: -0.5}), 1)
    assert unlikely.value == -9999.0
    assert best == [(1, -0.5)]


def test_tokenizers_without_bytes():
    """A vocabulary that is not byte-level makes log-probabilities fail, or bytes are made up."""

    class Plain(ByteTokenizer):
        def token_bytes(self, index):
            raise ValueError("not byte-level")

    texts = TokenTexts(Plain())
    assert texts.show(97) == ("a", [97])
    assert texts.show(195) == ("\ufffd", None)
    assert texts.show(256) == ("", [])
