"""All operations."""

from dovetail_kernels.attention import ATTENTION

OPERATIONS = (ATTENTION,)
