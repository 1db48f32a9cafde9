"""The answers of the OpenAI API as structures that msgspec writes as JSON."""

from typing import Literal

import msgspec

__all__ = [
    "Answer",
    "ChatChoice",
    "ChatChunkChoice",
    "ChatDelta",
    "ChatLogprobs",
    "ChatMessage",
    "ChatToken",
    "CompletionChoice",
    "CompletionLogprobs",
    "TopToken",
    "Usage",
]


class Usage(msgspec.Struct):
    """Tokens of the prompts (each counted once) and of all replies."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion; offsets are characters from the beginning of the text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """A completion or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class TopToken(msgspec.Struct):
    """A likely token."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(msgspec.Struct):
    """A token of a reply and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopToken]


class ChatLogprobs(msgspec.Struct):
    """Log-probabilities of a reply."""

    content: list[ChatToken]
    refusal: None = None


class ChatMessage(msgspec.Struct):
    """A whole reply."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    """A choice of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatDelta(msgspec.Struct):
    """What a chunk adds to a reply."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct):
    """A piece of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class Answer(msgspec.Struct):
    """A completion, a chat completion or a chunk of either."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice] | list[ChatChoice] | list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
