"""All operations."""

from dovetail_kernels.attention import ATTENTION
from dovetail_kernels.conv import CAUSAL_CONV1D
from dovetail_kernels.cross_entropy import LINEAR_CROSS_ENTROPY
from dovetail_kernels.delta_rule import GATED_DELTA_RULE
from dovetail_kernels.divergences import DISTILLATION_LOSS
from dovetail_kernels.paged_attention import PAGED_ATTENTION
from dovetail_kernels.quantized_matmul import QUANTIZED_MATMUL
from dovetail_kernels.scoring import TOKEN_LOGPROBS
from dovetail_kernels.ssd import SSD

OPERATIONS = (
    ATTENTION,
    CAUSAL_CONV1D,
    DISTILLATION_LOSS,
    GATED_DELTA_RULE,
    LINEAR_CROSS_ENTROPY,
    PAGED_ATTENTION,
    QUANTIZED_MATMUL,
    SSD,
    TOKEN_LOGPROBS,
)
