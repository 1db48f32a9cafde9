"""Attention against a float64 NumPy loop, and the implementations against each other."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import _blocked, attention


class Case(NamedTuple):
    """One call; `segments` is ``None``, ``"packed"`` (several, with padding) or ``"blank"`` (all padding)."""

    time: int
    source: int | None = None
    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 4
    value_dim: int = 4
    causal: bool = True
    window: int | None = None
    segments: str | None = None
    scale: float | None = None
    batch: int = 2


CASES = [
    Case(1),
    Case(7),
    Case(7, heads=4, kv_heads=2, key_dim=8, value_dim=3),
    Case(7, heads=4, kv_heads=1, causal=False),
    Case(7, source=5, causal=False, heads=4, value_dim=6),
    Case(5, source=300, causal=False, kv_heads=1),
    Case(300, source=7, causal=False),
    Case(128),
    Case(129, heads=4, kv_heads=2),
    Case(129, window=1),
    Case(129, window=128, segments="packed"),
    Case(300, window=17, heads=4, kv_heads=1, scale=0.3),
    Case(300, window=1000),
    Case(300, segments="packed", value_dim=7),
    Case(300, segments="packed", causal=False, scale=-0.7),
    Case(7, segments="blank"),
    Case(2200, heads=2, kv_heads=1, batch=1, key_dim=2, value_dim=3, window=150, segments="packed"),
]


def make(case: Case, dtype: Any = np.float64, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Return query, key and value, a cotangent of the output, and the segments."""
    rng = np.random.default_rng(seed)
    source = case.time if case.source is None else case.source
    shapes = (
        (case.batch, case.time, case.heads, case.key_dim),
        (case.batch, source, case.kv_heads, case.key_dim),
        (case.batch, source, case.kv_heads, case.value_dim),
        (case.batch, case.time, case.heads, case.value_dim),
    )
    *qkv, cotangent = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    segments = None
    if case.segments == "packed":
        cuts = np.sort(rng.integers(0, 5, (case.batch, case.time)), axis=1)
        segments = np.where(cuts == 4, 0, cuts + 1).astype(np.int32)
        segments[0, : min(3, case.time)] = 0
    elif case.segments == "blank":
        segments = np.zeros((case.batch, case.time), np.int32)
    return qkv, cotangent, segments


def truth(case: Case, qkv: list[np.ndarray], cotangent: np.ndarray, segments: np.ndarray | None) -> list[np.ndarray]:
    """Output and gradients of query, key and value, one query at a time in float64."""
    q, k, v = (x.astype(np.float64) for x in qkv)
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    out, dq, dk, dv = np.zeros(cotangent.shape), np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, t, h in np.ndindex(q.shape[:3]):
        g = h // (case.heads // case.kv_heads)
        seen = np.arange(k.shape[1])
        if case.causal:
            seen = seen[seen <= t]
        if case.window is not None:
            seen = seen[seen > t - case.window]
        if segments is not None:
            seen = seen[(segments[b, seen] == segments[b, t]) & (segments[b, t] != 0)]
        if not seen.size:
            continue
        keys, values = k[b, seen, g], v[b, seen, g]
        logits = keys @ q[b, t, h] * scale
        p = np.exp(logits - logits.max())
        p /= p.sum()
        out[b, t, h] = p @ values
        ds = p * (values @ cotangent[b, t, h] - out[b, t, h] @ cotangent[b, t, h]) * scale
        dq[b, t, h] = ds @ keys
        dk[b, seen, g] += ds[:, None] * q[b, t, h]
        dv[b, seen, g] += p[:, None] * cotangent[b, t, h]
    return [out, dq, dk, dv]


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(
    case: Case, implementation: Any, qkv: list[jax.Array], cotangent: jax.Array, segments: jax.Array | None
) -> list[jax.Array]:
    """Output and gradients of one implementation."""

    def call(*qkv: jax.Array) -> jax.Array:
        return attention(
            *qkv,
            causal=case.causal,
            window=case.window,
            segment_ids=segments,
            scale=case.scale,
            implementation=implementation,
        )

    out, pull = jax.vjp(call, *qkv)
    return [out, *pull(cotangent)]


def compare(case: Case, implementation: Any, dtype: Any, tolerance: float) -> None:
    """Compare output and gradients with the loop, relative to the largest value of each."""
    qkv, cotangent, segments = make(case)
    arrays = [jnp.asarray(x, dtype) for x in (*qkv, cotangent)]
    got = run(case, implementation, arrays[:3], arrays[3], None if segments is None else jnp.asarray(segments))
    rounded = [np.asarray(x, np.float64) for x in arrays]
    expected = truth(case, rounded[:3], rounded[3], segments)
    for name, a, b in zip(("out", "query", "key", "value"), got, expected, strict=True):
        assert a.dtype == jnp.dtype(dtype)
        assert a.shape == b.shape
        error = np.abs(np.asarray(a, np.float64) - b).max() / max(1.0, np.abs(b).max())
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocked_is_the_loop(case: Case) -> None:
    """Training and scoring get wrong values or gradients if a block sees the wrong keys."""
    compare(case, None, jnp.float32, 1e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c.time <= 300], ids=str)
