"""Norms and gated units of `dovetail_kernels` against torch, values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dovetail_kernels import gated_linear_unit, group_norm, layer_norm, rms_norm

SHAPES: dict[str, Any] = {
    "layer": (lambda x, w, b: layer_norm(x, w, b, eps=1e-5), lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-5)),
    "rms": (lambda x, w, b: rms_norm(x, w, eps=1e-5) + b, lambda x, w, b: F.rms_norm(x, (16,), w, 1e-5) + b),
    "group": (
        lambda x, w, b: group_norm(x, 4, w, b),
        lambda x, w, b: F.group_norm(x.movedim(-1, 1), 4, w, b).movedim(1, -1),
    ),
}
GATES: dict[str, Any] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def compare(ours: Any, theirs: Any, arrays: list[np.ndarray]) -> None:
    out, pull = jax.vjp(ours, *(jnp.asarray(a) for a in arrays))
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = theirs(*tensors)
    cotangent = np.random.default_rng(9).standard_normal(out.shape).astype(np.float32)
    expected.backward(torch.from_numpy(cotangent))
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=2e-5)
    for gradient, tensor in zip(pull(jnp.asarray(cotangent)), tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-4)


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", SHAPES)
def test_norms(name: str) -> None:
    """A checkpoint trained in torch is normalised otherwise here."""
    compare(*SHAPES[name], draw((3, 5, 16), (16,), (16,)))


@pytest.mark.parametrize("name", GATES)
def test_gated_units(name: Any) -> None:
    """A checkpoint's activation is another one here."""
    compare(
        lambda x, gate, up: gated_linear_unit(x, gate, up, activation=name),
        lambda x, gate, up: GATES[name](x @ gate) * (x @ up),
        draw((3, 5, 16), (16, 8), (16, 8)),
    )


def test_the_clamped_unit_is_that_of_gpt_oss() -> None:
    """The limits, the slope or the 1 that is added differ from the model's."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=1))
    (both,) = draw((7, 12))
    expected = experts._apply_gate(torch.from_numpy(both * 8)).numpy()
    weight = np.stack([np.eye(12)[:, ::2], np.eye(12)[:, 1::2]], 1).astype(np.float32)
    np.testing.assert_allclose(
        gated_linear_unit(jnp.asarray(both * 8), jnp.asarray(weight), activation="clamped"), expected, atol=1e-5
    )
