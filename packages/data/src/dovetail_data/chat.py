"""Conversations as tokens, with the ones that are learned marked: what `build_cache` takes in place of a tokenizer."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dovetail_data._errors import CorpusError

if TYPE_CHECKING:
    import dovetail_protocols

__all__ = ["ChatEncoder"]


class ChatEncoder:
    """Encodes documents that are conversations in JSON, by the tokenizer's own chat template.

    A document is a list of messages, or an object that holds one and possibly a list of tools. Of an assistant's
    message is learned what follows a generation prompt: text, tool calls and the token that ends the turn. Of other
    roles, and where a template renders earlier turns in another way once there are later ones, it is the message's own
    text and the end token after it.

    Args:
        tokenizer: with a chat template.
        roles: whose messages are learned.
        last_only: whether of these only the last message of a conversation is learned.
        messages: the field with the messages, where a document is an object.
        tools: the field with the tools.

    Raises:
        ValueError: no roles.
    """

    def __init__(
        self,
        tokenizer: "dovetail_protocols.Tokenizer",
        *,
        roles: Sequence[str] = ("assistant",),
        last_only: bool = False,
        messages: str = "messages",
        tools: str = "tools",
    ) -> None:
        if not roles or isinstance(roles, str):
            raise ValueError(f"roles={roles!r}; expected a sequence of one role or more, such as ('assistant',)")
        self.tokenizer = tokenizer
        self.roles = tuple(roles)
        self.last_only = bool(last_only)
        self._fields = (messages, tools)

    @property
    def vocab_size(self) -> int:
        """The tokenizer's."""
        return self.tokenizer.vocab_size

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's."""
        return self.tokenizer.eos_ids

    @property
    def fingerprint(self) -> str:
        """The tokenizer's, and what is learned."""
        which = "last" if self.last_only else "all"
        return f"{self.tokenizer.fingerprint}+chat:{','.join(self.roles)}:{which}:{':'.join(self._fields)}"

    def encode_weighted(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each conversation, and for each id 1 where it is learned, else 0.

        Raises:
            CorpusError: a text is no conversation, or the template refuses it.
        """
        return [self._encoded(text) for text in texts]

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        messages, tools = self._parsed(text)
        try:
            whole = self.tokenizer.chat(messages, tools)
        except ValueError as error:
            raise CorpusError(f"the chat template refuses {text!r:.200}: {error}") from error
        learned = [index for index, message in enumerate(messages) if message["role"] in self.roles]
        weights = [0] * len(whole.ids)
        for index in learned[-1:] if self.last_only else learned:
            start, stop = self._range(messages, tools, whole, index)
            weights[start:stop] = [1] * (stop - start)
        return whole.ids, weights

    def _range(
        self, messages: list[Any], tools: list[Any] | None, whole: "dovetail_protocols.ChatEncoding", index: int
    ) -> tuple[int, int]:
        """Return where what is learned of a message begins and ends."""
        before = after = None
        if messages[index]["role"] == "assistant":
            before = self._prefix(messages[:index], tools, whole.ids, prompted=True)
            after = self._prefix(messages[: index + 1], tools, whole.ids, prompted=False)
        if before is None or after is None:
            span = whole.spans[index]
            ended = 0 < span.stop < len(whole.ids) and whole.ids[span.stop] in self.eos_ids
            return span.start, span.stop + ended
        ends = [place + 1 for place in range(before, after) if whole.ids[place] in self.eos_ids]
        return before, max(ends, default=after)

    def _prefix(self, messages: list[Any], tools: list[Any] | None, ids: list[int], *, prompted: bool) -> int | None:
        """Return the length of the rendering of the first messages, None if the whole does not begin with it."""
        try:
            part = self.tokenizer.chat(messages, tools, add_generation_prompt=prompted).ids
        except ValueError:
            return None
        return len(part) if ids[: len(part)] == part else None

    def _parsed(self, text: str) -> tuple[list[Any], list[Any] | None]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"a conversation is not JSON ({error}): {text!r:.80}") from None
        field, tools_field = self._fields
        inside = isinstance(value, dict)
        messages: Any = value.get(field) if inside else value
        tools: Any = value.get(tools_field) if inside else None
        good = isinstance(messages, list) and messages and all(map(_is_message, messages))
        if not good or not isinstance(tools, list | None):
            expected = f"an object with one in {field!r} and possibly a list in {tools_field!r}"
            raise CorpusError(
                f"a conversation is {text!r:.80}; expected a list of messages, each with a role, or {expected}"
            )
        return messages, tools


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)
