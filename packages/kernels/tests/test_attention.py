"""Attention against a float64 NumPy form with gradients by hand, and the implementations against each other."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import (
    Mask,
    attention,
    causal,
    chunked,
    configured,
    dense,
    lengths,
    merge,
    prefix,
    segments,
    window,
)
from dovetail_kernels._dtypes import exact
from dovetail_kernels.masks import Tile

SMALL = configured("blocked", rows=16, chunk=24)
BOTH = ["reference", SMALL]


class Case(NamedTuple):
    """One call; `mask` makes the mask of a batch from its ids."""

    time: int
    source: int | None = None
    heads: int = 2
    kv_heads: int = 2
    key_dim: int = 4
    value_dim: int = 4
    mask: Callable[["Case"], Mask] | None = None
    bias: tuple[int, int] | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    query_offset: Any = 0
    key_offset: Any = 0
    batch: int = 2

    @property
    def keys(self) -> int:
        return self.time if self.source is None else self.source


def ids(case: Case, count: int, seed: int = 3) -> jax.Array:
    """Packed segments in order, padding at both ends."""
    cuts = np.sort(np.random.default_rng(seed).integers(0, 5, (case.batch, count)), axis=1)
    return jnp.asarray(np.where(cuts == 4, 0, cuts), jnp.int32)


def packed(case: Case) -> Mask:
    return segments(ids(case, case.time), ids(case, case.keys))


def holes(case: Case) -> Mask:
    shape = (case.batch, case.heads, case.time, case.keys)
    return dense(jnp.asarray(np.random.default_rng(5).random(shape) < 0.3))


CASES = {
    "one token": Case(1),
    "all to all": Case(7, heads=4, kv_heads=2, key_dim=8, value_dim=3),
    "one kv head": Case(7, heads=4, kv_heads=1, mask=lambda _: causal()),
    "fewer keys": Case(7, source=5, heads=4, value_dim=6),
    "many keys": Case(5, source=300, kv_heads=1),
    "few keys": Case(300, source=7),
    "a block": Case(128, mask=lambda _: causal()),
    "a block and one": Case(129, heads=4, kv_heads=2, mask=lambda _: causal()),
    "itself": Case(129, mask=lambda _: causal() & window(1)),
    "window": Case(300, heads=4, kv_heads=1, scale=0.3, mask=lambda _: causal() & window(17)),
    "wide window": Case(300, mask=lambda _: causal() & window(1000)),
    "both sides": Case(150, mask=lambda _: window(9, 30)),
    "chunks": Case(150, mask=lambda _: causal() & chunked(32)),
    "prefix": Case(150, mask=lambda _: causal() | prefix(40)),
    "prefixes": Case(150, mask=lambda _: causal() | prefix(jnp.array([3, 77]))),
    "packed": Case(300, value_dim=7, mask=lambda c: causal() & packed(c)),
    "packed window": Case(129, mask=lambda c: causal() & window(128) & packed(c)),
    "packed both ways": Case(300, scale=-0.7, mask=packed),
    "all padding": Case(7, mask=lambda _: causal() & segments(jnp.zeros((2, 7), jnp.int32))),
    "lengths": Case(60, source=90, mask=lambda _: lengths(jnp.array([60, 13]), jnp.array([0, 81]))),
    "dense": Case(40, source=50, heads=4, mask=lambda c: holes(c) & causal(), query_offset=9),
    "dense or packed": Case(40, mask=lambda c: holes(c) | packed(c)),
    "bias": Case(70, heads=4, bias=(1, 4), mask=lambda _: causal()),
    "bias per row": Case(70, source=30, bias=(2, 1), softcap=2.0),
    "sinks": Case(70, heads=4, kv_heads=2, sinks=True, mask=lambda c: causal() & packed(c)),
    "soft cap": Case(150, softcap=1.5, sinks=True, bias=(2, 2), mask=lambda _: causal() & window(40)),
    "offset": Case(40, source=100, mask=lambda _: causal() & window(50), query_offset=60),
    "unseen keys": Case(40, source=100, mask=lambda _: causal(), key_offset=20),
    "traced offset": Case(40, source=100, mask=lambda _: causal() & window(30), query_offset=jnp.int32(37)),
    "short offset": Case(
        40, source=250, mask=lambda _: causal() & window(30), query_offset=jnp.uint8(200), key_offset=np.int64(3)
    ),
    "offset per row": Case(
        40, source=100, mask=lambda _: causal() & chunked(64), query_offset=jnp.array([37, 2]), key_offset=jnp.int32(1)
    ),
    "long": Case(2200, kv_heads=1, batch=1, key_dim=2, value_dim=3, mask=lambda c: causal() & window(150) & packed(c)),
}


def make(case: Case, dtype: Any = jnp.float32, seed: int = 0) -> tuple[dict[str, Any], tuple[jax.Array, jax.Array]]:
    """Return what is differentiated, and cotangents of output and log-sum-exp."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    operands = {
        "query": draw(case.batch, case.time, case.heads, case.key_dim),
        "key": draw(case.batch, case.keys, case.kv_heads, case.key_dim),
        "value": draw(case.batch, case.keys, case.kv_heads, case.value_dim),
    }
    if case.bias is not None:
        operands["bias"] = draw(*case.bias, case.time, case.keys)
    if case.sinks:
        operands["sinks"] = draw(case.heads)
    return operands, (
        draw(case.batch, case.time, case.heads, case.value_dim),
        draw(case.batch, case.time, case.heads).astype(exact(dtype)),
    )


