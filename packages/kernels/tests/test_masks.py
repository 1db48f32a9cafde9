"""Masks against a predicate per pair, and what they promise about blocks they never look at."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_kernels import Mask, causal, chunked, dense, lengths, prefix, segments, window
from dovetail_kernels.masks import Tile

BATCH, HEADS, TIME, SOURCE = 2, 2, 9, 12
RNG = np.random.default_rng(0)
QUERY_IDS, KEY_IDS = RNG.integers(0, 3, (BATCH, TIME)), RNG.integers(0, 3, (BATCH, SOURCE))
ALLOWED = RNG.random((BATCH, HEADS, TIME, SOURCE)) < 0.4
LENGTH = np.array([4, 7])

Predicate = Callable[[int, int, int, int, int, int], bool]
"""Whether head h of row r (at position i) of batch b sees column c (at position j)."""

SIMPLE: list[tuple[Mask, Predicate]] = [
    (causal(), lambda b, h, r, c, i, j: j <= i),
    (window(3), lambda b, h, r, c, i, j: i - j < 3),
    (window(2, 4), lambda b, h, r, c, i, j: i - j < 2 and j - i < 4),
    (chunked(4), lambda b, h, r, c, i, j: i // 4 == j // 4),
    (prefix(5), lambda b, h, r, c, i, j: j < 5),
    (prefix(np.int64(5)), lambda b, h, r, c, i, j: j < 5),
    (prefix(jnp.int32(5)), lambda b, h, r, c, i, j: j < 5),
    (prefix(jnp.asarray(LENGTH)), lambda b, h, r, c, i, j: j < LENGTH[b]),
    (
        segments(jnp.asarray(QUERY_IDS), jnp.asarray(KEY_IDS)),
        lambda b, h, r, c, i, j: QUERY_IDS[b, r] == KEY_IDS[b, c] != 0,
    ),
    (lengths(key=jnp.asarray(LENGTH)), lambda b, h, r, c, i, j: c < LENGTH[b]),
    (lengths(jnp.asarray(LENGTH), jnp.asarray(LENGTH) + 2), lambda b, h, r, c, i, j: r < LENGTH[b] > c - 2),
    (dense(jnp.asarray(ALLOWED)), lambda b, h, r, c, i, j: bool(ALLOWED[b, h, r, c])),
    (dense(jnp.asarray(ALLOWED[0, 0])), lambda b, h, r, c, i, j: bool(ALLOWED[0, 0, r, c])),
]


@st.composite
def masks(draw: st.DrawFn, depth: int = 3) -> tuple[Mask, Predicate]:
    """Draw an expression and its predicate."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(SIMPLE))
    (a, f), (b, g) = draw(masks(depth - 1)), draw(masks(depth - 1))
    if draw(st.booleans()):
        return a & b, lambda *at: f(*at) and g(*at)
    return a | b, lambda *at: f(*at) or g(*at)


def matrix(predicate: Predicate, query_offset: Any, key_offset: Any) -> np.ndarray:
    """Return the whole mask, ``[batch, heads, time, source]``."""
    first, low = (np.broadcast_to(x, (BATCH,)) for x in (query_offset, key_offset))
    out = np.zeros((BATCH, HEADS, TIME, SOURCE), bool)
    for b, h, r, c in np.ndindex(out.shape):
        out[b, h, r, c] = predicate(b, h, r, c, int(first[b] + r), int(low[b] + c))
    return out


@settings(max_examples=300 if os.environ.get("DOVETAIL_SOAK") else 30, deadline=None, derandomize=True)
@given(data=st.data())
def test_expressions(data: st.DataObject) -> None:
    """Blocks outside what a mask promises are never computed: a wrong promise is a silent error."""
    mask, predicate = data.draw(masks())
    offsets = data.draw(
        st.sampled_from(
            [(0, 0), (3, 0), (-2, 5), (np.int64(2), 1), (jnp.int32(4), 1), (jnp.array([0, 6]), jnp.int32(2))]
        )
    )
    expected = matrix(predicate, *offsets)
    row, col = data.draw(st.integers(0, TIME - 1)), data.draw(st.integers(0, SOURCE - 1))
    rows, cols = data.draw(st.integers(1, TIME - row)), data.draw(st.integers(1, SOURCE - col))
    tile = Tile(row, rows, col, cols, *offsets)
    part = expected[:, :, row : row + rows, col : col + cols]
    np.testing.assert_array_equal(np.broadcast_to(mask.keep(tile), part.shape), part, err_msg=str(mask))
    traced = Tile(jnp.int32(row), rows, jnp.int32(col), cols, *offsets)
    np.testing.assert_array_equal(np.broadcast_to(mask.keep(traced), part.shape), part)
    low, high = mask.span(tile)
    assert col <= low <= high <= col + cols
    outside = np.ones(cols, bool)
    outside[low - col : high - col] = False
    assert not part[..., outside].any(), f"{mask}: {low}, {high}"
    assert part.all() or not mask.full(tile)
    if (found := mask.bounds(tile)) is not None:
        begins, ends = (np.broadcast_to(x, (BATCH,)) for x in found)
        for b in range(BATCH):
            at = np.arange(col, col + cols)
            assert not part[b][..., (at < begins[b]) | (at >= ends[b])].any(), f"{mask}: {begins}, {ends}"


