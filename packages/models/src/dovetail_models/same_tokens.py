"""Whether tokenizers give texts the same numbers: the rows of merged embeddings must mean the same tokens."""

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["tokens_that_differ"]

FILE = "tokenizer.json"


def tokens_that_differ(place: int, first: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Return what differs between the tokens of two directories, if both tell: the token of least number.

    Args:
        place: of the other model, for the message.
        first: files of a directory by name.
        other: likewise.

    Raises:
        ValueError: a ``tokenizer.json`` is malformed.
    """
    if FILE not in first or FILE not in other or first[FILE] == other[FILE]:
        return []
    a, b = _tokens(first[FILE]), _tokens(other[FILE])
    wrong = [number for number in sorted({*a, *b}) if a.get(number) != b.get(number)]
    return [f"token {n} is {a.get(n)!r} (0), {b.get(n)!r} ({place})" for n in wrong[:1]]


def _tokens(content: bytes) -> dict[int, str]:
    """Return the tokens of a ``tokenizer.json`` by number; a vocabulary without numbers stands in their order."""
    try:
        values: Any = json.loads(content)
        vocab = values.get("model", {}).get("vocab", {})
        numbers = {number: token for token, number in vocab.items()} if isinstance(vocab, dict) else {}
        ordered = {} if isinstance(vocab, dict) else {number: token for number, (token, *_) in enumerate(vocab)}
        return numbers | ordered | {each["id"]: each["content"] for each in values.get("added_tokens", ())}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{FILE}: {type(error).__name__}: {error}; expected a file as tokenizers writes it") from error
