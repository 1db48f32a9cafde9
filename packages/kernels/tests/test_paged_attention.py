"""Paged attention against a float64 NumPy form that reads each row token by token, and under transformations."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import (
    attention,
    causal,
    configured,
    empty_pages,
    merge,
    page_slots,
    paged_attention,
    paged_latent_attention,
    update_pages,
)
from dovetail_protocols import QuantizedArray

SMALL = configured("blocked", keys=6, lanes=(3, 2), sizes=(1, 4))
IMPLEMENTATIONS = ["reference", SMALL]
NAMES = ["reference", "blocked"]


class Case(NamedTuple):
    """Rows with `lengths` cached tokens, the last `new` of each with a query; `ragged` shuffles the tokens."""

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    ragged: bool = False
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    page_size: int = 4
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None


CASES = {
    "decode": Case((9, 30, 1, 17), (1, 1, 1, 1)),
    "one row": Case((1,), (1,)),
    "empty rows": Case((0, 7, 0, 0), (1, 1, 1, 1), sinks=True),
    "all empty": Case((0, 0), (1, 1)),
    "several tokens": Case((9, 40, 3), (3, 3, 3)),
    "more tokens than cached": Case((9, 1, 3), (3, 3, 3)),
    "pages of one": Case((9, 30, 1), (1, 1, 1), page_size=1),
    "pages of sixteen": Case((70, 33), (1, 1), page_size=16, heads=3, kv_heads=1),
    "odd pages": Case((70, 33), (1, 1), page_size=7, heads=2),
    "odd dims": Case((20, 5), (1, 1), key_dim=5, value_dim=3, scale=0.3),
    "window": Case((90, 3, 40), (2, 2, 2), window=10),
    "window of one": Case((90, 3), (1, 1), window=1),
    "capped": Case((90, 3), (1, 1), softcap=0.7, sinks=True),
    "mixed": Case((30, 0, 9, 150, 1), (1, 0, 9, 100, 1), ragged=True),
    "prefill": Case((140,), (140,), ragged=True),
    "chunk with context": Case((160, 70), (129, 3), ragged=True, window=40, sinks=True, softcap=2.0),
    "one token of few": Case((50, 20, 7), (0, 1, 0), ragged=True),
}


class Made(NamedTuple):
    """A call, and what it is of: the dense keys and values of each row."""

    arguments: dict[str, Any]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    rows: np.ndarray
    positions: np.ndarray


def make(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> Made:
    """Scatter rows over the pages of a pool of NaN; tables are garbage where no token needs them."""
    rng = np.random.default_rng(seed)
    needed = [-(-length // case.page_size) for length in case.lengths]
    width, count = max(needed) + 2, sum(needed) + 3
    free = iter(rng.permutation(count).tolist())
    tables = rng.integers(-5, count + 5, (len(case.lengths), width))
    pools = [np.full((count, case.kv_heads, case.page_size, d), np.nan) for d in (case.key_dim, case.value_dim)]
    dense: list[list[np.ndarray]] = [[], []]
    for row, length in enumerate(case.lengths):
        tables[row, : needed[row]] = [next(free) for _ in range(needed[row])]
        at = np.arange(length)
        for pool, found in zip(pools, dense, strict=True):
            x = np.asarray(jnp.asarray(rng.standard_normal((length, case.kv_heads, pool.shape[3])), dtype), np.float64)
            pool[tables[row, at // case.page_size], :, at % case.page_size] = x
            found.append(x)
    rows = np.repeat(np.arange(len(case.lengths)), case.new)
    spans = [np.arange(n - m, n) for n, m in zip(case.lengths, case.new, strict=True)]
    positions = np.concatenate(spans)
    if case.ragged:  # in any order, with padding
        order = rng.permutation(len(rows) + 3)
        rows = np.concatenate([rows, [-1, -7, len(case.lengths)]])[order]
        positions = np.concatenate([positions, [0, 500, 3]])[order]
    arguments = {
        "query": jnp.asarray(rng.standard_normal((len(rows), case.heads, case.key_dim)), dtype),
        "key_pages": jnp.asarray(pools[0], dtype),
        "value_pages": jnp.asarray(pools[1], dtype),
        "tables": jnp.asarray(tables, jnp.int32),
        "lengths": jnp.asarray(case.lengths, jnp.int32),
    }
    if case.ragged:
        arguments |= {"rows": jnp.asarray(rows, jnp.int32), "positions": jnp.asarray(positions, jnp.int32)}
    if case.sinks:
        arguments["sinks"] = jnp.asarray(rng.standard_normal(case.heads), dtype)
    return Made(arguments, *dense, rows, positions)


def truth(case: Case, made: Made) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp, one query token and head at a time."""
    query = np.asarray(made.arguments["query"], np.float64)
    sinks = np.asarray(made.arguments["sinks"], np.float64) if case.sinks else np.full(case.heads, -np.inf)
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    out, lse = np.zeros((*query.shape[:2], case.value_dim)), np.full(query.shape[:2], -np.inf)
    for token, (row, position) in enumerate(zip(made.rows, made.positions, strict=True)):
        inside = 0 <= row < len(case.lengths)
        high = min(position + 1, case.lengths[row]) if inside else 0
        low = 0 if case.window is None else max(0, position - case.window + 1)
        for head in range(case.heads):
            kv = head // (case.heads // case.kv_heads)
            keys, values = (x[row if inside else 0][low : max(low, high), kv] for x in (made.keys, made.values))
            z = keys @ query[token, head] * scale
            z = z if case.softcap is None else case.softcap * np.tanh(z / case.softcap)
            total = np.exp(z).sum() + np.exp(sinks[head])
            if total:
                out[token, head], lse[token, head] = np.exp(z) @ values / total, np.log(total)
    return out, lse


