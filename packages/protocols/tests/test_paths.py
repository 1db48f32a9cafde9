"""Addresses and the glob matcher, against a brute-force matcher that tries every way to cut a path."""

import collections
import re

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_protocols import paths


def brute(pattern: str, path: str) -> bool:
    """Match by expanding braces, then part by part; independent of regular expressions."""
    return any(_parts(option.split("/"), path.split("/")) for option in _expand(pattern))


def _expand(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [final for option in match[1].split(",") for final in _expand(head + option + tail)]


def _parts(patterns: list[str], parts: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_parts(patterns[1:], parts[cut:]) for cut in range(len(parts) + 1))
    return bool(parts) and _chars(patterns[0], parts[0]) and _parts(patterns[1:], parts[1:])


def _chars(pattern: str, part: str) -> bool:
    if not pattern:
        return not part
    if pattern[0] == "*":
        return any(_chars(pattern[1:], part[cut:]) for cut in range(len(part) + 1))
    return bool(part) and pattern[0] in ("?", part[0]) and _chars(pattern[1:], part[1:])


PIECES = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "*",
        "?",
        "**",
        "a*",
        "*b",
        "{a,b}",
        "{a,ab}b",
        "a?",
        "{a,*b}",
        "{**,b}",
        "{a/**,b/a}",
        "{a,{b,ab/**}}",
        "x.y",
        "[a]",
    ]
)
PATHS = st.lists(st.sampled_from(["a", "b", "ab", "aab", "bb", "x.y", "xzy", "[a]", "0"]), min_size=1, max_size=4)


@settings(max_examples=500, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=4).map("/".join), PATHS.map("/".join))
def test_matches_like_brute_force(pattern, path):
    assert paths.matches(path, pattern) == brute(pattern, path)


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("**", "a", True),
        ("**", "a/b/c", True),
        ("**", "", True),
        ("a/**", "a", True),
        ("a/**", "a/b/c", True),
        ("a/**", "ab", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/b/kernel", True),
        ("**/kernel", "a/mykernel", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "a/xb", False),
        ("*", "a/b", False),
        ("layers/*/kernel", "layers/0/kernel", True),
        ("layers/?/kernel", "layers/10/kernel", False),
        ("{query,key}/kernel", "key/kernel", True),
        ("{query,key}/kernel", "value/kernel", False),
        ("{a,b/c}", "b/c", True),
        ("{a/**,b}/w", "a/x/w", True),
        ("{a,{b,c}}", "c", True),
        ("{a/**,b}/w", "a/w", True),
        ("{**/kernel,bias}", "kernel", True),
        ("{a/**,b}", "a", True),
        ("a/**/**", "a", True),
        ("**/**", "a/b", True),
        ("a.b", "axb", False),
        ("a+", "aa", False),
        ("a}b", "a}b", True),
        ("a,b", "a,b", True),
    ],
)
def test_documented_cases(pattern, path, expected):
    assert paths.matches(path, pattern) is expected


KEYS = st.text(alphabet="ab/~*01 é", min_size=1, max_size=4)


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, st.integers(), min_size=1, max_size=3), min_size=1, max_size=4))
def test_every_leaf_has_an_address_of_its_own(tree):
    """Keys with slashes and tildes must not collide: addresses decode back to the keys (RFC 6901)."""
    flat = paths.flatten(tree)
    decoded = {tuple(p.replace("~1", "/").replace("~0", "~") for p in path.split("/")): v for path, v in flat.items()}
    assert decoded == {(a, b): value for a, inner in tree.items() for b, value in inner.items()}


Pair = collections.namedtuple("Pair", "first second")


def test_sequences_attributes_and_mappings_are_written_as_they_are():
    tree = {"x": [1, Pair(2, (3,))], "y": None}
    assert paths.flatten(tree) == {"x/0": 1, "x/1/first": 2, "x/1/second/0": 3}
    assert paths.flatten(5) == {"": 5}
    assert paths.select(5, "**") == ("",)


def test_flatten_refuses_two_leaves_of_one_address():
    @jax.tree_util.register_pytree_with_keys_class
    class Twice:
        def tree_flatten_with_keys(self):
            key = jax.tree_util.DictKey("same")
            return ((key, 1), (key, 2)), None

        def tree_unflatten(self, aux, children):
            return self

    with pytest.raises(ValueError, match="'same'"):
        paths.flatten(Twice())


def test_select_keeps_tree_order_and_names_the_nearest():
    tree = {"b": {"kernel": 1, "bias": 2}, "a": {"kernel": 3}}
    assert paths.select(tree, ["b/*", "**/kernel"]) == ("a/kernel", "b/bias", "b/kernel")
    with pytest.raises(paths.PatternError, match=r"'b/kernl'.*b/kernel"):
        paths.select(tree, ["**", "b/kernl"])
    with pytest.raises(paths.PatternError, match="no leaves"):
        paths.select({}, "**")


@pytest.mark.parametrize("pattern", ["", "{a,b", "a/{b", "a**", "**b/c", "***"])
def test_invalid_globs_are_refused(pattern):
    with pytest.raises(paths.PatternError):
        paths.matches("a", pattern)


def test_mask_assign_update():
    tree = {"a": {"w": 1, "b": 2}, "c": 3}
    assert paths.mask(tree, "a/*") == {"a": {"w": True, "b": True}, "c": False}
    assert paths.assign(tree, {"**/w": "x", "**": "y"}) == {"a": {"w": "x", "b": "y"}, "c": "y"}
    assert paths.update(tree, {"a/w": 10, "c": None}) == {"a": {"w": 10, "b": 2}, "c": None}
    with pytest.raises(paths.PatternError, match="'c'"):
        paths.assign(tree, {"a/*": 1})
    with pytest.raises(paths.PatternError, match="matches no leaf"):
        paths.assign(tree, {"**": 1, "zz": 2})
    with pytest.raises(paths.PatternError, match=r"'a/v'.*a/w"):
        paths.update(tree, {"a/v": 1})
