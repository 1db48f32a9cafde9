"""Operations for models in JAX: one function per operation, the same numbers everywhere."""

from dovetail_kernels.attention import AttentionImplementation, attention
from dovetail_kernels.cross_entropy import linear_cross_entropy
from dovetail_kernels.mixer import DenseMixer
from dovetail_kernels.norm import rms_norm
from dovetail_kernels.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    RopeTable,
    YarnScaling,
    rope,
    rope_frequencies,
    rope_table,
)
from dovetail_kernels.sampling import Sampling, filter_logits, sample, token_logprobs, top_logprobs
from dovetail_kernels.seam import einsum, take

__all__ = [
    "AttentionImplementation",
    "DenseMixer",
    "LinearScaling",
    "Llama3Scaling",
    "RopeScaling",
    "RopeTable",
    "Sampling",
    "YarnScaling",
    "attention",
    "einsum",
    "filter_logits",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "sample",
    "take",
    "token_logprobs",
    "top_logprobs",
]