def truth(case: Case, operands: dict[str, np.ndarray], d_out: np.ndarray, d_lse: np.ndarray) -> dict[str, np.ndarray]:
    """Output, log-sum-exp and gradients of one whole float64 matrix per head, ``[batch, heads, time, source]``."""
    group = case.heads // case.kv_heads
    q = operands["query"].transpose(0, 2, 1, 3)
    k, v = (np.repeat(operands[name], group, axis=2).transpose(0, 2, 1, 3) for name in ("key", "value"))
    g, d_lse = d_out.transpose(0, 2, 1, 3), d_lse.transpose(0, 2, 1)[..., None]
    scale = case.key_dim**-0.5 if case.scale is None else case.scale
    z = q @ k.swapaxes(2, 3) * scale + operands.get("bias", 0.0)
    slope = np.ones_like(z)
    if case.softcap is not None:
        z = case.softcap * np.tanh(z / case.softcap)
        slope = 1 - (z / case.softcap) ** 2
    if case.mask is not None:
        tile = Tile(0, case.time, 0, case.keys, case.query_offset, case.key_offset)
        z = np.where(np.asarray(case.mask(case).keep(tile)), z, -np.inf)
    sinks = operands["sinks"][:, None, None] if case.sinks else np.full((1, 1, 1), -np.inf)
    with np.errstate(all="ignore"):
        lse = np.log(np.exp(z).sum(-1, keepdims=True) + np.exp(sinks))
        p = np.nan_to_num(np.exp(z - lse))
        sink = np.nan_to_num(np.exp(sinks - lse))
    out = p @ v
    delta = (g * out).sum(-1, keepdims=True) - d_lse
    ds = p * (g @ v.swapaxes(2, 3) - delta) * slope

    def shared(x: np.ndarray) -> np.ndarray:
        return x.reshape(case.batch, case.kv_heads, group, *x.shape[2:]).sum(2).transpose(0, 2, 1, 3)

    found = {
        "out": out.transpose(0, 2, 1, 3),
        "lse": lse[..., 0].transpose(0, 2, 1),
        "query": (ds @ k * scale).transpose(0, 2, 1, 3),
        "key": shared(ds.swapaxes(2, 3) @ q * scale),
        "value": shared(p.swapaxes(2, 3) @ g),
    }
    if case.bias is not None:
        found["bias"] = ds.sum(tuple(axis for axis in (0, 1) if case.bias[axis] == 1), keepdims=True)
    if case.sinks:
        found["sinks"] = -(sink * delta).sum((0, 2, 3))
    return found


