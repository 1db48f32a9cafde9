"""Messages: roles, parts, tool calls; what is not text or not known is refused where it stands."""

import pytest

from dovetail_serve.errors import ApiError
from dovetail_serve.messages import conversation

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": "Hi"}


def test_roles_and_parts():
    """A standard role is refused, or a content in parts loses text."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "1+1?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    assert conversation(messages, "messages") == [
        {"role": "system", "content": "Be brief."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "1+1?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "It is 2."},
    ]


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
WRONG = [
    ("a string", ""),
    ({"content": "Hi"}, ".role"),
    ({"role": "function", "name": "f", "content": "x"}, ".name"),
    ({"role": "robot", "content": "x"}, ".role"),
    ({"role": "user"}, ".content"),
    ({"role": "user", "content": None}, ".content"),
    ({"role": "user", "content": 3}, ".content"),
    ({"role": "user", "content": []}, ".content"),
    ({"role": "user", "content": ["x"]}, ".content[0]"),
    ({"role": "user", "content": [IMAGE]}, ".content[0].type"),
    ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text"}]}, ".content[1].text"),
    ({"role": "user", "content": [{"type": "text", "text": "a", "bold": True}]}, ".content[0].bold"),
    ({**USER, "name": "alice"}, ".name"),
    ({**USER, "mood": "good"}, ".mood"),
    ({**USER, "tool_call_id": "c1"}, ".tool_call_id"),
    ({**USER, "tool_calls": [CALL]}, ".tool_calls"),
    ({"role": "tool", "content": "2"}, ".tool_call_id"),
    ({"role": "assistant", "audio": {"id": "a"}}, ".audio"),
    ({"role": "assistant", "function_call": {"name": "f", "arguments": ""}}, ".function_call"),
    ({"role": "assistant", "refusal": "No."}, ".refusal"),
    ({"role": "assistant", "tool_calls": "f"}, ".tool_calls"),
    ({"role": "assistant", "tool_calls": [3]}, ".tool_calls[0]"),
    ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, ".tool_calls[0].type"),
    ({"role": "assistant", "tool_calls": [{**CALL, "id": 3}]}, ".tool_calls[0].id"),
    ({"role": "assistant", "tool_calls": [{**CALL, "extra": 3}]}, ".tool_calls[0].extra"),
    *(
        ({"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": text}}]}, where)
        for text in ("{", "3", None, {"a": 1})
        for where in [".tool_calls[0].function.arguments"]
    ),
]


@pytest.mark.parametrize(("message", "where"), WRONG)
def test_wrong_messages_are_named(message, where):
    """Something in a message is dropped, or the error does not say where it stands."""
    with pytest.raises(ApiError) as caught:
        conversation([USER, message], "messages")
    assert caught.value.status == 400
    assert caught.value.param == f"messages[1]{where}"


def test_messages_reach_the_template(api):
    """The template sees other messages than the client sent."""
    messages = [
        {"role": "developer", "content": "Brief."},
        {"role": "user", "content": [{"type": "text", "text": "é"}]},
    ]
    assert api.post("chat/completions", messages=messages, max_tokens=1)[0] == 200
    assert bytes(api.engine.requests[-1].prompt).decode() == "system: Brief.\nuser: é\nassistant: "
