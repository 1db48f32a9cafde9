"""A small model of every family, and of every encoder; and which of them a default run takes."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from dovetail_kernels import LongRopeScaling, YarnScaling
from dovetail_models import (
    BertConfig,
    BertForMaskedLM,
    BertMaskedLMConfig,
    BertModel,
    DeepseekV2,
    DeepseekV2Config,
    DeepseekV3,
    DeepseekV3Config,
    Gemma2,
    Gemma2Config,
    Gemma3,
    Gemma3Config,
    Glm4Moe,
    Glm4MoeConfig,
    Gpt2,
    Gpt2Config,
    GptOss,
    GptOssConfig,
    Mamba2,
    Mamba2Config,
    Mistral,
    MistralConfig,
    Mixtral,
    MixtralConfig,
    Olmo2,
    Olmo2Config,
    Olmo3,
    Olmo3Config,
    Phi3,
    Phi3Config,
    Qwen2,
    Qwen2Config,
    Qwen3,
    Qwen3Config,
    Qwen3Moe,
    Qwen3MoeConfig,
    Qwen3Next,
    Qwen3NextConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SmolLM3,
    SmolLM3Config,
    T5EncoderConfig,
    T5EncoderModel,
    ViTClassifierConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SIZES = {"vocab_size": 24, "features": 8, "hidden": 12, "layers": 2, "heads": 4, "kv_heads": 2, "init_std": 0.5}
RECURRENT = {name: SIZES[name] for name in ("vocab_size", "features", "layers", "init_std")}
SHARED = {"experts": 4, "top_k": 2, "expert_hidden": 5, "shared_experts": 2, "first_dense": 1}
LATENT = {name: value for name, value in SIZES.items() if name != "kv_heads"} | {
    **{"latent_dim": 6, "nope_dim": 4, "rope_dim": 2, "value_dim": 3, **SHARED},
}
NEXT = {"expert_hidden": 6, "experts": 3, "top_k": 2, "shared_hidden": 5}
LONG = LongRopeScaling((1.0, 1.5), (2.0, 4.0), 16, factor=8.0)
MODELS: dict[str, tuple[Any, Any]] = {
    "deepseek_v2": (
        DeepseekV2,
        DeepseekV2Config(**LATENT, query_rank=None, expert_groups=2, kept_groups=1, mlp_bias=True, balanced=True),
    ),
    "deepseek_v3": (
        DeepseekV3,
        DeepseekV3Config(**LATENT, query_rank=5, expert_groups=2, kept_groups=2, attention_bias=True, ahead=1),
    ),
    "gemma2": (Gemma2, Gemma2Config(**SIZES, head_dim=6, windows=(3, None), query_dim=5, attention_softcap=2.0)),
    "gemma3": (
        Gemma3,
        Gemma3Config(**SIZES, head_dim=6, windows=(3, None), query_dim=5, final_softcap=2.0, local_theta=50.0),
    ),
    "glm4_moe": (
        Glm4Moe,
        Glm4MoeConfig(
            **SIZES | {"features": 6},
            **SHARED,
            head_dim=8,
            expert_groups=2,
            kept_groups=2,
            attention_bias=True,
            attention_norms=True,
            ahead=1,
        ),
    ),
    "gpt2": (Gpt2, Gpt2Config(**RECURRENT, heads=4, max_position=64, scaled_by_layer=True)),
    "gpt_oss": (GptOss, GptOssConfig(**SIZES, head_dim=6, experts=3, top_k=2, windows=(3, None), alpha=1.5, limit=0.5)),
    "olmo2": (Olmo2, Olmo2Config(**SIZES, attention_bias=True)),
    "olmo3": (Olmo3, Olmo3Config(**SIZES, windows=(None, 3), rope_scaling=YarnScaling(2.0, 16), local_theta=50.0)),
    "phi3": (Phi3, Phi3Config(**SIZES, head_dim=8, window=4, rotary_fraction=0.5, rope_scaling=LONG)),
    "smollm3": (SmolLM3, SmolLM3Config(**SIZES, rotated=(False, True), windows=(None, 4), mlp_bias=True)),
    "mamba2": (
        Mamba2,
        Mamba2Config(
            **RECURRENT, heads=4, head_dim=4, state_size=5, groups=2, conv_width=3, bias=True, dt_limits=(0.01, 2.0)
        ),
    ),
    "mistral": (Mistral, MistralConfig(**SIZES, window=3)),
    "qwen2": (Qwen2, Qwen2Config(**SIZES, windows=(None, 2), tied=True)),
    "mixtral": (Mixtral, MixtralConfig(**SIZES, experts=4, window=3, balanced=True)),
    "qwen3": (Qwen3, Qwen3Config(**SIZES, head_dim=6, attention_bias=True, rope_scaling=YarnScaling(2.0, 16))),
    "qwen3_moe": (
        Qwen3Moe,
        Qwen3MoeConfig(**SIZES, head_dim=6, expert_hidden=6, experts=4, top_k=3, sparse_step=2, window=4),
    ),
    "qwen3_next": (
        Qwen3Next,
        Qwen3NextConfig(
            **SIZES,
            **NEXT,
            head_dim=8,
            linear=(True, False),
            key_heads=2,
            value_heads=4,
            key_dim=4,
            value_dim=3,
            rotary_fraction=0.5,
        ),
    ),
}

LAYERS = {"features": 8, "hidden": 12, "layers": 2, "heads": 2, "init_std": 0.5}
IMAGES = {"image_size": 4, "patch_size": 2}
TEXT, VISION = SiglipTextConfig(**LAYERS, vocab_size=10), SiglipVisionConfig(**LAYERS, **IMAGES)
ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (BertModel, BertConfig(**LAYERS, vocab_size=10)),
    "masked_lm": (BertForMaskedLM, BertMaskedLMConfig(**LAYERS, vocab_size=10)),
    "siglip": (SiglipModel, SiglipConfig(text=TEXT, vision=VISION)),
    "siglip text": (SiglipTextModel, TEXT),
    "siglip vision": (SiglipVisionModel, VISION),
    "t5": (T5EncoderModel, T5EncoderConfig(**LAYERS, vocab_size=10)),
    "vit": (ViTModel, ViTConfig(**LAYERS, **IMAGES)),
    "classifier": (ViTForImageClassification, ViTClassifierConfig(**LAYERS, **IMAGES, labels=("cat", "dog"))),
}

KINDS = ("bert", "deepseek_v3", "gemma2", "gpt2", "gpt_oss", "llama", "mamba2", "qwen3_next", "siglip", "smollm3")
"""Families that differ in what matters to most tests of all of them."""
FEW = ("deepseek_v3", "gemma2", "gpt2", "gpt_oss", "siglip")
"""The same for tests that compile much."""


def by_default(names: Iterable[str], chosen: Collection[str] = KINDS) -> list[Any]:
    """Parameters of a test: the long counts take all, a default run the chosen ones."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.soak) for name in names]
