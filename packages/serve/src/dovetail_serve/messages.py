"""The messages of a conversation: OpenAI's form in, the form that chat templates know out."""

from typing import Any

import msgspec

from dovetail_protocols import Message
from dovetail_serve import checks
from dovetail_serve.errors import ApiError

__all__ = ["conversation"]

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "refusal", "audio", "function_call", "tool_calls", "tool_call_id")
NOTHING = {name: checks.only(None) for name in ("name", "refusal", "audio", "function_call")}


def conversation(value: Any, path: str) -> list[Message]:
    """Return the messages; ``developer`` becomes ``system``, text parts are joined, null content is empty.

    Raises:
        ApiError: something in them is not text, is unknown, or has the wrong type; the path says where.
    """
    if not isinstance(value, list) or not value:
        raise checks.refusal(value, path, "a list of at least one message")
    return [_message(item, f"{path}[{index}]") for index, item in enumerate(value)]


def _message(value: Any, path: str) -> Message:
    fields = checks.record(value, path)
    for name in fields:
        if name not in KEYS:
            raise _unknown(f"{path}.{name}", KEYS)
        if name in NOTHING:
            NOTHING[name](fields[name], f"{path}.{name}")
    role = checks.member(*ROLES)(fields.get("role"), f"{path}.role")
    calls = fields.get("tool_calls")
    if calls is not None and role != "assistant":
        raise checks.refusal(calls, f"{path}.tool_calls", "tool calls in messages of the assistant only")
    content = _content(fields.get("content"), f"{path}.content", optional=role == "assistant")
    message = Message(role="system" if role == "developer" else role, content=content)
    if calls:
        message["tool_calls"] = _calls(calls, f"{path}.tool_calls")
    return _answering(message, fields.get("tool_call_id"), f"{path}.tool_call_id")


def _answering(message: Message, call: Any, path: str) -> Message:
    if message.get("role") == "tool":
        message["tool_call_id"] = checks.string(call, path)
    elif call is not None:
        raise checks.refusal(call, path, "a tool_call_id in messages of the role tool only")
    return message


def _content(value: Any, path: str, *, optional: bool) -> str:
    if value is None and optional:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise checks.refusal(value, path, "a string or a list of text parts")
    return "".join(_part(item, f"{path}[{index}]") for index, item in enumerate(value))


def _part(value: Any, path: str) -> str:
    part = checks.record(value, path)
    kind = checks.string(part.get("type"), f"{path}.type")
    if kind != "text":
        message = f'{path}.type="{kind}" is not supported by this server; send parts of the type "text"'
        raise ApiError(400, message, param=f"{path}.type", code="unsupported_parameter")
    _refuse_unknown(part, path, ("type", "text"))
    return checks.string(part.get("text"), f"{path}.text")


def _calls(value: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise checks.refusal(value, path, "a list of tool calls")
    return [_call(item, f"{path}[{index}]") for index, item in enumerate(value)]


def _call(value: Any, path: str) -> dict[str, Any]:
    call = checks.record(value, path)
    _refuse_unknown(call, path, ("id", "type", "function"))
    checks.member("function")(call.get("type"), f"{path}.type")
    function = checks.record(call.get("function"), f"{path}.function")
    _refuse_unknown(function, f"{path}.function", ("name", "arguments"))
    name = checks.string(function.get("name"), f"{path}.function.name")
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments")
    identity = checks.string(call.get("id"), f"{path}.id")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(value: Any, path: str) -> dict[str, Any]:
    """Templates want the object, the API has it as JSON in a string."""
    try:
        return checks.record(msgspec.json.decode(checks.string(value, path)), path)
    except (msgspec.DecodeError, RecursionError):
        raise checks.refusal(value, path, "a JSON object in a string") from None


def _refuse_unknown(fields: dict[str, Any], path: str, known: tuple[str, ...]) -> None:
    for name in fields:
        if name not in known:
            raise _unknown(f"{path}.{name}", known)


def _unknown(path: str, known: tuple[str, ...]) -> ApiError:
    message = f"{path} is not a known field; expected {', '.join(known)}"
    return ApiError(400, message, param=path, code="unknown_parameter")
