"""Attention against torch's, and against the eager attention of gpt-oss and Gemma 2 in transformers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss

from dovetail_kernels import Mask, attention, causal, configured, dense, lengths, prefix, segments, window
from dovetail_kernels.masks import Tile

BATCH, TIME, HEADS, KV_HEADS, DIM = 2, 70, 4, 2, 8
IDS = np.sort(np.random.default_rng(1).integers(1, 5, (BATCH, TIME)), axis=1)
MASKS: dict[str, Mask | None] = {
    "everything": None,
    "causal": causal(),
    "window": causal() & window(9),
    "prefix": causal() | prefix(20),
    "packed": causal() & segments(jnp.asarray(IDS, jnp.int32)),
    "lengths": lengths(key=jnp.array([70, 11])),
    "dense": dense(jnp.asarray(np.random.default_rng(2).random((BATCH, HEADS, TIME, TIME)) < 0.5)) | window(1, 1),
}
IMPLEMENTATIONS = ["reference", "blocked", configured("blocked", rows=16, chunk=24)]


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def qkv() -> list[np.ndarray]:
    return arrays((BATCH, TIME, HEADS, DIM), *[(BATCH, TIME, KV_HEADS, DIM)] * 2, (BATCH, TIME, HEADS, DIM))


def ours(mask: Mask | None, implementation: Any, given: list[np.ndarray], **options: Any) -> list[np.ndarray]:
    """Output and gradients, the last array being the cotangent."""

    @jax.jit
    def pulled(cotangent: jax.Array, *operands: jax.Array) -> list[jax.Array]:
        def call(q: jax.Array, k: jax.Array, v: jax.Array, *sinks: jax.Array) -> jax.Array:
            more = {"sinks": sinks[0]} if sinks else {}
            return attention(q, k, v, mask, implementation=implementation, **more, **options)

        out, pull = jax.vjp(call, *operands)
        return [out, *pull(cotangent)]

    return [np.asarray(x) for x in pulled(given[-1], *given[:-1])]


def allowed(mask: Mask | None) -> torch.Tensor | None:
    if mask is None:
        return None
    return torch.from_numpy(np.array(np.broadcast_to(mask.keep(Tile(0, TIME, 0, TIME)), (BATCH, HEADS, TIME, TIME))))


def pulled(out: torch.Tensor, cotangent: np.ndarray, *leaves: torch.Tensor) -> list[np.ndarray]:
    out.backward(torch.from_numpy(cotangent))
    return [out.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["reference", "blocked", "small blocks"])
@pytest.mark.parametrize("name", MASKS)
def test_torch(name: str, implementation: Any) -> None:
    """The same numbers and gradients as torch, for every mask."""
    given = qkv()
    leaves = [torch.from_numpy(x).requires_grad_() for x in given[:3]]
    heads_first = [x.transpose(1, 2) for x in leaves]
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=allowed(MASKS[name]), scale=0.3, enable_gqa=True
    )
    expected = pulled(out.transpose(1, 2), given[3], *leaves)
    for a, b in zip(ours(MASKS[name], implementation, given, scale=0.3), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


class Layer(torch.nn.Module):
    """What the eager attention functions of transformers read of a layer."""

    def __init__(self, sinks: torch.Tensor | None = None) -> None:
        super().__init__()
        self.num_key_value_groups, self.sinks = HEADS // KV_HEADS, sinks
        self.eval()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["reference", "blocked", "small blocks"])
def test_sinks(implementation: Any) -> None:
    """gpt-oss: a logit per head that only takes weight away."""
    *given, cotangent = qkv()
    (sinks,) = arrays((HEADS,))
    leaves = [torch.from_numpy(x).requires_grad_() for x in (*given, sinks)]
    mask = torch.where(allowed(MASKS["window"]), 0.0, torch.finfo(torch.float32).min)
    out, _ = modeling_gpt_oss.eager_attention_forward(
        Layer(leaves[3]), *(x.transpose(1, 2) for x in leaves[:3]), mask, scaling=0.4
    )
    expected = pulled(out, cotangent, *leaves)
    for a, b in zip(
        ours(MASKS["window"], implementation, [*given, sinks, cotangent], scale=0.4), expected, strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=["reference", "blocked", "small blocks"])
def test_soft_cap(implementation: Any) -> None:
    """Gemma 2: logits are capped before the mask."""
    *given, cotangent = qkv()
    leaves = [torch.from_numpy(x).requires_grad_() for x in given]
    mask = torch.where(allowed(MASKS["causal"]), 0.0, torch.finfo(torch.float32).min)
    out, _ = modeling_gemma2.eager_attention_forward(
        Layer(), *(x.transpose(1, 2) for x in leaves), mask, scaling=0.4, softcap=1.5
    )
    expected = pulled(out, cotangent, *leaves)
    for a, b in zip(ours(causal(), implementation, [*given, cotangent], scale=0.4, softcap=1.5), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
