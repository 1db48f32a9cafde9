"""The pages of a cache: what is written where, in place, and what is read back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import empty_pages, gather_pages, page_slots, update_pages
from dovetail_protocols import QuantizedArray

SHAPE = (5, 2, 4, 6)
IDS, SLOTS = jnp.array([3, -1, 0, 5, 3, 2, 1]), jnp.array([1, 2, 3, 0, 0, 4, -2])
KEPT = np.array([0, 2, 4])


def new(shape: tuple[int, ...] = SHAPE, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal((len(IDS), *shape[1:-2], shape[-1])), dtype)


@pytest.mark.parametrize("shape", [SHAPE, (5, 4, 6)], ids=["heads", "latent"])
def test_tokens_are_written_and_padding_is_not(shape: tuple[int, ...]) -> None:
    """Padding counted from the end lands in another request's page."""
    pool = empty_pages(shape, jnp.float32) + 7.0
    got = np.asarray(update_pages(pool, new(shape), IDS, SLOTS))
    expected = np.full(shape, 7.0, np.float32)
    for token in KEPT:
        expected[int(IDS[token]), ..., int(SLOTS[token]), :] = new(shape)[token]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_a_donated_pool_is_changed_in_place(dtype: str) -> None:
    """Every step would copy the whole cache."""
    pool = empty_pages((500, 2, 16, 64), dtype)
    arguments = (pool, jnp.ones((8, 2, 64)), jnp.arange(8), jnp.arange(8))
    compiled = jax.jit(update_pages, donate_argnums=0).lower(*arguments).compile()
    held = sum(x.nbytes for x in jax.tree.leaves(pool))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < held / 10
    places = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(pool)}
    assert {x.unsafe_buffer_pointer() for x in jax.tree.leaves(compiled(*arguments))} == places


@pytest.mark.parametrize(("dtype", "most", "bound"), [("int8", 127, 0.5 / 127), ("float8_e4m3fn", 448, 2.0**-4)])
def test_rounding(dtype: str, most: float, bound: float) -> None:
    """A token's largest value does not fill the range, zeros become NaN, or huge and tiny tokens are lost."""
    values = new() * jnp.array([1.0, 1, 1e-20, 1, 1e20, 1, 1])[:, None, None]
    values = values.at[2, 1].set(0.0)
    pool = update_pages(empty_pages(SHAPE, dtype), values, IDS, SLOTS)
    assert pool.dtype == jnp.float32
    back, scaled = (np.asarray(x, np.float64)[IDS[KEPT], :, SLOTS[KEPT]] for x in (pool.dequantize(), pool.qvalue))
    wanted = np.asarray(values, np.float64)[KEPT]
    largest = np.abs(wanted).max(-1, keepdims=True)
    assert (np.abs(back - wanted) <= 1.001 * bound * largest).all()
    np.testing.assert_allclose(np.abs(scaled).max(-1), np.where(largest[..., 0] > 0, most, 0))


def test_values_fit_the_scale_that_is_kept() -> None:
    """16-bit scales are rounded: with values of the exact scale every token is too large or too small by that."""
    dense = new((5, 2, 4, 64)) * 3.0
    pool = update_pages(empty_pages((5, 2, 4, 64), "int8", jnp.bfloat16), dense, IDS, SLOTS)
    scale, values = (np.asarray(x, np.float64)[IDS[KEPT], :, SLOTS[KEPT]] for x in (pool.scale, pool.qvalue))
    wanted = np.asarray(dense, np.float64)[KEPT]
    worst = np.maximum(0.501 * scale, np.abs(wanted) - 127 * scale)  # half a step, except beyond the last one
    assert (np.abs(values * scale - wanted) <= worst).all()


def test_ids_of_any_width() -> None:
    """Narrow ids cannot say where a large pool ends; those past 32 bits are written to other requests' pages."""
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        pool = empty_pages((300, 1, 2, 3), dtype)
        written = update_pages(pool, jnp.ones((2, 1, 3)), jnp.array([5, -1], jnp.int8), jnp.array([1, 0], jnp.int8))
        dense = written.dequantize() if isinstance(written, QuantizedArray) else written
        np.testing.assert_allclose(dense, jnp.zeros((300, 1, 2, 3)).at[5, 0, 1].set(1.0), rtol=1e-6)
    with jax.enable_x64(True):
        beyond, zero = jnp.asarray([2**32 + 1]), jnp.asarray([0])
        for ids, slots in ((beyond, zero), (zero, beyond)):
            assert not np.asarray(update_pages(jnp.zeros((3, 2, 4)), jnp.ones((1, 4)), ids, slots)).any()
        tables = jnp.asarray([[2, 1]])
        for rows, positions in ((beyond, zero), (zero, beyond)):
            assert page_slots(tables, rows, positions, 4)[0].tolist() == [-1]


