"""What attention computes and holds: blocks that a mask forbids cost nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_kernels import Mask, _blocked, attention, causal, chunked, configured, segments, window


def loss(mask: Mask | None, implementation: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(attention(q, k, v, mask, implementation=implementation))


def compiled(mask: Mask | None, implementation: Any, time: int, heads: int = 1) -> Any:
    shape = jax.ShapeDtypeStruct((1, time, heads, 4), jnp.float32)
    gradient = jax.grad(functools.partial(loss, mask, implementation), argnums=(0, 1, 2))
    return jax.jit(gradient).lower(shape, shape, shape).compile()


def test_memory_is_blocks_not_squares() -> None:
    """Long rows fit: temporaries stay far below the [time, time] weights of the textbook form."""
    temp = {
        name: compiled(causal(), name, 1024).memory_analysis().temp_size_in_bytes for name in ("blocked", "reference")
    }
    assert temp["blocked"] * 2 < temp["reference"]


def test_blocks_that_nobody_sees_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask costs about half of the dense form, a window its width, packed rows their documents."""
    done = list[int]()
    plain = _blocked._dot

    def counted(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        sizes = dict(zip(spec[:4] + spec[5:9], a.shape + b.shape, strict=True))
        done.append(2 * int(np.prod(list(sizes.values()))))
        return plain(spec, a, b)

    monkeypatch.setattr(_blocked, "_dot", counted)
    x = jnp.ones((1, 256, 1, 4))
    ids = jnp.repeat(jnp.arange(1, 9, dtype=jnp.int32), 32)[None]

    def flops(mask: Mask | None) -> int:
        """Operations of all matrix products of output and gradients; loops run as often as they run."""
        done.clear()
        implementation = configured("blocked", rows=16, chunk=16)
        with jax.disable_jit():
            jax.grad(functools.partial(loss, mask, implementation), argnums=(0, 1, 2))(x, x, x)
        return sum(done)

    everything = flops(None)
    assert everything == 7 * 2 * 256 * 256 * 4
    assert flops(causal()) == everything * 136 // 256
    assert flops(causal() & window(17)) < 0.13 * everything
    assert flops(causal() & chunked(32)) < 0.1 * everything
    assert flops(causal() & segments(ids)) < 0.1 * everything


@pytest.mark.parametrize(
    ("mask", "heads", "rows", "chunk"),
    [
        (None, 1, 128, 128),
        (causal(), 1, 128, 128),
        (causal() & window(64), 1, 128, 192),
        (causal() & window(192), 4, 128, 320),
        (causal() & window(256), 32, 64, 160),
        (causal() & window(800), 1, 128, 128),
        (segments(jnp.zeros((1, 1024), jnp.int32)), 1, 128, 128),
    ],
    ids=str,
)
def test_tiles_fit_a_window(mask: Mask | None, heads: int, rows: int, chunk: int) -> None:
    """A window in tiles that are not as wide as it is computes a third more than it needs."""
    x = jax.ShapeDtypeStruct((1, 1024, heads, 8), jnp.float32)

    def tiles(implementation: Any) -> str:
        return jax.jit(functools.partial(loss, mask, implementation)).lower(x, x, x).as_text()

    assert tiles("blocked") == tiles(configured("blocked", rows=rows, chunk=chunk))
    assert tiles("blocked") != tiles(configured("blocked", rows=32, chunk=chunk))
