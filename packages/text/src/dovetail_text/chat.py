"""Conversations as text in which it is known which characters are whose.

The template is rendered twice: once as it is, and once with marks around each message's content and inside every
special token's name that occurs in the caller's data. The marks are characters that the data does not contain; taken
out again they must leave the first rendering, otherwise the template looks into the content and other places for the
marks are tried. So whatever the template does (trim, merge the system prompt, drop old reasoning, write JSON),
the ranges are those of the text that it really wrote.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dovetail_text.errors import ChatError

__all__ = ["Rendered", "render_chat"]

_OUTSIDE, _INSIDE, _NOWHERE = "outside", "inside", "nowhere"
_PLACES = [(a, b) for a in (_OUTSIDE, _INSIDE, _NOWHERE) for b in (_OUTSIDE, _INSIDE, _NOWHERE)][:-1]

Render = Callable[[Sequence[Mapping[str, Any]], Any], str]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation as the template wrote it.

    Attributes:
        text: what the template wrote.
        ranges: the characters ``[start, stop)`` of each message's content; empty where there are none.
        breaks: positions inside a special token's name that stands in the caller's data.
    """

    text: str
    ranges: tuple[tuple[int, int], ...]
    breaks: frozenset[int]


@dataclasses.dataclass(frozen=True)
class _Marks:
    """Three characters that occur nowhere in a conversation."""

    left: str
    right: str
    split: str

    @classmethod
    def absent_from(cls, *values: Any) -> "_Marks":
        used = {char for value in values for text in _strings(value) for char in text if ord(char) >= 0xFDD0}
        free = (chr(c) for c in (*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE)) if chr(c) not in used)
        return cls(next(free), next(free), next(free))

    def wrap(self, content: str, index: int, places: tuple[str, str]) -> str:
        """Put the marks of message `index` outside the content, inside its white space, or nowhere."""
        lead = len(content) - len(content.lstrip()) if places[0] == _INSIDE else 0
        stop = max(lead, len(content.rstrip())) if places[1] == _INSIDE else len(content)
        opening = "" if places[0] == _NOWHERE else f"{self.left}{index}{self.right}"
        closing = "" if places[1] == _NOWHERE else f"{self.left}/{index}{self.right}"
        return content[:lead] + opening + content[lead:stop] + closing + content[stop:]

    def remove(self, text: str) -> tuple[str, dict[str, int], frozenset[int]]:
        """Return the text without marks, where each mark stood (the last time it occurs), and the splits."""
        out, at, begin = "", dict[str, int](), 0
        splits: set[int] = set()
        for match in re.finditer(f"{self.left}(/?\\d+){self.right}|{self.split}", text):
            out, begin = out + text[begin : match.start()], match.end()
            if match[1] is None:
                splits.add(len(out))
            else:
                at[match[1]] = len(out)
        return out + text[begin:], at, frozenset(splits)


def render_chat(
    render: Render, messages: Sequence[Mapping[str, Any]], tools: Any, specials: re.Pattern[str] | None
) -> Rendered:
    """Render a conversation and find each message's content in it.

    Args:
        render: the template as a function of messages and tools.
        messages: what the template gets.
        tools: what the template gets.
        specials: matches the name of any special token.

    Raises:
        ChatError: the template refuses the conversation, or rewrites a content so that it cannot be recognised.
    """
    plain = render(messages, tools)
    marks = _Marks.absent_from(messages, tools)
    quoted = messages if specials is None else _quote(messages, specials, marks.split)
    safe_tools = tools if specials is None else _quote(tools, specials, marks.split)
    text, _, breaks = marks.remove(render(quoted, safe_tools))
    if text != plain:
        raise ChatError(
            "the conversation contains the name of a special token and the template acts on it; "
            "remove it from the messages or tools"
        )

    def attempt(chosen: Sequence[int], places: tuple[str, str]) -> dict[str, int] | None:
        marked = [
            {**m, "content": marks.wrap(m["content"], i, places)} if i in chosen else m for i, m in enumerate(quoted)
        ]
        try:
            text, at, _ = marks.remove(render(marked, safe_tools))
        except ChatError:
            return None
        return at if text == plain else None

    contents = [message.get("content") or "" for message in messages]
    shown = [i for i, content in enumerate(contents) if content]
    ranges = [(0, 0)] * len(contents)
    found = next((at for p in (_PLACES[0], _PLACES[4]) if (at := attempt(shown, p)) is not None), None)
    for i in shown:
        at = found if found is not None else next((a for p in _PLACES if (a := attempt([i], p))), {})
        ranges[i] = _range(plain, contents[i], at.get(str(i)), at.get(f"/{i}"))
        if found is None and not at and contents[i].strip() and not _is_left_out(render, quoted, safe_tools, i):
            raise ChatError(
                f"the chat template rewrites the content of message {i} ({contents[i][:60]!r}), so that it cannot be "
                "told which tokens are the message's; use a template that writes the content as it is"
            )
    return Rendered(plain, tuple(ranges), breaks)


def _is_left_out(render: Render, messages: Sequence[Mapping[str, Any]], tools: Any, index: int) -> bool:
    """Whether the template writes the same for another content of the same message."""
    other = [{**m, "content": f".{m['content']}."} if i == index else m for i, m in enumerate(messages)]
    return render(messages, tools) == render(other, tools)


def _range(text: str, content: str, start: int | None, stop: int | None) -> tuple[int, int]:
    """Return the range between two marks; where one is lost, as far as text and content agree from the other."""
    if start is not None and stop is not None:
        return start, max(start, stop)
    if start is not None:
        length = _common(content, text[start:])
        return start, start + (length if length == len(content) else len(content[:length].rstrip()))
    if stop is not None:
        length = _common(content[::-1], text[:stop][::-1])
        return stop - (length if length == len(content) else len(content[len(content) - length :].lstrip())), stop
    return 0, 0


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _quote(value: Any, specials: re.Pattern[str], split: str) -> Any:
    """Put a mark behind the first character of every special token's name in the strings of a JSON value."""
    if isinstance(value, str):
        return specials.sub(lambda match: match[0][0] + split + match[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _quote(item, specials, split) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_quote(item, specials, split) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
