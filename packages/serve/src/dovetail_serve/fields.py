"""Every field of the two kinds of request and what becomes of it; nothing is accepted and ignored.

A field is applied, or it is refused: then only the values that ask for nothing are accepted. Tests hold these tables
against the parameters of the `openai` package.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

import msgspec

from dovetail_serve import checks
from dovetail_serve.errors import ApiError
from dovetail_serve.messages import conversation

__all__ = ["CHAT", "COMPLETION", "Field", "parse"]

LARGEST = (1 << 63) - 1


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a request.

    Attributes:
        name: its name.
        check: returns the value to use or raises; not called for null where null means the default.
        applied: whether it has an effect; otherwise `check` accepts the values that ask for none.
        default: the value of a request without it.
        required: whether a request must have it.
        nullable: whether null means the default.
    """

    name: str
    check: checks.Check
    applied: bool = True
    default: Any = None
    required: bool = False
    nullable: bool = True


def _refused(name: str, *allowed: Any) -> Field:
    return Field(name, checks.only(*allowed), applied=False)


def _prompts(value: Any, path: str) -> list[Any]:
    """Return a list of strings, id lists and None (an empty document)."""
    if value is None or isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [checks.ids(value, path)]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) for item in value):
            return [checks.ids(item, f"{path}[{index}]") for index, item in enumerate(value)]
    raise checks.refusal(value, path, "a string, a list of strings, a list of token ids or a list of such lists")


def _stream_options(value: Any, path: str) -> bool:
    """Return `include_usage`."""
    options = checks.record(value, path)
    for name, wanted in options.items():
        if name == "include_obfuscation":
            checks.only(False, None)(wanted, f"{path}.{name}")
        elif name != "include_usage":
            raise _unknown(f"{path}.{name}", name, ["include_usage", "include_obfuscation"])
    usage = options.get("include_usage")
    return usage is not None and checks.boolean(usage, f"{path}.include_usage")


COMMON = (
    Field("model", checks.string, required=True, nullable=False),
    Field("temperature", checks.number(0, 2), default=1.0),
    Field("top_p", checks.number(0, 1, above=True), default=1.0),
    Field("n", checks.integer(1, 128), default=1),
    Field("seed", checks.integer(-LARGEST - 1, LARGEST)),
    Field("stop", checks.strings(16), default=()),
    Field("stream", checks.boolean, default=False),
    Field("stream_options", _stream_options),
    Field("max_tokens", checks.integer(1, 1 << 31)),
    Field("user", checks.string),
    Field("top_k", checks.integer(0, 1 << 31), default=0),
    Field("min_p", checks.number(0, 1), default=0.0),
    Field("stop_token_ids", checks.ids, default=()),
    Field("ignore_eos", checks.boolean, default=False),
    _refused("frequency_penalty", 0, 0.0),
    _refused("presence_penalty", 0, 0.0),
    _refused("logit_bias", {}),
)
COMPLETION = (
    *COMMON,
    Field("prompt", _prompts, required=True, nullable=False),
    Field("echo", checks.boolean, default=False),
    Field("logprobs", checks.integer(0, 20)),
    _refused("best_of", 1),
    _refused("suffix"),
)
CHAT = (
    *COMMON,
    Field("messages", conversation, required=True, nullable=False),
    Field("max_completion_tokens", checks.integer(1, 1 << 31)),
    Field("logprobs", checks.boolean, default=False),
    Field("top_logprobs", checks.integer(0, 20)),
    _refused("audio"),
    _refused("function_call", "none"),
    _refused("functions", []),
    _refused("metadata", {}),
    _refused("modalities", ["text"]),
    _refused("moderation"),
    _refused("parallel_tool_calls", True),
    _refused("prediction"),
    _refused("prompt_cache_key"),
    _refused("prompt_cache_options"),
    _refused("prompt_cache_retention"),
    _refused("reasoning_effort"),
    _refused("response_format", {"type": "text"}),
    _refused("safety_identifier"),
    _refused("service_tier", "auto", "default"),
    _refused("store", False),
    _refused("tool_choice", "none"),
    _refused("tools", []),
    _refused("verbosity", "medium"),
    _refused("web_search_options"),
)


def parse(body: bytes, fields: Sequence[Field]) -> dict[str, Any]:
    """Return the value of every applied field of a JSON body.

    Raises:
        ApiError: 400, naming the field.
    """
    given = _decode(body)
    known = {field.name: field for field in fields}
    for name in given:
        if name not in known:
            raise _unknown(name, name, known)
    try:
        return {field.name: _value(field, given) for field in fields}
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; expected a few levels", code="invalid_json") from None


def _decode(body: bytes) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        message = f"the body is not valid JSON: {error}; expected a JSON object in UTF-8"
        raise ApiError(400, message, code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is a JSON {type(given).__name__}; expected an object", code="invalid_json")
    return given


def _value(field: Field, given: dict[str, Any]) -> Any:
    if field.required and field.name not in given:
        message = f"{field.name} is missing; every request needs it"
        raise ApiError(400, message, param=field.name, code="missing_required_parameter")
    value = given.get(field.name)
    if value is None and field.nullable:
        return field.default
    return field.check(value, field.name)


def _unknown(path: str, name: str, known: Any) -> ApiError:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    return ApiError(400, f"{path[:200]} is not a known field; {hint}", param=path[:200], code="unknown_parameter")