def compare(case: Case, implementation: Any, dtype: Any, tolerance: float) -> None:
    """Compare with the truth, relative to the largest value."""
    made = make(case, dtype)
    options = {"window": case.window, "softcap": case.softcap, "scale": case.scale, "implementation": implementation}
    got = jax.jit(functools.partial(paged_attention, **options, return_lse=True))(**made.arguments)
    for name, b in zip(got._fields, truth(case, made), strict=True):
        a = getattr(got, name)
        assert a.shape == b.shape
        assert name == "lse" or a.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        error = np.abs(np.where(np.isfinite(b), np.asarray(a, np.float64) - np.where(np.isfinite(b), b, 0), 0)).max()
        assert error < tolerance * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0)), f"{name}: {error}"


@pytest.mark.thin(2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case: Case) -> None:
    """Serving answers from the wrong pages, or lets another request's NaN in."""
    compare(case, SMALL, jnp.float32, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("name", ["several tokens", "chunk with context"])
def test_every_implementation(name: str, implementation: str) -> None:
    """The textbook form, or the blocks that are used by default, disagree with the truth."""
    compare(CASES[name], implementation, jnp.float32, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", SMALL], ids=["reference", "blocked"])
def test_other_dtypes(implementation: Any) -> None:
    """16-bit caches keep a float32 softmax; float64 is not computed in float32 on the way."""
    compare(CASES["window"], implementation, jnp.bfloat16, 2e-2)
    with jax.enable_x64(True):
        compare(
            CASES["window"] if implementation == "reference" else CASES["mixed"], implementation, jnp.float64, 1e-13
        )


@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Lengths, pages and block sizes nobody thought of agree with the truth."""
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))
    new = [data.draw(st.integers(0, length)) for length in lengths]
    case = Case(
        tuple(lengths),
        tuple(new),
        ragged=True,
        heads=2,
        kv_heads=data.draw(st.integers(1, 2)),
        key_dim=data.draw(st.integers(1, 3)),
        value_dim=data.draw(st.integers(1, 3)),
        page_size=data.draw(st.integers(1, 20)),
        window=data.draw(st.none() | st.integers(1, 30)),
        sinks=data.draw(st.booleans()),
    )
    sizes = data.draw(st.sampled_from([(1,), (7,), (1, 8), (2, 3, 16)]))
    lanes = tuple(data.draw(st.integers(1, 9)) for _ in sizes)
    blocked = configured("blocked", keys=data.draw(st.integers(1, 70)), lanes=lanes, sizes=sizes)
    compare(case, blocked, jnp.float32, 2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
def test_nan_of_one_row_stays_there(implementation: Any) -> None:
    """A broken model's row poisons the rows that are decoded next to it."""
    made = make(CASES["decode"])
    broken = dict(made.arguments)
    at = np.asarray(broken["tables"])[1, 0]
    broken["key_pages"] = broken["key_pages"].at[at].set(jnp.nan)
    broken["value_pages"] = broken["value_pages"].at[at].set(jnp.nan)
    out, expected = (paged_attention(**x, implementation=implementation) for x in (broken, made.arguments))
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(np.asarray(out)[others], np.asarray(expected)[others], atol=1e-6)
    assert np.isnan(out[1]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
def test_nan_that_no_token_sees(implementation: Any) -> None:
    """Pages before the window that a server has freed, or tokens that were rejected, poison their own row."""
    case = Case((30, 17), (2, 1), window=5, ragged=True)
    made = make(case)
    spoilt, tables = dict(made.arguments), np.asarray(made.arguments["tables"])
    positions = jnp.where(spoilt["rows"] == 1, spoilt["positions"] - 6, spoilt["positions"])
    for name in ("key_pages", "value_pages"):  # row 0 sees 24 to 29, row 1 sees 6 to 10, in pages of 4
        ids = np.concatenate([tables[0, :6], tables[1, [0, 3]]])
        spoilt[name] = spoilt[name].at[ids].set(jnp.nan).at[tables[1, 2], :, 3].set(jnp.nan)
    call = jax.jit(functools.partial(paged_attention, window=5, implementation=implementation))
    got, expected = (call(**x | {"positions": positions}) for x in (spoilt, made.arguments))
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_ids_past_32_bits() -> None:
    """They become those of another request's row, or of tokens that it has not written yet."""
    made = make(CASES["decode"])
    with jax.enable_x64(True):
        rows, positions = jnp.asarray([0, 2**32, 0, 0]), jnp.asarray([8, 8, 2**32 + 2, 2])
        got = np.asarray(paged_attention(**made.arguments, rows=rows, positions=positions, implementation="reference"))
        last = paged_attention(**made.arguments, rows=rows * 0, positions=positions * 0 + 8, implementation="reference")
    assert not got[1].any()
    np.testing.assert_allclose(got[2], last[2], atol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_empty_axes_give_zeros(implementation: str) -> None:
    """No rows, no tokens or no pages is a clean result, not a crash in a loop over nothing."""
    pool = jnp.ones((3, 1, 2, 4))
    for tokens, rows, width in ((0, 0, 3), (0, 2, 3), (2, 2, 0)):
        tables, lengths = jnp.zeros((rows, width), jnp.int32), jnp.zeros(rows, jnp.int32)
        query = jnp.ones((tokens, 2, 4))
        out, lse = paged_attention(query, pool, pool, tables, lengths, return_lse=True, implementation=implementation)
        assert out.shape == query.shape
        assert not np.asarray(out).any()
        assert np.isneginf(lse).all()


def test_parts_merge() -> None:
    """A prefix cache or a chunk beside its context adds up parts by their log-sum-exps."""
    rng = np.random.default_rng(1)
    time, context, dim = 6, 10, 4
    q, k, v = (jnp.asarray(rng.standard_normal((context + time, 2, dim)), jnp.float32) for _ in range(3))
    pools = [x[:12].reshape(3, 4, 2, dim).transpose(0, 2, 1, 3) for x in (k, v)]
    tables, lengths = jnp.arange(3, dtype=jnp.int32)[None], jnp.array([context], jnp.int32)
    at = jnp.arange(context, context + time, dtype=jnp.int32)
    before = paged_attention(
        q[context:], *pools, tables, lengths, rows=jnp.zeros(time, jnp.int32), positions=at, return_lse=True
    )
    inside = attention(*(x[None, context:] for x in (q, k, v)), causal(), return_lse=True)
    both = merge([before, type(before)(inside.out[0], inside.lse[0])])
    whole = attention(*(x[None] for x in (q, k, v)), causal())[0, context:]
    np.testing.assert_allclose(both.out, whole, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantized_pages(dtype: str, implementation: Any) -> None:
    """A quantized cache is wrong by more than its rounding, or its unused scales poison a row."""
    case = CASES["decode"]
    made = make(case)
    pools, dense = [], []
    for name, exact in (("key_pages", made.keys), ("value_pages", made.values)):
        pool = made.arguments[name]
        held = empty_pages(pool.shape, dtype)
        held = QuantizedArray(held.qvalue, jnp.full_like(held.scale, jnp.nan), dtype=held.dtype)
        rounded = []
        for row, x in enumerate(exact):
            at = jnp.arange(len(x), dtype=jnp.int32)
            places = page_slots(made.arguments["tables"], jnp.full_like(at, row), at, case.page_size)
            held = update_pages(held, jnp.asarray(x, jnp.float32), *places)
            back = np.asarray(held.dequantize(), np.float64)[places[0], :, places[1]]
            worst = np.abs(x).max(-1, keepdims=True) * (0.5 / 127 if dtype == "int8" else 2.0**-4)
            assert (np.abs(back - x) <= worst * 1.001).all()
            rounded.append(back)
        pools.append(held)
        dense.append(rounded)
    arguments = made.arguments | {"key_pages": pools[0], "value_pages": pools[1]}
    got = jax.jit(functools.partial(paged_attention, implementation=implementation))(**arguments)
    expected, _ = truth(case, made._replace(keys=dense[0], values=dense[1]))
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_latent(dtype: str, implementation: Any) -> None:
    """An absorbed latent cache is attention with one key for all heads whose first part is the value."""
    case = CASES["decode" if dtype == "float32" else "chunk with context"]._replace(
        window=None, sinks=False, softcap=None, kv_heads=1, key_dim=7, value_dim=5, scale=0.4
    )
    made = make(case)
    pages = made.arguments["key_pages"][:, 0]
    if dtype == "int8":
        scale = jnp.max(jnp.abs(pages), -1, keepdims=True) / 127
        qvalue = jnp.where(jnp.isnan(scale), 0, jnp.round(pages / scale)).astype(jnp.int8)
        pages = QuantizedArray(qvalue, scale, dtype=jnp.dtype("float32"))
    arguments = {k: v for k, v in made.arguments.items() if k not in ("key_pages", "value_pages")}
    query = arguments.pop("query")
    got = jax.jit(functools.partial(paged_latent_attention, latent_dim=5, scale=0.4, implementation=implementation))(
        query, pages, **arguments
    )
    expected, _ = truth(case, made._replace(values=[x[..., :5] for x in made.keys]))
    np.testing.assert_allclose(got, expected, atol=1e-5 if dtype == "float32" else 3e-2)


def test_composes_with_vmap_and_checkpoint() -> None:
    """An ensemble over one cache, or a rematerialised scorer, gets other values."""
    made = make(CASES["several tokens"])
    query, *rest = made.arguments.values()
    queries = jnp.stack([query, -query])
    expected = [paged_attention(q, *rest) for q in queries]
    mapped = jax.jit(jax.vmap(jax.checkpoint(lambda q: paged_attention(q, *rest))))(queries)
    np.testing.assert_allclose(mapped, expected, atol=1e-6)


def test_gradients_of_the_reference() -> None:
    """Distillation through a cache differentiates the reference; the blocked form refuses rather than being wrong."""
    made = make(CASES["window"])
    query, *rest = made.arguments.values()

    def total(implementation: str, query: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(paged_attention(query, *rest, window=10, implementation=implementation)))

    gradient = jax.grad(functools.partial(total, "reference"))(query)
    step = jnp.asarray(np.random.default_rng(2).standard_normal(query.shape), jnp.float32)
    _, slope = jax.jvp(functools.partial(total, "blocked"), (query,), (step,))
    np.testing.assert_allclose(jnp.sum(gradient * step), slope, rtol=1e-4)
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match=r"[Rr]everse-mode"):
        jax.jit(jax.grad(functools.partial(total, "blocked")))(query)


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", ["decode", "mixed"])
def test_composes_with_shardings(name: str) -> None:
    """Heads over devices, by the partitioner and by shard_map, give one device's values without moving the pool."""
    made = make(CASES[name]._replace(heads=16, kv_heads=8))
    mesh = jax.make_mesh((8,), ("kv",), axis_types=(jax.sharding.AxisType.Auto,))
    heads, whole = PartitionSpec(None, "kv"), PartitionSpec()
    specs = {k: heads if k in ("query", "key_pages", "value_pages") else whole for k in made.arguments}

    def call(arguments: dict[str, Any]) -> jax.Array:
        return paged_attention(**arguments)

    expected = jax.jit(call)(made.arguments)
    placed = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in made.arguments.items()}
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(specs,), out_specs=heads)
    for function in (call, mapped):
        compiled = jax.jit(function).lower(placed).compile()
        np.testing.assert_allclose(compiled(placed), expected, atol=1e-6)
    assert "all-gather" not in compiled.as_text()


def test_rows_over_devices() -> None:
    """Each device decodes its rows from its own pool."""
    made = make(Case((9, 30, 1, 17, 3, 0, 8, 12), (1,) * 8))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    mapped = jax.shard_map(paged_attention, mesh=mesh, in_specs=(rows, whole, whole, rows, rows), out_specs=rows)
    got = jax.jit(mapped)(*made.arguments.values())
    np.testing.assert_allclose(got, paged_attention(**made.arguments), atol=1e-6)


def test_work_and_memory_do_not_follow_the_table() -> None:
    """A table as wide as the longest request allows makes every step cost and hold as much as that request."""

    def compiled(width: int) -> Any:
        pool = jax.ShapeDtypeStruct((4 * width, 2, 16, 32), jnp.float32)
        tables = jax.ShapeDtypeStruct((4, width), jnp.int32)
        lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
        query = jax.ShapeDtypeStruct((4, 8, 32), jnp.float32)
        return jax.jit(paged_attention).lower(query, pool, pool, tables, lengths).compile()

    narrow, wide = compiled(128), compiled(1024)  # both with work for all lanes
    assert wide.cost_analysis()["flops"] < 1.1 * narrow.cost_analysis()["flops"]
    tables = 2 * 4 * 1024 * 4
    assert wide.memory_analysis().temp_size_in_bytes < narrow.memory_analysis().temp_size_in_bytes + 4 * tables


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_pool_is_never_copied_or_converted_whole(dtype: str) -> None:
    """The memory that a quantized cache saves is spent on its conversion."""
    pool = jax.eval_shape(lambda: empty_pages((2000, 2, 16, 32), dtype))
    tables, lengths = jax.ShapeDtypeStruct((4, 16), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    query = jax.ShapeDtypeStruct((4, 8, 32), jnp.float32)
    compiled = jax.jit(paged_attention).lower(query, pool, pool, tables, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**19


POOL, QUERY = jnp.ones((5, 2, 4, 8)), jnp.ones((2, 4, 8))
TABLES, LENGTHS = jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32)
INTS = jnp.zeros(2, jnp.int32)
BAD: list[tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ("query rank", (QUERY[0], POOL, POOL, TABLES, LENGTHS), {}, ValueError, r"query \(4, 8\)"),
    ("key dim", (QUERY, POOL[..., :7], POOL, TABLES, LENGTHS), {}, ValueError, "share key_dim"),
    ("pages", (QUERY, POOL, POOL[:4], TABLES, LENGTHS), {}, ValueError, "keys and values pages"),
    ("heads", (QUERY[:, :3], POOL, POOL, TABLES, LENGTHS), {}, ValueError, "heads 3 must be a multiple of kv_heads 2"),
    ("lengths", (QUERY, POOL, POOL, TABLES, LENGTHS[:1]), {}, ValueError, r"tables \(2, 3\), lengths \(1,\)"),
    ("tokens", (jnp.ones((3, 4, 8)), POOL, POOL, TABLES, LENGTHS), {}, ValueError, "3 tokens of 2 rows"),
    ("rows", (QUERY, POOL, POOL, TABLES, LENGTHS), {"rows": INTS[:1]}, ValueError, r"rows have shape \(1,\)"),
    ("positions", (QUERY, POOL, POOL, TABLES, LENGTHS), {"rows": INTS}, ValueError, "rows without positions"),
    ("window", (QUERY, POOL, POOL, TABLES, LENGTHS), {"window": 0}, ValueError, "window=0"),
    ("softcap", (QUERY, POOL, POOL, TABLES, LENGTHS), {"softcap": -1.0}, ValueError, "softcap=-1.0"),
    ("sinks", (QUERY, POOL, POOL, TABLES, LENGTHS), {"sinks": jnp.ones(2)}, ValueError, r"\(2,\); expected \(4,\)"),
    ("float tables", (QUERY, POOL, POOL, QUERY[:, 0], LENGTHS), {}, TypeError, "tables: dtype float32"),
    ("integer query", (QUERY.astype(int), POOL, POOL, TABLES, LENGTHS), {}, TypeError, "query has dtype int32"),
    ("integer pages", (QUERY, POOL.astype(int), POOL, TABLES, LENGTHS), {}, TypeError, "or a QuantizedArray"),
    ("name", (QUERY, POOL, POOL, TABLES, LENGTHS), {"implementation": "flash"}, ValueError, "expected one of"),
]  # fmt: skip


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "error", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, error: Any, message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(error, match=message):
        paged_attention(*arrays, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_latent() -> None:
    """A pool of keys and values is no pool of latents."""
    for pool, latent in ((POOL, 4), (POOL[:, 0], 9), (POOL[:, 0], 0)):
        with pytest.raises(ValueError, match=r"expected \[pages, page_size, latent_dim \+ rope_dim\]"):
            paged_latent_attention(QUERY, pool, TABLES, LENGTHS, latent_dim=latent, scale=1.0)
