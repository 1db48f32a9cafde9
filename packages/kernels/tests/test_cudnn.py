"""What a GPU would be asked to run, seen without one: programs are lowered for it, not compiled."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from dovetail_kernels import Mask, attention, causal, dense, lengths, prefer, segments, window

TIME = 1024


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jax believe in a GPU with a cuDNN: it asks for both when it lowers."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name, answer in (
        ("check_cudnn_version", lambda: 91100),
        ("check_compute_capability", lambda _: True),
        ("is_cuda_compute_capability_equal", lambda _: False),
    ):
        monkeypatch.setattr(fused, name, answer)


def lowered(mask: Callable[[jax.Array], Mask | None], dtype: jnp.dtype) -> str:
    """Return the program of the gradients of an attention, for CUDA."""
    x, counts = jax.ShapeDtypeStruct((2, TIME, 4, 64), dtype), jax.ShapeDtypeStruct((2,), jnp.int32)

    def gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.sum(attention(query, key, value, mask(arrays[3])).astype(jnp.float32))

        return jax.grad(total, argnums=(0, 1, 2))(*arrays[:3])

    with prefer(platform="gpu"):
        return jax.jit(gradients).trace(x, x, x, counts).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda x: x.__name__)
@pytest.mark.parametrize(
    ("mask", "kind", "width"),
    [
        (lambda _: None, "NO_MASK", 0),
        (lambda _: causal(), "CAUSAL", 0),
        (lambda _: causal() & window(256), "CAUSAL", 256),
        (lambda counts: causal() & lengths(counts, counts), "PADDING_CAUSAL", 0),
        (lambda counts: lengths(counts, counts), "PADDING", 0),
    ],
    ids=["none", "causal", "window", "causal lengths", "lengths"],
)
def test_cudnn_gets_the_structure_of_a_mask(
    mask: Callable[..., Mask | None], kind: str, width: int, dtype: jnp.dtype
) -> None:
    """It runs without being asked for, in both directions, and no array of queries times keys is made for it."""
    text = lowered(mask, dtype)
    assert set(re.findall(r"custom_call @(__cudnn[\w$]+)", text)) == {
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    }
    assert set(re.findall(r"mask_type\\22: \\22(\w+)\\22", text)) == {kind}
    assert set(re.findall(r"sliding_window_length\\22: (\d+)", text)) == {str(width)}
    assert f"{TIME}x{TIME}" not in text


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        (lambda _: causal(), jnp.float32),
        (lambda _: causal() & segments(jnp.ones((2, TIME), jnp.int32)), jnp.bfloat16),
        (lambda _: dense(jnp.ones((TIME, TIME), bool)), jnp.bfloat16),
    ],
    ids=["float32", "segments", "dense"],
)
def test_the_rest_is_lowered_without_it(mask: Callable[..., Mask | None], dtype: jnp.dtype) -> None:
    """What cuDNN does not know runs in XLA's own operations, on a GPU as elsewhere."""
    assert "__cudnn" not in lowered(mask, dtype)
