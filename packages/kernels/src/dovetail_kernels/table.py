"""All operations that have several implementations, and what the documentation says about them."""

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


def markdown() -> str:
    """Return a table of operations and implementations, in the order in which they are tried."""
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
    ]
    return "\n".join(lines)