def run(case: Case, implementation: Any, operands: dict[str, Any], cotangents: Any) -> dict[str, jax.Array]:
    """Output, log-sum-exp and gradients of one implementation."""
    mask = None if case.mask is None else case.mask(case)

    @jax.jit
    def pulled(operands: dict[str, Any], cotangents: Any, mask: Any) -> dict[str, jax.Array]:
        def call(operands: dict[str, Any]) -> Any:
            return attention(
                **operands,
                mask=mask,
                softcap=case.softcap,
                scale=case.scale,
                query_offset=case.query_offset,
                key_offset=case.key_offset,
                return_lse=True,
                implementation=implementation,
            )

        attended, pull = jax.vjp(call, operands)
        return {**attended._asdict(), **pull(type(attended)(*cotangents))[0]}

    return pulled(operands, cotangents, mask)


def compare(case: Case, implementation: Any, dtype: Any, tolerance: float) -> None:
    """Compare output and gradients with the truth, relative to the largest value of each."""
    operands, cotangents = make(case, dtype)
    got = run(case, implementation, operands, cotangents)
    wide = [np.asarray(x, np.float64) for x in cotangents]
    expected = truth(case, {name: np.asarray(x, np.float64) for name, x in operands.items()}, *wide)
    assert got.keys() == expected.keys()
    for name, b in expected.items():
        a = got[name]
        assert a.dtype == (cotangents[1].dtype if name == "lse" else jnp.dtype(dtype))
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        finite = np.isfinite(b)
        error = np.abs(np.where(finite, np.asarray(a, np.float64), 0) - np.where(finite, b, 0)).max()
        assert error < tolerance * max(1.0, np.abs(b[finite]).max(initial=0)), f"{name}: {error}"