def test_read_back() -> None:
    """A row's copy holds another row's tokens, or what a page held before."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((2, 2, 12, 6)).astype(np.float32)
    pool = jnp.full((7, 2, 4, 6), jnp.nan)
    tables, lengths = jnp.array([[6, 0, 3], [2, -9, 99]]), jnp.array([9, 3])
    for row in range(2):
        at = jnp.arange(lengths[row])
        tokens = jnp.asarray(dense[row, :, : len(at)].transpose(1, 0, 2))
        pool = update_pages(pool, tokens, *page_slots(tables, jnp.full_like(at, row), at, 4))
    got = gather_pages(pool, tables, lengths)
    own = np.arange(12) < np.asarray(lengths)[:, None]
    np.testing.assert_array_equal(got, np.where(own[:, None, :, None], dense, 0))
    latent = gather_pages(pool[:, 0], tables, lengths)
    np.testing.assert_array_equal(latent, got[:, 0])
    scale = jnp.full((7, 2, 4, 1), 2.0)
    doubled = gather_pages(QuantizedArray(pool.astype(jnp.float8_e4m3fn), scale), tables, lengths)
    np.testing.assert_allclose(doubled, 2 * got, rtol=0.07, atol=0.01)
    empty = gather_pages(pool[:0], tables, jnp.array([0, 0]))
    np.testing.assert_array_equal(empty, np.zeros(got.shape))


def test_slots() -> None:
    """A token past its table, or of no row, gets a page."""
    tables = jnp.array([[5, 2], [1, 0]])
    rows, positions = jnp.array([0, 1, 1, -1, 2, 0, 0]), jnp.array([3, 4, 0, 0, 0, 8, -1])
    pages, slots = page_slots(tables, rows, positions, 4)
    np.testing.assert_array_equal(pages, [5, 0, 1, -1, -1, -1, -1])
    np.testing.assert_array_equal(slots[:3], [3, 0, 0])
    pages, _ = page_slots(tables[:, :0], rows, positions, 4)
    np.testing.assert_array_equal(pages, [-1] * 7)


def test_heads_over_devices() -> None:
    """A sharded pool is gathered to be written."""
    mesh = jax.make_mesh((2,), ("kv",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    heads, whole = (NamedSharding(mesh, PartitionSpec(*x)) for x in ((None, "kv"), ()))
    pool = empty_pages(SHAPE, jnp.float32)
    expected = update_pages(pool, new(), IDS, SLOTS)
    placed = (*(jax.device_put(x, heads) for x in (pool, new())), *(jax.device_put(x, whole) for x in (IDS, SLOTS)))
    compiled = jax.jit(update_pages, donate_argnums=0, out_shardings=heads).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_array_equal(compiled(*placed), expected)
    specs = (heads.spec, heads.spec, whole.spec, whole.spec)
    mapped = jax.shard_map(update_pages, mesh=mesh, in_specs=specs, out_specs=heads.spec)
    np.testing.assert_array_equal(mapped(pool, new(), IDS, SLOTS), expected)


@pytest.mark.usefixtures("untyped")
def test_bad_input() -> None:
    """A pool in another layout would be broadcast into, and a coarser scale overwritten."""
    pool = empty_pages(SHAPE, jnp.float32)
    for arguments in (
        (pool[0], new(), IDS, SLOTS),
        (pool, new()[:, :1], IDS, SLOTS),
        (pool, new(), IDS[:1], SLOTS),
        (pool, new()[:, 0], IDS, SLOTS),
    ):
        with pytest.raises(ValueError, match=r"expected \[pages, kv_heads, page_size, dim\]"):
            update_pages(*arguments)
    coarse = QuantizedArray(pool.astype(jnp.int8), jnp.ones((1, 2, 1, 1)))
    with pytest.raises(ValueError, match=r"scales \(1, 2, 1, 1\) .* expected \(5, 2, 4, 1\)"):
        update_pages(coarse, new(), IDS, SLOTS)
    with pytest.raises(ValueError, match=r"shape=\(4,\); expected \(pages"):
        empty_pages((4,), jnp.float32)
    with pytest.raises(ValueError, match="page_size=0; expected at least 1"):
        page_slots(jnp.array([[5]]), jnp.array([0]), jnp.array([0]), 0)
    for dtype in (jnp.int32, jnp.float8_e5m2, bool):
        with pytest.raises(TypeError, match="expected a float of 16 bits or more"):
            empty_pages(SHAPE, dtype)
