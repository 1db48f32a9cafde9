"""All operations, with implementations to choose from or without, and what the documentation says about them."""

from typing import NamedTuple

from dovetail_kernels.activations import GATED_LINEAR_UNIT
from dovetail_kernels.attention import ATTENTION
from dovetail_kernels.conv import CAUSAL_CONV1D
from dovetail_kernels.cross_entropy import LINEAR_CROSS_ENTROPY
from dovetail_kernels.delta_rule import GATED_DELTA_RULE
from dovetail_kernels.divergences import DISTILLATION_LOSS
from dovetail_kernels.norm import LAYER_NORM, RMS_NORM
from dovetail_kernels.paged_attention import PAGED_ATTENTION
from dovetail_kernels.quantized_matmul import QUANTIZED_MATMUL
from dovetail_kernels.ragged_dot import RAGGED_DOT
from dovetail_kernels.scoring import TOKEN_LOGPROBS
from dovetail_kernels.ssd import SSD
from dovetail_kernels.triangle import TRIANGLE_MULTIPLICATION

OPERATIONS = (
    ATTENTION,
    CAUSAL_CONV1D,
    DISTILLATION_LOSS,
    GATED_DELTA_RULE,
    GATED_LINEAR_UNIT,
    LAYER_NORM,
    LINEAR_CROSS_ENTROPY,
    PAGED_ATTENTION,
    QUANTIZED_MATMUL,
    RAGGED_DOT,
    RMS_NORM,
    SSD,
    TOKEN_LOGPROBS,
    TRIANGLE_MULTIPLICATION,
)


class Plain(NamedTuple):
    """A function of arrays with nothing to choose: plain JAX on every platform, or made of an operation.

    Attributes:
        name: that of the function.
        accumulation: the dtype of sums.
        error: bound of the error against a float64 reference, in words.
        gradient: which derivatives it has.
        platforms: where it is meant to be used.
    """

    name: str
    accumulation: str
    error: str
    gradient: str = "any"
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")


_WIDE, _NONE, _COPY = "float32 (float64 for float64)", "none: integers", "nothing is added up"
FUNCTIONS = (
    Plain("bias_logits", "float32", "1e-6 of each logit"),
    Plain("causal_conv1d_step", _WIDE, "that of `causal_conv1d`"),
    Plain("combine", _WIDE, "1e-12 in float64 for a layer of experts", "first order, reverse mode"),
    Plain("contrastive_loss", _WIDE, "that of `linear_cross_entropy`", "those of `linear_cross_entropy`"),
    Plain("einsum", "that of the product: float32 for 16 bits", "1e-5 in float32; quantized as `quantized_matmul`"),
    Plain("empty_pages", _COPY, "exact", "none: zeros"),
    Plain("expert_parallel", _WIDE, "1e-5 in float32", "first order, reverse mode"),
    Plain("filter_logits", "float32", "1e-6 of each logit that stays", "any, of the logits that stay"),
    Plain("gated_delta_step", _WIDE, "that of `gated_delta_rule`"),
    Plain("gated_product", _WIDE, "1e-6 of the largest value in float32"),
    Plain("gather_pages", _COPY, "exact, but for the product with the scales of 8 bits"),
    Plain("group_norm", _WIDE, "1e-5 in float32"),
    Plain("logprobs", "float32", "1e-5"),
    Plain("merge", "that of the log-sum-exp: float32 (float64 for float64)", "2e-5 in float32"),
    Plain("page_slots", _COPY, "exact", _NONE),
    Plain("paged_latent_attention", _WIDE, "that of `paged_attention`", "those of `paged_attention`"),
    Plain("penalize", "float32", "1e-5"),
    Plain("permute", "gradients: " + _WIDE, "exact", "any order, reverse mode"),
    Plain("ring_attention", _WIDE, "2e-5 in float32", "first order, reverse mode"),
    Plain("rope", "that of `x`", "1e-5 in float32, and 1e-6 for each position from 0"),
    Plain("rope_table", "float32", "1e-5, and 1e-6 for each position from 0"),
    Plain("route", _WIDE, "1e-5 of each weight in float32", "any, of weights and scores"),
    Plain("sample", "float32", "tokens follow the filtered softmax (chi-squared test)", _NONE),
    Plain("sort_by_expert", "int32", "exact", _NONE),
    Plain("ssd_step", _WIDE, "that of `ssd`"),
    Plain("take", "gradients: float32 for 16 bits", "exact; quantized as `dequantize`", "any; of 16 bits reverse mode"),
    Plain("top_logprobs", "float32", "1e-5"),
    Plain("ulysses_attention", _WIDE, "2e-5 in float32", "those of `attention`"),
    Plain(
        "update_pages",
        _COPY,
        "exact; of a token's largest value, 0.004 in int8, 0.063 in float8",
        "any, of float pools",
    ),
    Plain("verify_draft", "float32", "tokens follow the target's filtered softmax (chi-squared test)", _NONE),
)
"""All other public functions of arrays; not those that make masks, frequencies or choices."""


def markdown() -> str:
    """Return tables of operations with their implementations, in the order in which they are tried, and of the rest."""
    lines = ["| operation | implementation | where | derivatives | what it does |", "|---|---|---|---|---|"]
    for operation in OPERATIONS:
        for x in operation.implementations:
            cells = (f"`{operation.name}`", f"`{x.name}`", ", ".join(x.platforms), x.gradient, x.features)
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Kernels of our own for NVIDIA GPUs are not offered yet; their place is before `blocked`.",
        "",
        "| operation | sums are kept in | error against float64 |",
        "|---|---|---|",
        *(f"| `{x.name}` | {x.accumulation} | {x.error} |" for x in OPERATIONS),
        "",
        "These have one form, of plain JAX or of the operations above.",
        "",
        "| function | where | derivatives | sums are kept in | error against float64 |",
        "|---|---|---|---|---|",
        *(
            f"| `{x.name}` | {', '.join(x.platforms)} | {x.gradient} | {x.accumulation} | {x.error} |"
            for x in FUNCTIONS
        ),
    ]
    return "\n".join(lines)