def test_reference_is_the_loop(case: Case) -> None:
    """The textbook form is what every faster implementation is measured against."""
    compare(case, "reference", jnp.float32, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("case", [Case(129, heads=4, window=40, segments="packed"), Case(9, 4, causal=False)], ids=str)
def test_bfloat16(case: Case, implementation: str) -> None:
    """16-bit operands keep their dtype, with the softmax in float32."""
    compare(case, implementation, jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_float64(implementation: str) -> None:
    """Float64 inputs are not computed in float32 on the way."""
    with jax.enable_x64(True):
        compare(Case(131, heads=2, kv_heads=1, segments="packed"), implementation, jnp.float64, 1e-13)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Shapes and masks nobody thought of: both implementations agree with the loop."""
    kv_heads = data.draw(st.integers(1, 2))
    causal = data.draw(st.booleans())
    case = Case(
        time=data.draw(st.integers(1, 140)),
        heads=kv_heads * data.draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        key_dim=data.draw(st.integers(1, 3)),
        value_dim=data.draw(st.integers(1, 3)),
        causal=causal,
        window=data.draw(st.none() | st.integers(1, 150)) if causal else None,
        segments=data.draw(st.sampled_from([None, "packed"])),
        batch=1,
    )
    compare(case, data.draw(st.sampled_from(["reference", "blocked"])), jnp.float32, 1e-5)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_rows_that_see_nothing(implementation: str) -> None:
    """Padding gives exactly zero, out and back, even with huge logits: otherwise it would poison real tokens."""
    case = Case(140, segments="packed")
    qkv, cotangent, segments = make(case, np.float32)
    arrays = [jnp.asarray(x) * np.float32(1e3) for x in qkv]
    got = run(case, implementation, arrays, jnp.asarray(cotangent), jnp.asarray(segments))
    assert segments is not None
    assert (segments == 0).any()
    for part in got:
        assert np.isfinite(part).all()
        assert not np.asarray(part)[segments == 0].any()


def test_empty_axes_give_zeros() -> None:
    """No rows, no tokens or no keys is a clean result, not a crash in a loop over nothing."""
    for implementation in ("reference", "blocked"):
        for batch, time, source in ((0, 4, 4), (2, 0, 0), (2, 3, 0)):
            q, kv = jnp.ones((batch, time, 2, 4)), jnp.ones((batch, source, 1, 4))
            out = attention(q, kv, kv, causal=time == source, implementation=implementation)
            assert out.shape == q.shape
            assert not np.asarray(out).any()


def objective(q: jax.Array, kv: jax.Array, segments: jax.Array, implementation: Any = None) -> jax.Array:
    return jnp.sum(jnp.sin(attention(q, kv, kv * 2, segment_ids=segments, implementation=implementation)))


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    qkv, _, segments = make(Case(150, segments="packed", heads=2, kv_heads=1, batch=8), np.float32)
    return jnp.asarray(qkv[0]), jnp.asarray(qkv[1]), jnp.asarray(segments)


def test_composes_with_vmap_and_remat(operands: Any) -> None:
    """A model under vmap or checkpoint trains with the same gradients."""
    gradient = jax.grad(objective, argnums=(0, 1))
    plain = jax.jit(gradient)(*operands)
    remat = jax.jit(jax.grad(jax.checkpoint(objective), argnums=(0, 1)))(*operands)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in operands]
    mapped = [x.reshape(-1, *x.shape[2:]) for x in jax.jit(jax.vmap(gradient))(*split)]
    for other in (remat, mapped):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_composes_with_shardings(operands: Any) -> None:
    """Rows over devices, by the partitioner and by shard_map, give the gradients of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = PartitionSpec("data")
    gradient = jax.grad(objective, argnums=(0, 1))
    plain = jax.jit(gradient)(*operands)
    placed = [jax.device_put(x, NamedSharding(mesh, rows)) for x in operands]
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(rows,) * 3, out_specs=(rows, rows))
    for other in (jax.jit(gradient)(*placed), jax.jit(mapped)(*placed)):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_loops_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows loop over blocks; the loops carry sums whose types differ inside shard_map, with shared keys too."""
    monkeypatch.setattr(_blocked, "BLOCK", 8)
    monkeypatch.setattr(_blocked, "UNROLL", 2)
    compare(Case(43, heads=2, kv_heads=1, segments="packed", value_dim=2), "blocked", jnp.float32, 1e-5)
    compare(Case(43, window=9, value_dim=2), "blocked", jnp.float32, 1e-5)
    qkv, _, segments = make(Case(45, heads=1, kv_heads=1, batch=2, key_dim=2, segments="packed"), np.float32)
    operands = [jnp.asarray(qkv[0]), jnp.asarray(qkv[1][:1]), jnp.asarray(segments)]

    def shared(q: jax.Array, kv: jax.Array, segments: jax.Array) -> jax.Array:
        return objective(q, jnp.broadcast_to(kv, (q.shape[0], *kv.shape[1:])), segments)

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()
    gradient = jax.grad(shared, argnums=(0, 1))
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole, rows), out_specs=(rows, whole))
    for a, b in zip(jax.jit(gradient)(*operands), jax.jit(mapped)(*operands), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_reference_has_every_derivative(operands: Any) -> None:
    """Curvature and forward mode go through the reference; blocked refuses forward mode rather than being wrong."""
    q, kv, segments = (x[:1, :5] for x in operands)
    reference = functools.partial(objective, segments=segments, implementation="reference")
    gradient = jax.jit(jax.grad(reference))
    np.testing.assert_allclose(jax.jit(jax.jacfwd(reference))(q, kv), gradient(q, kv), atol=1e-6)
    tangent = jnp.ones_like(q)
    curvature = jax.jit(lambda q: jax.jvp(lambda x: jax.grad(reference)(x, kv), (q,), (tangent,))[1])(q)
    step = np.float32(3e-3)
    above, below = (gradient(q + s * tangent, kv) for s in (step, -step))
    np.testing.assert_allclose(curvature, (above - below) / (2 * step), atol=5e-3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: objective(x, kv, segments), (q,), (tangent,))


def test_memory_is_blocks_not_squares() -> None:
    """Long rows fit: temporaries stay far below the [time, time] weights of the textbook form."""
    shape = jax.ShapeDtypeStruct((1, 1024, 1, 4), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, implementation: Any) -> jax.Array:
        return jnp.sum(attention(q, k, v, implementation=implementation))

    def temp(implementation: str) -> int:
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
        analysis = gradient.lower(shape, shape, shape, implementation).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temp("blocked") * 2 < temp("reference")


Q, KV = jnp.ones((1, 4, 4, 8)), jnp.ones((1, 4, 2, 8))
BAD: list[tuple[str, Any, dict[str, Any], str]] = [
    ("rank", (Q[0], KV, KV), {}, r"query \(4, 4, 8\).*expected \[batch, time, heads, dim\]"),
    ("batch", (jnp.ones((2, 4, 4, 8)), KV, KV), {}, "share"),
    ("key dim", (jnp.ones((1, 4, 4, 6)), KV, KV), {}, "share"),
    ("source", (Q, KV, KV[:, :3]), {}, "share"),
    ("heads", (jnp.ones((1, 4, 3, 8)), KV, KV), {}, "heads 3 must be a multiple of kv_heads 2"),
    ("no kv heads", (Q, KV[:, :, :0], KV[:, :, :0]), {}, "kv_heads 0"),
    ("causal lengths", (Q[:, :3], KV, KV), {}, "time 3 != source 4"),
    ("segments", (Q, KV, KV), {"segment_ids": jnp.ones((1, 3), jnp.int32)}, r"\(1, 3\); expected \(1, 4\)"),
    ("segment lengths", (Q[:, :3], KV, KV), {"causal": False, "segment_ids": jnp.ones((1, 3), jnp.int32)}, "equal"),
    ("window 0", (Q, KV, KV), {"window": 0}, "window=0"),
    ("window without causal", (Q, KV, KV), {"window": 2, "causal": False}, "causal=False"),
    ("implementation", (Q, KV, KV), {"implementation": "flash"}, "'flash'; expected None, 'blocked' or 'reference'"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("arrays", "options", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(arrays: Any, options: Any, message: str) -> None:
    """A wrong shape or option is refused with the value, never broadcast into something plausible."""
    with pytest.raises(ValueError, match=message):
        attention(*arrays, **options)


@pytest.mark.usefixtures("untyped")
def test_bad_dtypes() -> None:
    """Integer operands would be softmaxed into zeros; float segments would never match."""
    with pytest.raises(TypeError, match="int32"):
        attention(Q, KV, KV.astype(jnp.int32))
    with pytest.raises(TypeError, match=r"segment_ids.*float32"):
        attention(Q, KV, KV, segment_ids=jnp.ones((1, 4)))
