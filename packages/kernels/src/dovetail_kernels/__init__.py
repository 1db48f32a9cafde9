"""Operations for models in JAX: one function per operation, the same numbers everywhere."""

from dovetail_kernels._dropout import Dropout
from dovetail_kernels.attention import Attended, attention, merge
from dovetail_kernels.contrastive import contrastive_loss
from dovetail_kernels.conv import ConvActivation, causal_conv1d, causal_conv1d_step
from dovetail_kernels.cross_entropy import CrossEntropyOptions, LossAndZLoss, linear_cross_entropy
from dovetail_kernels.delta_rule import gated_delta_rule, gated_delta_step
from dovetail_kernels.divergences import Teacher, TopLogprobs, distillation_loss
from dovetail_kernels.masks import Mask, causal, chunked, dense, lengths, prefix, segments, window
from dovetail_kernels.mixer import DenseMixer
from dovetail_kernels.norm import rms_norm
from dovetail_kernels.operation import Call, Configured, Decision, Implementation, UnsupportedError, configured
from dovetail_kernels.paged_attention import paged_attention, paged_latent_attention
from dovetail_kernels.paged_cache import empty_pages, gather_pages, page_slots, update_pages
from dovetail_kernels.quantized_matmul import quantized_matmul
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
from dovetail_kernels.sampling import Sampling, filter_logits, logprobs, sample, top_logprobs
from dovetail_kernels.scoring import LogprobsAndEntropy, token_logprobs
from dovetail_kernels.seam import einsum, take
from dovetail_kernels.selection import Explanation, explain, prefer
from dovetail_kernels.ssd import ssd, ssd_step
from dovetail_kernels.tuning import Entry, Store, tune, tuned

__all__ = [
    "Attended",
    "Call",
    "Configured",
    "ConvActivation",
    "CrossEntropyOptions",
    "Decision",
    "DenseMixer",
    "Dropout",
    "Entry",
    "Explanation",
    "Implementation",
    "LinearScaling",
    "Llama3Scaling",
    "LogprobsAndEntropy",
    "LossAndZLoss",
    "Mask",
    "RopeScaling",
    "RopeTable",
    "Sampling",
    "Store",
    "Teacher",
    "TopLogprobs",
    "UnsupportedError",
    "YarnScaling",
    "attention",
    "causal",
    "causal_conv1d",
    "causal_conv1d_step",
    "chunked",
    "configured",
    "contrastive_loss",
    "dense",
    "distillation_loss",
    "einsum",
    "empty_pages",
    "explain",
    "filter_logits",
    "gated_delta_rule",
    "gated_delta_step",
    "gather_pages",
    "lengths",
    "linear_cross_entropy",
    "logprobs",
    "merge",
    "page_slots",
    "paged_attention",
    "paged_latent_attention",
    "prefer",
    "prefix",
    "quantized_matmul",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "sample",
    "segments",
    "ssd",
    "ssd_step",
    "take",
    "token_logprobs",
    "top_logprobs",
    "tune",
    "tuned",
    "update_pages",
    "window",
]
