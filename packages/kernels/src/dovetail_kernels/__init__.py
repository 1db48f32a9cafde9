"""Operations for models in JAX: one function per operation, the same numbers everywhere."""

from dovetail_kernels._dropout import Dropout
from dovetail_kernels.activations import Activation, Clamped, gated_linear_unit, gated_product
from dovetail_kernels.attention import Attended, attention, merge
from dovetail_kernels.context_parallel import ring_attention, ulysses_attention
from dovetail_kernels.contrastive import contrastive_loss
from dovetail_kernels.conv import ConvActivation, causal_conv1d, causal_conv1d_step
from dovetail_kernels.cross_entropy import CrossEntropyOptions, LossAndZLoss, linear_cross_entropy
from dovetail_kernels.delta_rule import gated_delta_rule, gated_delta_step
from dovetail_kernels.divergences import Teacher, TopLogprobs, distillation_loss
from dovetail_kernels.expert_parallel import expert_parallel
from dovetail_kernels.masks import Mask, causal, chunked, dense, lengths, prefix, segments, window
from dovetail_kernels.mixer import DenseMixer
from dovetail_kernels.moe import (
    Dispatch,
    ExpertGroups,
    Routing,
    combine,
    permute,
    route,
    sort_by_expert,
)
from dovetail_kernels.norm import group_norm, layer_norm, rms_norm
from dovetail_kernels.operation import Call, Configured, Decision, Implementation, UnsupportedError, Wanted, configured
from dovetail_kernels.paged_attention import paged_attention, paged_latent_attention
from dovetail_kernels.paged_cache import empty_pages, gather_pages, page_slots, update_pages
from dovetail_kernels.penalties import bias_logits, penalize
from dovetail_kernels.quantized_matmul import quantized_matmul
from dovetail_kernels.ragged_dot import ragged_dot
from dovetail_kernels.rope import RopeTable, rope, rope_axes, rope_table
from dovetail_kernels.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    rope_frequencies,
)
from dovetail_kernels.sampling import Sampling, filter_logits, logprobs, sample, top_logprobs
from dovetail_kernels.scoring import LogprobsAndEntropy, token_logprobs
from dovetail_kernels.seam import einsum, take
from dovetail_kernels.selection import Explanation, explain, prefer
from dovetail_kernels.speculative import Verified, verify_draft
from dovetail_kernels.ssd import ssd, ssd_step
from dovetail_kernels.triangle import TriangleWeights, triangle_multiplication
from dovetail_kernels.tuning import Entry, Store, tune, tuned

__all__ = [
    "Activation",
    "Attended",
    "Call",
    "Clamped",
    "Configured",
    "ConvActivation",
    "CrossEntropyOptions",
    "Decision",
    "DenseMixer",
    "Dispatch",
    "Dropout",
    "DynamicScaling",
    "Entry",
    "ExpertGroups",
    "Explanation",
    "Implementation",
    "LinearScaling",
    "Llama3Scaling",
    "LogprobsAndEntropy",
    "LongRopeScaling",
    "LossAndZLoss",
    "Mask",
    "RopeScaling",
    "RopeTable",
    "Routing",
    "Sampling",
    "Store",
    "Teacher",
    "TopLogprobs",
    "TriangleWeights",
    "UnsupportedError",
    "Verified",
    "Wanted",
    "YarnScaling",
    "attention",
    "bias_logits",
    "causal",
    "causal_conv1d",
    "causal_conv1d_step",
    "chunked",
    "combine",
    "configured",
    "contrastive_loss",
    "dense",
    "distillation_loss",
    "einsum",
    "empty_pages",
    "expert_parallel",
    "explain",
    "filter_logits",
    "gated_delta_rule",
    "gated_delta_step",
    "gated_linear_unit",
    "gated_product",
    "gather_pages",
    "group_norm",
    "layer_norm",
    "lengths",
    "linear_cross_entropy",
    "logprobs",
    "merge",
    "page_slots",
    "paged_attention",
    "paged_latent_attention",
    "penalize",
    "permute",
    "prefer",
    "prefix",
    "quantized_matmul",
    "ragged_dot",
    "ring_attention",
    "rms_norm",
    "rope",
    "rope_axes",
    "rope_frequencies",
    "rope_table",
    "route",
    "sample",
    "segments",
    "sort_by_expert",
    "ssd",
    "ssd_step",
    "take",
    "token_logprobs",
    "top_logprobs",
    "triangle_multiplication",
    "tune",
    "tuned",
    "ulysses_attention",
    "update_pages",
    "verify_draft",
    "window",
]
