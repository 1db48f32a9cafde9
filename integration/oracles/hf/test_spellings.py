"""Checkpoints that spell names as the hub does: transformers reads the same directory to the same numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from encoders import ENCODERS, inputs_of, ours_outputs, random_encoder, their_outputs, widen
from families import load_theirs, random_config, widened

from dovetail_kernels import DenseMixer
from dovetail_models import convert, from_pretrained
from dovetail_weights import open_directory, write_directory


def older(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def spelled(source: Path, spell: Callable[[str], str], **more: np.ndarray) -> Path:
    tensors = {spell(name): np.array(lazy.read()) for name, lazy in open_directory(source).items()}
    files = {"config.json": (source / "config.json").read_text()}
    return write_directory(source.parent / "spelled", tensors | more, extra_files=files)


def encoder_of(architecture: str, folder: Path) -> Any:
    kind = getattr(transformers, architecture)
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def same_state(one: Any, other: Any) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


# Which model is stored, which one is read of it, and how names are spelled.
CASES: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "old bert": ("BertModel", "BertModel", older),
    "masked_lm": ("BertForMaskedLM", "BertForMaskedLM", older),
    "bert of pretraining": ("BertForPreTraining", "BertModel", older),
    "masked_lm of pretraining": ("BertForPreTraining", "BertForMaskedLM", older),
    "bert of a classifier": ("BertForSequenceClassification", "BertModel", str),
    "siglip text": ("SiglipTextModel", "SiglipTextModel", lambda name: f"text_model.{name}"),
    "siglip vision": ("SiglipVisionModel", "SiglipVisionModel", lambda name: f"vision_model.{name}"),
    "t5 without shared": (
        "T5EncoderModel",
        "T5EncoderModel",
        lambda name: name.replace("shared.weight", "encoder.embed_tokens.weight"),
    ),
    "t5": ("T5ForConditionalGeneration", "T5EncoderModel", str),
}


def stored(architecture: str, part: str, seed: int, folder: Path) -> None:
    if architecture in ENCODERS:
        return random_encoder(architecture, seed).save_pretrained(folder)
    config = random_encoder(part, seed).config
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).float().eval()
    widen(model)
    return model.save_pretrained(folder)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_encoders(name: str, seed: int, tmp_path: Path) -> None:
    """A checkpoint of the hub computes otherwise than there, or what is made of it is read otherwise."""
    whole, part, spell = CASES[name]
    stored(whole, part, seed, tmp_path / "plain")
    folder = spelled(tmp_path / "plain", spell)
    theirs = encoder_of(part, folder)
    same_state(theirs, encoder_of(part, tmp_path / "plain"))
    inputs = inputs_of(theirs.config, seed)
    model = from_pretrained(folder, family=part)
    arrays = {name: jnp.asarray(x, jnp.float32 if name == "pixels" else jnp.int32) for name, x in inputs.items()}
    with torch.no_grad():
        expected = their_outputs(theirs, inputs)
    for one, other in zip(jax.jit(lambda x: ours_outputs(model, x))(arrays), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-4, rtol=1e-5)
    made = convert(folder, tmp_path / "made", family=part)
    assert json.loads((made / "config.json").read_text())["architectures"] == [part]
    same_state(encoder_of(part, made), theirs)


@pytest.mark.parametrize("seed", range(2))
def test_gpt2(seed: int, tmp_path: Path) -> None:
    """The original files have no prefix, and masks among the tensors."""
    theirs = widened(random_config(seed, "gpt2"), seed)
    theirs.save_pretrained(tmp_path / "plain")
    masks = {"h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "h.0.attn.masked_bias": np.float32([-1e4])}
    folder = spelled(tmp_path / "plain", lambda name: name.removeprefix("transformer."), **masks)
    same_state(load_theirs(folder), theirs)
    tokens = np.random.default_rng(seed).integers(0, theirs.config.vocab_size, (1, 9))
    model, flat = from_pretrained(folder), jnp.asarray(tokens[0], jnp.int32)
    hidden, _, _ = model.hidden(flat, jnp.arange(9, dtype=jnp.int32), DenseMixer.of(flat[None]))
    with torch.no_grad():
        np.testing.assert_allclose(model.unembed(hidden), theirs(torch.from_numpy(tokens)).logits[0], atol=1e-4)
    same_state(load_theirs(convert(folder, tmp_path / "made")), theirs)
