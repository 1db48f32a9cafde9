"""`ByteTokenizer`: the tokenizer of the fake engine in `dovetail_protocols.testing`, for tests and examples."""

import codecs
from collections.abc import Sequence
from typing import Any

from dovetail_protocols import ChatEncoding, Message, RoleSpan

__all__ = ["ByteTokenizer"]


class ByteTokenizer:
    """UTF-8 bytes as tokens, 256 as end; a conversation is ``role: content`` lines.

    Args:
        chat_template: whether conversations are supported.

    >>> ByteTokenizer().encode("é")
    [195, 169]
    """

    vocab_size = 257
    eos_ids = (256,)
    fingerprint = "bytes-and-one-end-token"

    def __init__(self, *, chat_template: bool = True) -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """Return the bytes."""
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, bytes that are not UTF-8 as U+FFFD, end tokens left out."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """Return what an id stands for."""
        return b"<end>" if index == 256 else bytes([index])

    def decoder(self) -> "_Decoder":
        """Return a fresh incremental decoder."""
        return _Decoder()

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = False
    ) -> ChatEncoding:
        """Return a conversation's ids."""
        del tools
        if not self.chat_template:
            raise ValueError("the tokenizer has no chat template; use completions, or a tokenizer with a template")
        ids: list[int] = []
        spans: list[RoleSpan] = []
        for message in messages:
            role, content = message.get("role", ""), message.get("content", "")
            ids += self.encode(f"{role}: ")
            spans.append(RoleSpan(role, len(ids), len(ids) + len(self.encode(content))))
            ids += self.encode(f"{content}\n")
        return ChatEncoding(ids + self.encode("assistant: " if add_generation_prompt else ""), tuple(spans))


class _Decoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(bytes(i for i in ids if i < 256))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
