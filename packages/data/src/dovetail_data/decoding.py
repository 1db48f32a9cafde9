"""From the bytes of a document to its text, with errors that say where they are."""

import json
from typing import Any, Literal, TypeAlias

from dovetail_data._errors import CorpusError

__all__ = ["Undecodable", "check_undecodable", "decode", "json_field"]

Undecodable: TypeAlias = Literal["error", "skip"]


def check_undecodable(value: str) -> None:
    """Raise ValueError for anything but 'error' and 'skip'."""
    if value not in ("error", "skip"):
        raise ValueError(f"undecodable={value!r}; expected 'error' or 'skip'")


def decode(data: bytes, where: str, undecodable: Undecodable) -> str | None:
    """Return the text of UTF-8 bytes; None where they are none and are to be skipped."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if undecodable == "skip":
            return None
        raise CorpusError(f"{where} is not UTF-8 ({error}); convert it, or pass undecodable='skip'") from None


def json_field(data: bytes, field: str, where: str, undecodable: Undecodable) -> str | None:
    """Return a string of a JSON object; None where it cannot be decoded and is to be skipped."""
    decoded = decode(data, where, undecodable)
    if decoded is None:
        return None
    try:
        value: Any = json.loads(decoded)
    except ValueError as error:
        raise CorpusError(f"{where} is not JSON ({error}): {decoded.strip()!r:.80}") from None
    except RecursionError:
        raise CorpusError(f"{where} is nested too deeply: {decoded.strip()!r:.80}") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise CorpusError(f"{where} is {decoded.strip()!r:.80}; expected an object with a string in {field!r}")
    text: str = value[field]
    try:
        text.encode()
    except UnicodeEncodeError:
        if undecodable == "skip":
            return None
        raise CorpusError(
            f"{where} holds half a surrogate pair in {field!r}; mend it, or pass undecodable='skip'"
        ) from None
    return text
