"""SigLIP's ``config.json`` and tensors: that of both encoders holds those of each."""

from collections.abc import Mapping
from typing import Any

from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap
from dovetail_models.hf_encoder import (
    SIZES,
    activation_field,
    attention_rules,
    linear_rules,
    mlp_rules,
    norm_rules,
)
from dovetail_models.hf_nested import Part, nested
from dovetail_models.patches import patch_rules
from dovetail_models.siglip import (
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from dovetail_weights import Reshape, Rule, Split, Transpose, WeightMap

__all__ = ["FAMILY", "TEXT", "VISION", "VISION_PART", "vision_rules"]

NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def _layer_rules(config: Any, ours: str, theirs: str) -> list[Rule]:
    layer, their_layer = f"{ours}layers/{{i}}", f"{theirs}encoder.layers.{{i}}"
    return [
        *attention_rules(config, f"{layer}/attention", f"{their_layer}.self_attn", NAMES),
        *norm_rules(f"{layer}/attention_norm", f"{their_layer}.layer_norm1"),
        *mlp_rules(f"{layer}/mlp", f"{their_layer}.mlp", "fc1", "fc2"),
        *norm_rules(f"{layer}/mlp_norm", f"{their_layer}.layer_norm2"),
    ]


def _text_rules(config: SiglipTextConfig, ours: str = "", theirs: str = "") -> list[Rule]:
    return [
        Rule(f"{ours}embedding", f"{theirs}embeddings.token_embedding.weight"),
        Rule(f"{ours}positions", f"{theirs}embeddings.position_embedding.weight"),
        *_layer_rules(config, ours, theirs),
        *norm_rules(f"{ours}norm", f"{theirs}final_layer_norm"),
        *linear_rules(f"{ours}head", f"{theirs}head"),
    ]


def vision_rules(config: SiglipVisionConfig, ours: str = "", theirs: str = "") -> list[Rule]:
    """Return the rules of a `SiglipVisionModel`, whose addresses and names begin with `ours` and `theirs`."""
    return [
        *patch_rules(f"{ours}patches", f"{theirs}embeddings.patch_embedding"),
        Rule(f"{ours}positions", f"{theirs}embeddings.position_embedding.weight"),
        *_layer_rules(config, ours, theirs),
        *norm_rules(f"{ours}norm", f"{theirs}post_layernorm"),
        *_pooling_rules(config, f"{ours}head", f"{theirs}head"),
    ]


def _pooling_rules(config: SiglipVisionConfig, ours: str, theirs: str) -> list[Rule]:
    d, h, e = config.features, config.heads, config.dim
    parts = [f"{ours}/{name}" for name in ("query", "key", "value")]
    split = Split((d, d, d), 0)
    return [
        Rule(f"{ours}/probe", f"{theirs}.probe", (Reshape((1, 1, d), (d,)),)),
        Rule(tuple(parts), f"{theirs}.attention.in_proj_weight", (split, Transpose(), Reshape((d, d), (d, h, e)))),
        Rule(tuple(f"{p}_bias" for p in parts), f"{theirs}.attention.in_proj_bias", (split, Reshape((d,), (h, e)))),
        Rule(f"{ours}/out", f"{theirs}.attention.out_proj.weight", (Transpose(), Reshape((d, d), (h, e, d)))),
        Rule(f"{ours}/out_bias", f"{theirs}.attention.out_proj.bias"),
        *norm_rules(f"{ours}/norm", f"{theirs}.layernorm"),
        *mlp_rules(f"{ours}/mlp", f"{theirs}.mlp", "fc1", "fc2"),
    ]


def _weight_map(config: SiglipConfig) -> WeightMap:
    one = (Reshape((1,), ()),)
    return WeightMap(
        [
            *_text_rules(config.text, "text/", "text_model."),
            *vision_rules(config.vision, "vision/", "vision_model."),
            *(Rule(name, name, one) for name in ("logit_scale", "logit_bias")),
        ]
    )


def _tower(architecture: str, model_type: str, config: Any, sizes: Mapping[str, str], options: Any) -> ConfigMap:
    return ConfigMap(
        architecture,
        model_type,
        config,
        sizes={**sizes, **SIZES},
        attends=False,
        options={**options, "layer_norm_eps": ("norm_eps", float, 1e-6)},
        ignored=("attention_dropout", "tie_word_embeddings", "initializer_range"),
        others=(activation_field("hidden_act", "activation", "gelu_pytorch_tanh"),),
    )


TEXT = Family(
    SiglipTextModel,
    _tower(
        "SiglipTextModel",
        "siglip_text_model",
        SiglipTextConfig,
        {"vocab_size": "vocab_size"},
        {"max_position_embeddings": ("max_position", int, 64), "projection_size": ("projection", int, None)},
    ),
    lambda config: WeightMap(_text_rules(config)),
    ignored=("*.position_ids",),
    spellings=((("{x}", "text_model.{x}"),),),  # transformers 4
)
VISION = Family(
    SiglipVisionModel,
    _tower(
        "SiglipVisionModel",
        "siglip_vision_model",
        SiglipVisionConfig,
        {},
        {
            "image_size": ("image_size", int, 224),
            "patch_size": ("patch_size", int, 16),
            "num_channels": ("channels", int, 3),
            "vision_use_head": ("head", bool, True),
        },
    ),
    lambda config: WeightMap(vision_rules(config)),
    ignored=("*.position_ids",),
    spellings=((("{x}", "vision_model.{x}"),),),
)
# The original checkpoints leave out what is as in the base models.
SIZES_OF_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
TEXT_PART = Part("text_config", TEXT.config_map, {**SIZES_OF_BASE, "vocab_size": 32000})
VISION_PART = Part("vision_config", VISION.config_map, SIZES_OF_BASE)
FAMILY = Family(
    SiglipModel,
    ConfigMap(
        "SiglipModel",
        "siglip",
        SiglipConfig,
        sizes={},
        attends=False,
        options={},
        ignored=("initializer_factor", "tie_word_embeddings"),
        others=(nested({"text": TEXT_PART, "vision": VISION_PART}),),
    ),
    _weight_map,
    ignored=("*.position_ids",),
)
