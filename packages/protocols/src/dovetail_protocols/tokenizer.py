"""Tokenizer: the same code masks training data and formats served prompts."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

__all__ = ["ChatEncoding", "IncrementalDecoder", "Message", "RoleSpan", "Tokenizer"]


class Message(TypedDict, total=False):
    """One message of a conversation, as in the OpenAI chat format."""

    role: str
    content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str


class RoleSpan(NamedTuple):
    """The half-open range of token indices ``[start, stop)`` that a message's own text occupies."""

    role: str
    start: int
    stop: int


class ChatEncoding(NamedTuple):
    """A conversation as tokens.

    Attributes:
        ids: token ids.
        spans: one span per message; template text between messages belongs to none.
    """

    ids: list[int]
    spans: tuple[RoleSpan, ...]


@runtime_checkable
class IncrementalDecoder(Protocol):
    """Turns a stream of ids into text without ever emitting half a character."""

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids and return the text that is now certain (possibly empty)."""
        ...

    def flush(self) -> str:
        """Return what is still held back, undecodable bytes as U+FFFD."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a document or a reply; the first one separates documents."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode every text alike."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, special tokens neither added nor recognised in it."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        ...

    def decoder(self) -> IncrementalDecoder:
        """Return a fresh incremental decoder."""
        ...

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> ChatEncoding:
        """Return a conversation's ids and where each message stands in them.

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the messages.
        """
        ...
