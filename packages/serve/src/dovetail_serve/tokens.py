"""How single tokens are shown in log-probabilities."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from dovetail_protocols import Tokenizer, TokenLogprob

__all__ = ["Ranked", "Shown", "TokenTexts", "ranked"]

LOWEST = -9999.0


class Shown(NamedTuple):
    """A token as text and as bytes (None where the tokenizer cannot say which)."""

    text: str
    data: list[int] | None


class Ranked(NamedTuple):
    """A token and its log-probability, finite because JSON has no infinity."""

    token: int
    value: float


def ranked(chosen: int, logprob: TokenLogprob, count: int) -> tuple[Ranked, list[Ranked]]:
    """Return the chosen token and the `count` likeliest ones, which may include it."""
    values: Mapping[int, float] = {chosen: logprob.value, **logprob.top}
    best = sorted(values.items(), key=lambda item: -item[1])[:count]
    return Ranked(chosen, max(LOWEST, logprob.value)), [Ranked(i, max(LOWEST, value)) for i, value in best]


class TokenTexts:
    r"""Shows tokens as the OpenAI API does: text, or ``bytes:\xf0\x9f`` for bytes that are not whole characters.

    The bytes come from the tokenizer's ``token_bytes(id)`` if it has that (byte-level vocabularies), else from
    ``decode([id])``; what then shows as U+FFFD has no bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer: Any = tokenizer
        self.show = functools.lru_cache(maxsize=1 << 16)(self._show)

    def _show(self, token: int) -> Shown:
        try:
            data: bytes = self._tokenizer.token_bytes(token)
        except (AttributeError, ValueError):
            text: str = self._tokenizer.decode([token])
            return Shown(text, None if "\ufffd" in text else list(text.encode()))
        try:
            return Shown(data.decode(), list(data))
        except UnicodeDecodeError:
            return Shown("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data))