@pytest.mark.thin(2)
@pytest.mark.parametrize("implementation", BOTH, ids=["reference", "small blocks"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case: Case, implementation: Any) -> None:
    """Training and scoring get wrong values or gradients if a block sees the wrong keys."""
    compare(case, implementation, jnp.float32, 1e-5)


@pytest.mark.parametrize("name", ["a block and one", "few keys", "packed window", "offset per row", "long"])
def test_default_blocks(name: str) -> None:
    """The sizes of blocks that everybody gets."""
    compare(CASES[name], "blocked", jnp.float32, 1e-5)


@pytest.mark.parametrize("implementation", BOTH, ids=["reference", "small blocks"])
@pytest.mark.parametrize("name", ["packed window", "soft cap"])
def test_bfloat16(name: str, implementation: Any) -> None:
    """16-bit operands keep their dtype, with the softmax in float32."""
    compare(CASES[name], implementation, jnp.bfloat16, 2e-2)


@pytest.mark.parametrize("implementation", BOTH, ids=["reference", "small blocks"])
def test_float64(implementation: Any) -> None:
    """Float64 inputs are not computed in float32 on the way."""
    with jax.enable_x64(True):
        compare(CASES["soft cap"]._replace(time=131), implementation, jnp.float64, 1e-13)
        compare(CASES["packed"]._replace(time=131), implementation, jnp.float64, 1e-13)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Shapes, masks and block sizes nobody thought of agree with the truth."""
    kv_heads = data.draw(st.integers(1, 2))
    width, size = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 90))
    masks = [
        None,
        lambda _: causal(),
        lambda _: causal() & window(width),
        lambda c: (causal() & packed(c)) | prefix(size),
        lambda c: window(width, size) & packed(c),
        lambda _: causal() & chunked(size),
    ]
    case = Case(
        time=data.draw(st.integers(1, 140)),
        source=data.draw(st.integers(1, 140)),
        heads=kv_heads * data.draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        key_dim=data.draw(st.integers(1, 3)),
        value_dim=data.draw(st.integers(1, 3)),
        mask=data.draw(st.sampled_from(masks)),
        query_offset=data.draw(st.integers(-20, 100)),
        sinks=data.draw(st.booleans()),
        batch=1,
    )
    blocks = {"rows": st.integers(1, 150), "chunk": st.integers(1, 150)}
    compare(case, configured("blocked", **data.draw(st.fixed_dictionaries(blocks))), jnp.float32, 2e-5)


@pytest.mark.parametrize("implementation", BOTH, ids=["reference", "small blocks"])
def test_rows_that_see_nothing(implementation: Any) -> None:
    """Padding gives exactly zero, out and back, even with huge logits: otherwise it would poison real tokens."""
    case = Case(140, mask=lambda c: causal() & packed(c))
    operands, cotangents = make(case)
    got = run(case, implementation, {name: x * 1e3 for name, x in operands.items()}, cotangents)
    padding = np.asarray(ids(case, 140)) == 0
    assert padding.any()
    assert np.isneginf(np.asarray(got.pop("lse"))[padding]).all()
    for part in got.values():
        assert np.isfinite(part).all()
        assert not np.asarray(part)[padding].any()


@pytest.mark.parametrize("implementation", BOTH, ids=["reference", "small blocks"])
@pytest.mark.parametrize("kind", ["segments", "lengths"])
def test_padding_may_hold_anything(kind: str, implementation: Any) -> None:
    """Memory that was never written may be NaN, and 0 times NaN in a sum would spread to real tokens and gradients."""
    case = Case(37, softcap=3.0, mask=packed)
    padding = np.asarray(ids(case, 37)) == 0
    if kind == "lengths":
        end = jnp.array([30, 21], jnp.int32)
        case, padding = case._replace(mask=lambda _: lengths(end, end)), np.arange(37) >= np.asarray(end)[:, None]
    operands, (d_out, d_lse) = make(case)
    dirty = {name: jnp.where(padding[:, :, None, None], jnp.nan, x) for name, x in operands.items()}
    expected = run(case, implementation, operands, (d_out, d_lse))
    got = run(case, implementation, dirty, (jnp.where(padding[:, :, None, None], jnp.nan, d_out), d_lse))
    for name, x in expected.items():
        np.testing.assert_allclose(got[name], x, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_empty_axes_give_zeros(implementation: str) -> None:
    """No rows, no tokens or no keys is a clean result, not a crash in a loop over nothing."""
    for batch, time, source in ((0, 4, 4), (2, 0, 0), (2, 3, 0)):
        q, kv = jnp.ones((batch, time, 2, 4)), jnp.ones((batch, source, 1, 4))
        out, lse = attention(q, kv, kv, causal(), implementation=implementation, return_lse=True)
        assert out.shape == q.shape
        assert not np.asarray(out).any()
        assert np.isneginf(lse).all()


@pytest.mark.parametrize("sinks", [None, jnp.array([0.3, -1.0])], ids=["plain", "sinks"])
def test_merge_is_attention_over_all_keys(sinks: Any) -> None:
    """Ring attention, cascades and chunked prefill add up parts; gradients flow through the merge."""
    case = Case(50, source=90, mask=lambda _: causal(), query_offset=20)
    operands, (cotangent, _) = make(case)

    def whole(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return attention(q, k, v, causal(), query_offset=20, sinks=sinks, return_lse=True)

    def parts(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        cuts = [(0, 13), (13, 80), (80, 90)]
        return merge(
            [
                attention(
                    q,
                    k[:, low:high],
                    v[:, low:high],
                    causal(),
                    query_offset=20,
                    key_offset=low,
                    sinks=sinks if low == 0 else None,
                    return_lse=True,
                    implementation=SMALL,
                )
                for low, high in cuts
            ]
        )

    def pulled(function: Any) -> list[jax.Array]:
        attended, pull = jax.vjp(function, *operands.values())
        return [*attended, *pull(type(attended)(cotangent, jnp.ones_like(attended.lse)))]

    results = [jax.jit(functools.partial(pulled, function))() for function in (whole, parts)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_merge_of_nothing_seen() -> None:
    """A row that no part sees stays 0, -inf, with zero gradients."""
    q = jnp.ones((1, 2, 1, 4))
    nothing = segments(jnp.zeros((1, 2), jnp.int32))

    def out(q: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = attention(q, q, q, nothing, return_lse=True)
        merged = merge([part, part])
        return jnp.sum(merged.out), merged.lse

    (value, lse), gradient = jax.value_and_grad(out, has_aux=True)(q)
    assert value == 0
    assert np.isneginf(lse).all()
    assert not np.asarray(gradient).any()
    with pytest.raises(ValueError, match="no parts"):
        merge([])


def objective(q: jax.Array, kv: jax.Array, ids: jax.Array, implementation: Any = None) -> jax.Array:
    return jnp.sum(jnp.sin(attention(q, kv, kv * 2, causal() & segments(ids), implementation=implementation)))


@pytest.fixture(scope="module")
def operands() -> tuple[jax.Array, jax.Array, jax.Array]:
    case = Case(150, heads=2, kv_heads=1, batch=8)
    arrays, _ = make(case)
    return arrays["query"], arrays["key"], ids(case, 150)


def test_composes_with_vmap_and_remat(operands: Any) -> None:
    """A model under vmap or checkpoint trains with the same gradients."""
    own = functools.partial(objective, implementation=SMALL)
    gradient = jax.grad(own, argnums=(0, 1))
    plain = jax.jit(gradient)(*operands)
    remat = jax.jit(jax.grad(jax.checkpoint(own), argnums=(0, 1)))(*operands)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in operands]
    mapped = [x.reshape(-1, *x.shape[2:]) for x in jax.jit(jax.vmap(gradient))(*split)]
    for other in (remat, mapped):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_composes_with_shardings(operands: Any) -> None:
    """Rows over devices, by the partitioner and by shard_map, give the gradients of one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def shared(q: jax.Array, kv: jax.Array, ids: jax.Array) -> jax.Array:
        kv = jnp.broadcast_to(kv, (q.shape[0], *kv.shape[1:]))
        return objective(q, kv, ids, implementation=SMALL)

    gradient = jax.grad(shared, argnums=(0, 1))
    given = (operands[0], operands[1][:1], operands[2])
    plain = jax.jit(gradient)(*given)
    specs = (rows, whole, rows)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)]
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=(rows, whole))
    for other in (jax.jit(gradient)(*placed), jax.jit(mapped)(*placed)):
        for a, b in zip(plain, other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_reference_has_every_derivative(operands: Any) -> None:
    """Curvature and forward mode go through the reference; blocked refuses forward mode rather than being wrong."""
    q, kv, ids = (x[:1, :5] for x in operands)
    reference = functools.partial(objective, ids=ids, implementation="reference")
    gradient = jax.jit(jax.grad(reference))
    np.testing.assert_allclose(jax.jit(jax.jacfwd(reference))(q, kv), gradient(q, kv), atol=1e-6)
    tangent = jnp.ones_like(q)
    curvature = jax.jit(lambda q: jax.jvp(lambda x: jax.grad(reference)(x, kv), (q,), (tangent,))[1])(q)
    step = np.float32(3e-3)
    above, below = (gradient(q + s * tangent, kv) for s in (step, -step))
    np.testing.assert_allclose(curvature, (above - below) / (2 * step), atol=5e-3)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: objective(x, kv, ids), (q,), (tangent,))
