"""All operations."""

from dovetail_kernels.attention import ATTENTION
from dovetail_kernels.conv import CAUSAL_CONV1D
from dovetail_kernels.delta_rule import GATED_DELTA_RULE
from dovetail_kernels.paged_attention import PAGED_ATTENTION
from dovetail_kernels.ssd import SSD

OPERATIONS = (ATTENTION, CAUSAL_CONV1D, GATED_DELTA_RULE, PAGED_ATTENTION, SSD)
