"""``config.json`` and tensors of Gemma 3 with images: its decoder's, its encoder's of images, and what joins them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dovetail_models import gemma2, gemma3
from dovetail_models.family import Family
from dovetail_models.gemma3_multimodal import Gemma3Multimodal, Gemma3MultimodalConfig
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_fields import field
from dovetail_models.hf_nested import Part, nested
from dovetail_models.hf_siglip import VISION_PART, vision_rules
from dovetail_weights import Rule, WeightMap

__all__ = ["FAMILY"]

# The original checkpoints leave out what is as in the smallest model.
SIZES = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
VISION = "vision_tower.vision_model."
PARTS = nested({"text": Part("text_config", gemma3.FAMILY.config_map, SIZES), "vision": VISION_PART})


# Names are those of the original checkpoints. Transformers 5 writes others of an encoder that it made itself, and has
# others in memory.
MADE = ((f"{VISION}{{x}}", "vision_tower.{x}"),)
IN_MEMORY = (
    ("language_model.lm_head.{x}", "lm_head.{x}"),
    ("language_model.model.{x}", "model.language_model.{x}"),
    ("vision_tower.{x}", "model.vision_tower.{x}"),
    ("multi_modal_projector.{x}", "model.multi_modal_projector.{x}"),
)


def _read(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Mapping[str, Any]:
    found = PARTS.read(values, fields)
    tied = field(values, "tie_word_embeddings", bool, True)  # that of text_config does not matter there
    return {**found, "text": dataclasses.replace(found["text"], tied=tied)}


def _write(config: Gemma3MultimodalConfig) -> Mapping[str, Any]:
    return {**PARTS.write(config), "tie_word_embeddings": config.tied}


def _within(rule: Rule, ours: str, theirs: str) -> Rule:
    addresses, names = (
        tuple(prefix + x for x in given) for prefix, given in ((ours, rule.addresses), (theirs, rule.names))
    )
    return dataclasses.replace(rule, addresses=addresses, names=names)


def _weight_map(config: Gemma3MultimodalConfig) -> WeightMap:
    return WeightMap(
        [
            *(_within(rule, "text/", "language_model.") for rule in gemma2.weight_map(config.text).rules),
            *vision_rules(config.vision, "vision/", VISION),
            Rule("projector/norm/weight", "multi_modal_projector.mm_soft_emb_norm.weight"),
            Rule("projector/weight", "multi_modal_projector.mm_input_projection_weight"),
        ]
    )


FAMILY = Family(
    Gemma3Multimodal,
    ConfigMap(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        Gemma3MultimodalConfig,
        sizes={},
        attends=False,
        options={
            "mm_tokens_per_image": ("tokens_per_image", int, 256),
            "image_token_index": ("image_token_id", int, 262144),
            "boi_token_index": ("begin_image_id", int, 255999),
            "eoi_token_index": ("end_image_id", int, 256000),
        },
        ignored=("initializer_range",),
        others=(Fields((*PARTS.names, "tie_word_embeddings"), _read, _write),),
    ),
    _weight_map,
    ignored=("*.position_ids", "language_model.lm_head.weight"),
    spellings=(MADE, IN_MEMORY, (*MADE, *IN_MEMORY)),
    stacks=lambda config: {"text/layers": config.text.layers},
)
