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
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax

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
    out, depth, i = "", 0, 0
    while i < len(pattern):
        char = pattern[i]
        if pattern.startswith("**/", i) and (i == 0 or pattern[i - 1] == "/"):
            out, i = out + "(?:[^/]+/)*", i + 3
            continue
        if pattern.startswith("/**", i) and i + 3 == len(pattern):
            out, i = out + "(?:/[^/]+)*", i + 3
            continue
        if pattern.startswith("**", i):
            out, i = out + ".*", i + 2
            continue
        if char == "{":
            depth, piece = depth + 1, "(?:"
        elif char == "}" and depth:
            depth, piece = depth - 1, ")"
        elif char == "," and depth:
            piece = "|"
        else:
            piece = {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char))
        out, i = out + piece, i + 1
    if depth:
        raise PatternError(f"pattern {pattern!r} has an unclosed '{{'; write {{a,b}} for alternatives")
    return re.compile(out)


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
    chosen = set(select(tree, patterns))
    return jax.tree_util.tree_map_with_path(lambda key_path, _: path_of(key_path) in chosen, tree)


def assign(tree: Any, values: Mapping[str, T]) -> Any:
    """Return a pytree shaped like `tree` that holds, for each leaf, the value of the first pattern that matches it.

    Raises:
        PatternError: a pattern matches no leaf, or a leaf is matched by no pattern (end with ``"**"`` for the rest).

    >>> assign({"bias": 0, "kernel": 0}, {"bias": "no decay", "**": "decay"})
    {'bias': 'no decay', 'kernel': 'decay'}
    """
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
    addresses = list(flatten(tree))
    for address in leaves:
        if address not in addresses:
            raise PatternError(_nothing(address, addresses))
    return jax.tree_util.tree_map_with_path(lambda k, leaf: leaves.get(path_of(k), leaf), tree)
