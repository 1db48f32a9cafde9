"""Addresses of leaves in a pytree and the one glob matcher of the stack.

A leaf's address is its pytree path joined by ``/`` (``layers/0/attention/query/kernel``). Mapping keys, sequence
indices and attribute names are written as they are; ``/`` and ``~`` inside a key are escaped as ``~1`` and ``~0``
(as in JSON pointers, RFC 6901), so that an address always names one leaf.

Patterns are globs over whole addresses: ``*`` matches inside one part, ``**`` any number of whole parts (none
included), ``?`` one character, ``{a,b}`` either alternative. A pattern that matches nothing is an error that lists
the nearest addresses.
"""

import difflib
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

__all__ = ["PatternError", "assign", "flatten", "mask", "matches", "path_of", "select", "update"]


class PatternError(ValueError):
    """A pattern matches no leaf, or is not a valid glob."""


def path_of(key_path: Sequence[Any]) -> str:
    """Return the address of a key path as ``jax.tree_util.tree_flatten_with_path`` gives it."""
    return "/".join(_part(key) for key in key_path)


def _part(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute)).replace("~", "~0").replace("/", "~1")
    return str(key)


def flatten(tree: Any) -> dict[str, Any]:
    """Return ``{address: leaf}`` in tree order.

    Raises:
        ValueError: two leaves have the same address (a mapping with the keys ``0`` and ``"0"``).
    """
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {path_of(key_path): leaf for key_path, leaf in leaves}
    if len(flat) != len(leaves):
        seen: set[str] = set()
        double = next(p for p in (path_of(k) for k, _ in leaves) if p in seen or seen.add(p))
        raise ValueError(f"two leaves share the address {double!r}; use keys of one type in a mapping")
    return flat


@functools.lru_cache(maxsize=1024)
def _compile(pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise PatternError("the pattern is empty; use '**' for every leaf")
    return re.compile("|".join(_regex(option) for option in _expand(pattern)))


def _expand(pattern: str) -> list[str]:
    """Write out the alternatives of the first brace, and of all in what that gives."""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, cuts = 0, [start]
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0 or (depth == 1 and pattern[place] == ","):
            cuts.append(place)
        if depth == 0:
            break
    else:
        raise PatternError(f"pattern {pattern!r} has an unclosed '{{'; write {{a,b}} for alternatives")
    options = [pattern[left + 1 : right] for left, right in itertools.pairwise(cuts)]
    head, tail = pattern[:start], pattern[cuts[-1] + 1 :]
    return [whole for option in options for whole in _expand(head + option + tail)]


def _regex(pattern: str) -> str:
    """Translate a glob without braces; a whole-part ``**`` takes the slash after it, or before it at the end."""
    out = ""
    parts = [part for part, after in itertools.pairwise([*pattern.split("/"), ""]) if not part == after == "**"]
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part == "**":
            out = out.removesuffix("/") + ("(?:/[^/]*)*" if out else "(?s:.*)") if last else out + "(?:[^/]*/)*"
        elif "**" in part:
            raise PatternError(f"pattern {pattern!r} has '**' inside a part; it stands for whole parts: 'a/**/b'")
        else:
            out += "".join({"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)) for char in part)
            out += "" if last else "/"
    return out


def matches(path: str, patterns: str | Iterable[str]) -> bool:
    """Tell whether an address matches a pattern, or any of several."""
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    return any(_compile(name).fullmatch(path) is not None for name in names)


def select(tree: Any, patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Return the addresses that match at least one pattern, in tree order.

    Raises:
        PatternError: a pattern matches no leaf of `tree`; the message lists the nearest addresses.

    >>> select({"a": {"w": 1, "b": 2}, "c": 3}, ["a/*"])
    ('a/b', 'a/w')
    """
    names = [patterns] if isinstance(patterns, str) else list(patterns)
    addresses = list(flatten(tree))
    for name in names:
        if not any(matches(address, name) for address in addresses):
            raise PatternError(_nothing(name, addresses))
    return tuple(address for address in addresses if matches(address, names))


def _nothing(pattern: str, addresses: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, addresses, n=3, cutoff=0.0)
    listed = ", ".join(near) if near else "none: the tree has no leaves"
    return f"pattern {pattern!r} matches no leaf; the nearest addresses are: {listed}"


def mask(tree: Any, patterns: str | Iterable[str]) -> Any:
    """Return a pytree of bools shaped like `tree`: True where the address matches (see `select` for errors)."""
    import jax

    chosen = set(select(tree, patterns))
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_of(key_path) in chosen, tree)


def assign(tree: Any, values: Mapping[str, T]) -> Any:
    """Return a pytree shaped like `tree` that holds, for each leaf, the value of the first pattern that matches it.

    Raises:
        PatternError: a pattern matches no leaf, or a leaf is matched by no pattern (end with ``"**"`` for the rest).

    >>> assign({"bias": 0, "kernel": 0}, {"bias": "no decay", "**": "decay"})
    {'bias': 'no decay', 'kernel': 'decay'}
    """
    import jax

    for pattern in values:
        select(tree, pattern)

    def first(key_path: Sequence[Any], _: Any) -> T:
        address = path_of(key_path)
        for pattern, value in values.items():
            if matches(address, pattern):
                return value
        raise PatternError(f"no pattern matches the leaf {address!r}; end with '**' for the rest ({list(values)})")

    return jax.tree_util.tree_map_with_path(first, tree)


def update(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """Return `tree` with the leaves at the given addresses replaced.

    Raises:
        PatternError: an address names no leaf; the message lists the nearest ones.
    """
    import jax

    addresses = list(flatten(tree))
    for address in leaves:
        if address not in addresses:
            raise PatternError(_nothing(address, addresses))
    return jax.tree_util.tree_map_with_path(lambda k, leaf: leaves.get(path_of(k), leaf), tree)
