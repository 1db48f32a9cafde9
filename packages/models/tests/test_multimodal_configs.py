"""Configurations for texts with images: what is absent, what makes no model, what is refused."""

import dataclasses
from typing import Any

import pytest

from dovetail_kernels import LinearScaling
from dovetail_models import (
    ConfigError,
    Gemma3Config,
    Gemma3MultimodalConfig,
    SiglipVisionConfig,
    config_from_hf,
    describe,
)

SIZES = {"features": 8, "hidden": 16, "layers": 2, "heads": 2}
TEXT = Gemma3Config(vocab_size=24, **SIZES | {"layers": 4})
VISION = SiglipVisionConfig(**SIZES, image_size=4, patch_size=1, head=False)
IDS = {"tokens_per_image": 4, "image_token_id": 24, "begin_image_id": 3, "end_image_id": 4}
CONFIG = Gemma3MultimodalConfig(text=TEXT, vision=VISION, **IDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": dataclasses.replace(VISION, head=True)}, r"vision.head=True; expected False"),
        ({"text": dataclasses.replace(TEXT, final_softcap=3.0)}, r"text.final_softcap=3.0; expected None"),
        ({"tokens_per_image": 5}, "tokens_per_image=5; expected a square"),
        ({"tokens_per_image": 0}, "tokens_per_image=0; expected a square"),
        ({"tokens_per_image": -4}, "tokens_per_image=-4; expected a square"),
        ({"tokens_per_image": 9}, "tokens_per_image=9, 3 a side, for 4 patches a side; expected a divisor"),
        ({"tokens_per_image": 64}, "tokens_per_image=64, 8 a side, for 4 patches a side"),
        ({"image_token_id": 3}, "image_token_id=3, begin_image_id=3, end_image_id=4; expected"),
        ({"end_image_id": -1}, "end_image_id=-1; expected"),
    ],
)
def test_refused_configurations(changes: Any, message: str) -> None:
    """A size that makes no model is named at once."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_layers_of_both_count() -> None:
    """A description of an absurd encoder would be traced for days."""
    assert CONFIG.layers == 6
    with pytest.raises(ValueError, match="layers=1000000004"):
        describe(dataclasses.replace(CONFIG, vision=dataclasses.replace(VISION, layers=10**9)))


def test_what_is_absent_is_as_in_transformers() -> None:
    """The original checkpoints write what differs from the smallest model alone."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "num_attention_heads": 16}
    vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    got = config_from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            **{"boi_token_index": 255999, "eoi_token_index": 256000, "image_token_index": 262144},
            **{"eos_token_id": [1, 106], "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3"},
            **{
                "text_config": text,
                "vision_config": vision,
                "torch_dtype": "bfloat16",
                "transformers_version": "4.50.0",
            },
        }
    )
    assert got == config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": vision})
    assert (got.text.vocab_size, got.text.heads, got.text.kv_heads, got.text.dim, got.tied) == (262208, 8, 4, 256, True)
    assert got.text.rope_scaling == LinearScaling(8.0)
    assert got.text.windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    assert (got.vision.patches, got.side, len(got.image), got.max_position) == (4096, 16, 258, 131072)
    untied = {"model_type": "gemma3", "text_config": text, "vision_config": vision, "tie_word_embeddings": False}
    assert not config_from_hf(untied).tied
    assert config_from_hf(
        {**untied, "text_config": {**text, "tie_word_embeddings": False}, "tie_word_embeddings": None}
    ).tied


HEADLESS = {"vision_use_head": False}
SMALL = {**HEADLESS, "image_size": 8, "patch_size": 2}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "text_config=None; expected an object"),
        ({"text_config": [], "vision_config": HEADLESS}, r"text_config=\[\]; expected an object"),
        ({"text_config": {}}, "vision_config=None; expected an object"),
        (
            {"text_config": {"hidden_size": "8"}, "vision_config": HEADLESS},
            "text_config: hidden_size='8'; expected an int",
        ),
        ({"text_config": {"model_type": "llama"}, "vision_config": HEADLESS}, "text_config: model_type='llama'"),
        ({"text_config": {"widow": 3}, "vision_config": HEADLESS}, r"text_config: unknown fields \['widow'\]"),
        ({"text_config": {}, "vision_config": {**HEADLESS, "patch_size": 0}}, "vision_config: patch_size=0"),
        ({"text_config": {}, "vision_config": {**HEADLESS, "image_size": [8, 8]}}, "vision_config: image_size="),
        ({"text_config": {}, "vision_config": {}}, "vision.head=True; expected False"),
        ({"text_config": {}, "vision_config": HEADLESS}, "tokens_per_image=256, 16 a side, for 14 patches a side"),
        (
            {"text_config": {}, "vision_config": SMALL, "mm_tokens_per_image": 3},
            "tokens_per_image=3; expected a square",
        ),
        (
            {"text_config": {}, "vision_config": SMALL, "mm_tokens_per_image": 4.0},
            "mm_tokens_per_image=4.0; expected an int",
        ),
        (
            {"text_config": {}, "vision_config": SMALL, "tie_word_embeddings": 1},
            "tie_word_embeddings=1; expected a bool",
        ),
        ({"text_config": {}, "vision_config": SMALL, "projector": 1}, r"unknown fields \['projector'\]"),
        (
            {"text_config": {"final_logit_softcapping": 3.0}, "vision_config": SMALL, "mm_tokens_per_image": 4},
            "text.final_softcap=3.0; expected None",
        ),
    ],
)
def test_refused_fields(values: Any, message: str) -> None:
    """A field that the model cannot honour is not dropped in silence."""
    with pytest.raises(ConfigError, match=message):
        config_from_hf({"architectures": ["Gemma3ForConditionalGeneration"], **values})
