"""Ids to text as they arrive, never half a character."""

import codecs
import re
from collections.abc import Callable, Collection, Sequence

__all__ = ["ByteDecoder", "WindowDecoder", "byte_of_symbol"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def byte_of_symbol() -> dict[str, int]:
    """Return the byte that each symbol of a byte-level vocabulary stands for (the alphabet that GPT-2 introduced).

    Printable Latin-1 characters stand for themselves; the other bytes, in order, for the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ByteDecoder:
    """The incremental decoder of byte-level vocabularies: constant work per id."""

    def __init__(self, token_bytes: Callable[[int], bytes], skip: Collection[int]) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids and return the text that is now certain (possibly empty)."""
        return self._utf8.decode(b"".join(self._token_bytes(i) for i in ids if i not in self._skip))

    def flush(self) -> str:
        """Return what is still held back, undecodable bytes as U+FFFD."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowDecoder:
    """The incremental decoder of any other vocabulary: decodes new ids behind the previous piece's ids.

    The previous piece gives the context (a word's leading space, the cleaning of punctuation). A run of byte
    tokens is held until it has ended, because one bad byte changes how the whole run decodes.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], token: Callable[[int], str], skip: Collection[int]
    ) -> None:
        self._decode, self._token, self._skip = decode, token, skip
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        """Take more ids and return the text that is now certain (possibly empty)."""
        names = [(i, self._token(i)) for i in ids if i not in self._skip]
        self._pending += [i for i, _ in names]
        if not names or _BYTE_TOKEN.fullmatch(names[-1][1]):
            return ""
        text = self._new()
        return "" if text.endswith("�") else self._emit(text)

    def flush(self) -> str:
        """Return what is still held back, undecodable bytes as U+FFFD."""
        text = self._emit(self._new())
        self._context = []
        return text

    def _new(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _emit(self, text: str) -> str:
        if text:
            self._context = self._pending
        else:
            self._context = self._context + self._pending
        self._pending = []
        return text
