"""What the value of a field may be: each check returns the value to use or raises a 400 that names the field."""

import json
from collections.abc import Callable
from typing import Any, TypeAlias

from dovetail_serve.errors import ApiError

__all__ = ["Check", "boolean", "ids", "integer", "member", "number", "only", "record", "refusal", "string", "strings"]

Check: TypeAlias = Callable[[Any, str], Any]


def refusal(value: Any, path: str, expected: str, code: str = "invalid_value") -> ApiError:
    """Return the error for a value that is not as expected."""
    return ApiError(400, f"{path}={_shown(value)}; expected {expected}", param=path, code=code)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def integer(low: int, high: int) -> Check:
    """Accept whole numbers in ``[low, high]``."""

    def check(value: Any, path: str) -> int:
        if type(value) is not int or not low <= value <= high:
            raise refusal(value, path, f"an integer from {low} to {high}")
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Check:
    """Accept numbers in ``[low, high]``, or in ``(low, high]`` when `above`."""

    def check(value: Any, path: str) -> float:
        good = type(value) in (int, float) and low <= value <= high
        if not good or (above and value == low):
            raise refusal(value, path, f"a number {'above' if above else 'from'} {low:g} to {high:g}")
        return float(value)

    return check


def boolean(value: Any, path: str) -> bool:
    """Accept true and false."""
    if not isinstance(value, bool):
        raise refusal(value, path, "true or false")
    return value


def string(value: Any, path: str) -> str:
    """Accept a string."""
    if not isinstance(value, str):
        raise refusal(value, path, "a string")
    return value


def strings(most: int) -> Check:
    """Accept a string, or a list of at most `most`, none empty; return a tuple."""

    def check(value: Any, path: str) -> tuple[str, ...]:
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(item, str) and item for item in found):
            raise refusal(value, path, "a string or a list of strings, none of them empty")
        if len(found) > most:
            raise refusal(value, path, f"at most {most} strings")
        return tuple(found)

    return check


def ids(value: Any, path: str) -> tuple[int, ...]:
    """Accept a list of token ids; return a tuple."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 31 for item in value):
        raise refusal(value, path, "a list of token ids")
    return tuple(value)


def member(*choices: str) -> Check:
    """Accept one of some strings."""

    def check(value: Any, path: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise refusal(value, path, f"one of {', '.join(choices)}")
        return value

    return check


def only(*allowed: Any) -> Check:
    """Accept the values that ask for nothing; whatever else a client wants is not supported, and told so."""
    accepted = {json.dumps(value) for value in allowed}
    hint = " or ".join(["leave it out", *(f"send {_shown(value)}" for value in allowed)])

    def check(value: Any, path: str) -> None:
        if json.dumps(value) not in accepted:
            message = f"{path}={_shown(value)} is not supported by this server; {hint}"
            raise ApiError(400, message, param=path, code="unsupported_parameter")

    return check


def record(value: Any, path: str) -> dict[str, Any]:
    """Accept an object."""
    if not isinstance(value, dict):
        raise refusal(value, path, "an object")
    return value
