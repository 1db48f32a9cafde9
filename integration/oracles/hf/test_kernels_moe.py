"""Routing and whole expert layers against those of transformers: Mixtral, Qwen3-MoE, DeepSeek V2 and V3, in float64."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe

from dovetail_kernels import DenseMixer, ExpertGroups, combine, permute, ragged_dot, route, sort_by_expert
from dovetail_models import Router, Selection, SparseTraining
from dovetail_models.balance import router_terms

TOKENS, EXPERTS, TOP, DIM, INNER = 40, 12, 3, 10, 6
SIZES = {"hidden_size": DIM, "num_experts_per_tok": TOP, "hidden_act": "silu"}
QWEN = {**SIZES, "num_experts": EXPERTS, "moe_intermediate_size": INNER}
DEEPSEEK = {
    **SIZES,
    "n_routed_experts": EXPERTS,
    "moe_intermediate_size": INNER,
    "n_shared_experts": 1,
    "num_attention_heads": 2,
    "routed_scaling_factor": 2.5,
}
GROUPED = {"n_group": 4, "topk_group": 2}


class Case(NamedTuple):
    """A layer of transformers, and the same routing by ours."""

    layer: Any
    options: dict[str, Any]
    bias: bool = False


CASES = {
    "Mixtral": Case(
        lambda: modeling_mixtral.MixtralSparseMoeBlock(
            MixtralConfig(**SIZES, num_local_experts=EXPERTS, intermediate_size=INNER)
        ),
        {},
    ),
    "Qwen3-MoE": Case(
        lambda: modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**QWEN, norm_topk_prob=True)), {}
    ),
    "Qwen3-MoE, as they are": Case(
        lambda: modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**QWEN, norm_topk_prob=False)),
        {"renormalize": False},
    ),
    "DeepSeek-V2": Case(
        lambda: modeling_deepseek_v2.DeepseekV2Moe(
            DeepseekV2Config(**DEEPSEEK, **GROUPED, topk_method="group_limited_greedy")
        ),
        {"groups": ExpertGroups(4, 2, best=1), "renormalize": False, "scale": 2.5},
    ),
    "DeepSeek-V3": Case(
        lambda: modeling_deepseek_v3.DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK, **GROUPED, norm_topk_prob=True)),
        {"groups": ExpertGroups(4, 2), "scoring": "sigmoid", "scale": 2.5},
        bias=True,
    ),
}


def theirs(case: Case) -> torch.nn.Module:
    """A layer with drawn parameters, and without the shared experts that every token goes to."""
    torch.manual_seed(0)
    layer = case.layer().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        if hasattr(layer, "shared_experts"):
            layer.shared_experts.down_proj.weight.zero_()
        if case.bias:
            layer.gate.e_score_correction_bias.normal_()
    return layer


def ours(case: Case, x: Any, router: Any, gate_up: Any, down: Any, bias: Any) -> jax.Array:
    """The same layer; parameters in the layout of transformers."""
    routing = route(x @ router.T, TOP, bias=bias, **case.options)
    dispatch = sort_by_expert(routing.experts, EXPERTS)
    rows = permute(x, dispatch)
    gate, up = jnp.split(ragged_dot(rows, gate_up.swapaxes(1, 2), dispatch.group_sizes), 2, axis=1)
    rows = ragged_dot(jax.nn.silu(gate) * up, down.swapaxes(1, 2), dispatch.group_sizes)
    return combine(rows, routing.weights, dispatch)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layer(case: Case) -> None:
    """A converted checkpoint gives other tokens, or trains differently, if its experts or weights are others."""
    layer = theirs(case)
    rng = np.random.default_rng(0)
    x, cotangent = (torch.from_numpy(rng.standard_normal((1, TOKENS, DIM))).requires_grad_() for _ in range(2))
    parameters = [layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj]
    out = layer(x)
    out = out[0] if isinstance(out, tuple) else out
    expected = [out, *torch.autograd.grad(out, [x, *parameters], cotangent)]
    with jax.enable_x64(True):
        given = [jnp.asarray(p.detach().numpy()) for p in (x[0], *parameters)]
        bias = jnp.asarray(layer.gate.e_score_correction_bias.double().numpy()) if case.bias else None
        got, pull = jax.vjp(jax.jit(lambda *args: ours(case, *args, bias)), *given)
        found = [got, *pull(jnp.asarray(cotangent[0].detach().numpy()))]
        for a, reference in zip(found, expected, strict=True):
            b = reference.detach().numpy().reshape(a.shape)
            # transformers computes the weights in float32 whatever the model's dtype
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss(masked: bool) -> None:
    """The loss over all tokens is Mixtral's auxiliary one (times top_k), with and without padding."""
    logits = np.random.default_rng(0).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    where = np.random.default_rng(1).random((4, TOKENS // 4)) < 0.7
    mask = torch.from_numpy(where) if masked else None
    expected = modeling_mixtral.load_balancing_loss_func((torch.from_numpy(logits),), EXPERTS, TOP, mask)
    select = Selection(experts=EXPERTS, top_k=TOP, training=SparseTraining(switch_coef=1.0))
    router = Router(DIM, select, init=nnx.initializers.zeros, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rows = jnp.asarray(where, jnp.int32)
    given = jnp.asarray(logits), router.choose(jnp.asarray(logits)), DenseMixer.of(rows, rows if masked else None)
    total, tokens = router_terms(router, *given)["loss/switch_per_micro_batch"]
    assert tokens == (where.sum() if masked else TOKENS)
    np.testing.assert_allclose(total / tokens * TOP, expected.item(), rtol=1e-5)
