"""How operations are called: compiled once outside of jit, and right where meshes have explicit axes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dovetail_kernels import (
    CrossEntropyOptions,
    Sampling,
    Teacher,
    TriangleWeights,
    attention,
    causal,
    causal_conv1d,
    distillation_loss,
    filter_logits,
    gated_delta_rule,
    linear_cross_entropy,
    paged_attention,
    quantized_matmul,
    ragged_dot,
    rms_norm,
    sample,
    segments,
    ssd,
    take,
    token_logprobs,
    triangle_multiplication,
    verify_draft,
)
from dovetail_protocols import QuantizedArray

ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()
HEADS = PartitionSpec(None, None, "data")


class Kind(NamedTuple):
    """A function of arrays, how they are divided, and how its result then is."""

    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    specs: tuple[PartitionSpec, ...]
    result: PartitionSpec


def _ids(x: Any) -> jax.Array:
    return (jnp.abs(x) * 5).astype(jnp.int32)  # some beyond the table


def _targets(hidden: Any) -> jax.Array:
    return jnp.arange(hidden.shape[0], dtype=jnp.int32)


def _quantized() -> QuantizedArray:
    return QuantizedArray.checked(jnp.ones((6, 4), jnp.int8), jnp.full((1, 4), 0.5))


def _triangle() -> TriangleWeights:
    one = (jnp.ones(3), jnp.ones(3))
    return TriangleWeights(one, jnp.ones((3, 2, 3)), jnp.ones((3, 2, 3)), one, jnp.ones((3, 4)), jnp.ones((3, 4)))


def _pages() -> tuple[Any, ...]:
    return jnp.arange(12, dtype=jnp.int32).reshape(4, 3), jnp.array([3, 9, 1, 6], jnp.int32)


KINDS = {
    "attention": Kind(
        lambda q, k, v: attention(q, k, v, causal() & segments(jnp.ones((4, 9), jnp.int32))),
        ((4, 9, 2, 3),) * 3,
        (ROWS,) * 3,
        ROWS,
    ),
    "attention by heads": Kind(lambda q, k, v: attention(q, k, v, causal()), ((2, 9, 4, 3),) * 3, (HEADS,) * 3, HEADS),
    "norm": Kind(rms_norm, ((8, 6), (6,)), (ROWS, WHOLE), ROWS),
    "loss": Kind(lambda h, w: linear_cross_entropy(h, w, _targets(h)), ((8, 6), (6, 9)), (ROWS, WHOLE), WHOLE),
    "loss of each": Kind(
        lambda h, w: linear_cross_entropy(h, w, _targets(h), options=CrossEntropyOptions(per_token=True)),
        ((8, 6), (6, 9)),
        (ROWS, WHOLE),
        ROWS,
    ),
    "log-probabilities": Kind(
        lambda h, w: token_logprobs(h, w, _targets(h)), ((8, 6), (6, 12)), (WHOLE, PartitionSpec(None, "data")), WHOLE
    ),
    "distillation": Kind(
        lambda h, w, t: distillation_loss(h, w, Teacher(t, w), beta=0.5),
        ((8, 6), (6, 9), (8, 6)),
        (ROWS, WHOLE, ROWS),
        WHOLE,
    ),
    "grouped product": Kind(
        lambda x, w: ragged_dot(x, w, jnp.array([3, 4], jnp.int32)), ((8, 6), (2, 6, 4)), (ROWS, WHOLE), ROWS
    ),
    "quantized product": Kind(lambda x: quantized_matmul(x, _quantized()), ((8, 6),), (ROWS,), ROWS),
    "paged attention": Kind(
        lambda q, k: paged_attention(q, k, k, *_pages()), ((4, 2, 6), (12, 2, 4, 6)), (ROWS, WHOLE), ROWS
    ),
    "state space": Kind(
        lambda x, b: ssd(x, jnp.full(x.shape[:3], 0.1), -jnp.ones(2), b, b)[0],
        ((4, 9, 2, 3), (4, 9, 1, 5)),
        (ROWS, ROWS),
        ROWS,
    ),
    "delta rule": Kind(
        lambda k, v: gated_delta_rule(k, k / 9, v, jnp.full(v.shape[:3], -0.1), jnp.full(v.shape[:3], 0.5))[0],
        ((4, 9, 2, 3), (4, 9, 2, 5)),
        (ROWS, ROWS),
        ROWS,
    ),
    "triangle": Kind(
        lambda pairs: triangle_multiplication(pairs, _triangle()),
        ((8, 8, 3),),
        (ROWS,),
        ROWS,
    ),
    "lookup": Kind(lambda w, x: take(w, _ids(x)), ((6, 3), (8,)), (WHOLE, ROWS), ROWS),
    "lookup in 16 bits": Kind(
        lambda w, x: take(w.astype(jnp.bfloat16), _ids(x)).astype(jnp.float32), ((6, 3), (8,)), (WHOLE, ROWS), ROWS
    ),
    "convolution": Kind(lambda x, w: causal_conv1d(x, w)[0], ((4, 9, 5), (5, 3)), (ROWS, WHOLE), ROWS),
}


def operands(kind: Kind) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in kind.shapes]


def pulled(kind: Kind, *given: jax.Array) -> Any:
    """The result, and gradients of everything that is differentiable."""

    def objective(*given: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = kind.call(*given)
        return jnp.sum(jnp.sin(out)), out

    if kind is KINDS["paged attention"]:
        return kind.call(*given), ()
    places = tuple(range(len(given)))
    return jax.grad(objective, places, has_aux=True)(*given)[::-1]


@pytest.mark.thin(2)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_explicit_axes(kind: Kind) -> None:
    """On a mesh as `jax.make_mesh` makes it, values and gradients are those of one device, divided as operands are."""
    given = operands(kind)
    expected = jax.jit(lambda *x: pulled(kind, *x))(*given)
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, kind.specs, strict=True)]
        found = jax.jit(lambda *x: pulled(kind, *x))(*placed)
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, kind.result), found[0].ndim)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5)


def test_sampling_with_explicit_axes() -> None:
    """A server whose batch is spread over devices samples the same tokens."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3, 9)), jnp.float32)
    ones, number = jnp.ones(8), jnp.arange(8, dtype=jnp.uint32)
    how = Sampling(ones, jnp.full(8, 4), ones, 0 * ones, number, number.astype(jnp.int32))

    @jax.jit
    def run(logits: jax.Array, how: Sampling) -> Any:
        drafts = jnp.zeros((8, 2), jnp.int32)
        return sample(logits[:, 0], how), filter_logits(logits[:, 1], how), verify_draft(drafts, logits, how)

    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = run(*jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, ROWS)), (logits, how)))
    jax.tree.map(np.testing.assert_array_equal, found, run(logits, how))


@pytest.mark.parametrize("name", ["attention", "loss", "grouped product", "delta rule"])
def test_calls_outside_of_jit_compile_once(name: str) -> None:
    """In a notebook every call would take seconds, again and again."""
    kind, compiled = KINDS[name], list[str]()
    given = operands(kind)
    jax.block_until_ready(pulled(kind, *given))

    def listen(event: str, seconds: float, **rest: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(pulled(kind, *given))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def test_another_number_is_another_program() -> None:
    """What is fixed in a program is part of its key."""
    x = jnp.ones((1, 4, 1, 2)) * jnp.arange(4.0).reshape(1, 4, 1, 1)
    seen = [attention(x, x, x, scale=scale, softcap=cap) for scale in (1.0, 2.0) for cap in (None, 1.0)]
    assert len({float(out[0, 1, 0, 0]) for out in seen}) == 4
