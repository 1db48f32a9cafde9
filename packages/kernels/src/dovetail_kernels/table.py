"""All operations."""

from dovetail_kernels.attention import ATTENTION
from dovetail_kernels.paged_attention import PAGED_ATTENTION

OPERATIONS = (ATTENTION, PAGED_ATTENTION)