def test_what_is_known_is_used() -> None:
    """A span of everything would be right and useless."""
    tile = Tile(256, 128, 0, 1024)
    assert causal().span(tile) == (0, 384)
    assert (causal() & window(100)).span(tile) == (157, 384)
    assert (causal() & chunked(128)).span(tile) == (256, 384)
    assert (prefix(500) | causal()).span(tile) == (0, 500)
    assert prefix(500).full(Tile(0, 1, 0, 500))
    assert causal().full(Tile(256, 128, 0, 257))
    assert not causal().full(Tile(256, 128, 0, 258))
    ids = jnp.repeat(jnp.arange(1, 9, dtype=jnp.int32), 128)[None]
    bounds = (causal() & segments(ids)).bounds(tile)
    assert [int(x[0]) for x in bounds] == [256, 384]
    bounds = causal().bounds(Tile(0, 4, 0, 1024, query_offset=jnp.int32(20)))
    assert [int(x[0]) for x in bounds] == [0, 24]


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_short_offsets(dtype: Any) -> None:
    """An offset of 8 bits plus a row beyond 255 is another row's position: whole blocks of keys would be skipped."""
    tile = Tile(0, 200, 0, 400, query_offset=jnp.asarray(100, dtype), key_offset=jnp.asarray(3, dtype))
    assert [int(x[0]) for x in causal().bounds(tile)] == [0, 297]
    assert [int(x[0]) for x in (prefix(jnp.array([400], jnp.int32)) & window(20)).bounds(tile)] == [78, 397]


def test_wide_segments() -> None:
    """Segments named by 64-bit hashes must not become other segments, nor padding, by losing their upper half."""
    with jax.enable_x64(True):
        mask = segments(jnp.array([[1, 2**32, 2**32 + 1]]), jnp.array([[1]], jnp.int32))
        np.testing.assert_array_equal(mask.keep(Tile(0, 3, 0, 1))[0, 0, :, 0], [True, False, False])
        assert mask.seen((1, 1, 3, 1)).rows.all()


def test_padding() -> None:
    """What is called padding that somebody sees would be zeroed; what nobody sees may hold NaN."""
    ids, matrix = segments(jnp.array([[1, 0, 2]], jnp.int32)), (1, 1, 3, 3)
    short = lengths(key=jnp.array([1], jnp.int32))
    for mask, rows, cols in (
        (causal() | prefix(2), None, None),
        (causal() & ids, [True, False, True], [True, False, True]),
        (ids & short, [True, False, True], [True, False, False]),
        (ids | short, None, [True, False, True]),
        (ids | causal(), None, None),
    ):
        for got, expected in zip(mask.seen(matrix), (rows, cols), strict=True):
            assert (None if got is None else got[0].tolist()) == expected, str(mask)


def test_masks_are_pytrees() -> None:
    """Masks cross jit and vmap; what is static is part of the cache key."""
    ids = jnp.ones((1, 4), jnp.int32)
    mask = (causal() & window(2)) | segments(ids)
    leaves, tree = jax.tree.flatten(mask)
    assert len(leaves) == 2
    assert str(jax.tree.unflatten(tree, leaves)) == str(mask) == "(causal() & window(2)) | segments([batch, time])"
    assert tree != jax.tree.structure((causal() & window(3)) | segments(ids))
    tile = Tile(0, 4, 0, 4)
    np.testing.assert_array_equal(jax.jit(lambda m: m.keep(tile))(mask), mask.keep(tile))


INTEGERS = jnp.ones((2,), jnp.int32)
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: window(0), ValueError, "left=0; expected at least 1"),
    (lambda: window(3, 0), ValueError, "right=0"),
    (lambda: chunked(0), ValueError, r"chunked\(0\)"),
    (lambda: prefix(-1), ValueError, r"prefix\(-1\)"),
    (lambda: prefix(jnp.ones(2)), TypeError, "float32; expected integers"),
    (lambda: prefix(1.5), TypeError, "prefix is 1.5; expected an array of integers"),
    (lambda: segments(jnp.ones((2, 3))), TypeError, "query_ids: dtype float32"),
    (lambda: segments(INTEGERS[None], [[1, 1]]), TypeError, r"key_ids is \[\[1, 1\]\]; expected an array of integers"),
    (lengths, ValueError, "expected query=, key= or both"),
    (lambda: lengths(key=jnp.ones(2)), TypeError, "lengths: key"),
    (lambda: dense(INTEGERS), TypeError, "expected bool"),
    (lambda: causal() & True, TypeError, "True is not a mask"),
    (lambda: causal() | jnp.ones((3, 3), bool), TypeError, "is not a mask"),
    (
        lambda: (causal() & lengths(key=INTEGERS)).check((3, 1, 4, 4)),
        ValueError,
        r"lengths: key has shape \(2,\); .*\(3,\)",
    ),
    (lambda: (causal() | prefix(INTEGERS)).check((3, 1, 4, 4)), ValueError, r"prefix has shape \(2,\)"),
    (
        lambda: segments(jnp.ones((2, 3), jnp.int32)).check((2, 1, 3, 4)),
        ValueError,
        r"key_ids.*\(2, 3\); expected \(2, 4\)",
    ),
    (lambda: dense(jnp.ones((3, 4), bool)).check((2, 1, 4, 4)), ValueError, r"\(1, 1, 3, 4\); expected \(2, 1, 4, 4\)"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_input(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    """A mask that does not fit is refused, not broadcast."""
    with pytest.raises(error, match=message):
        make()
