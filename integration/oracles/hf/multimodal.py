"""Random models of transformers for texts with images, their inputs, and what both sides make of them."""

import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from families import FAMILIES, in_memory

from dovetail_kernels import DenseMixer, linear_cross_entropy
from dovetail_models import merge, split

__all__ = ["Batch", "load_theirs", "ours", "random_multimodal", "theirs_loss", "widen"]

PATTERNS = (
    "aiaabiia",  # an image, two that stand together, and more text
    "iaaaiabi",
)
"""Rows: ``i`` is an image, the letters are runs of text."""


def random_multimodal(seed: int) -> Any:
    """Make a Gemma 3 with images whose logits and their margins are wide."""
    rng = random.Random(seed)
    text = FAMILIES["gemma3"](rng).to_dict()
    text["final_logit_softcapping"] = None  # transformers has none in this model
    heads, side, patch = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 2])
    vision = {
        "hidden_size": heads * rng.choice([4, 6]),
        "intermediate_size": rng.randint(6, 30),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "layer_norm_eps": rng.choice([1e-6, 1e-2]),
        "num_channels": rng.choice([1, 3]),
        "patch_size": patch,
        "image_size": patch * side * rng.choice([1, 2, 3]) + rng.choice([0, patch - 1]),
        "vision_use_head": False,
    }
    vocab = text["vocab_size"]
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=side**2,
        image_token_index=rng.choice([vocab + 3, vocab - 1]),
        boi_token_index=vocab - 3,
        eoi_token_index=vocab - 2,
        tie_word_embeddings=rng.random() < 0.6,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = model.float().eval()
    widen(model)
    return model


def widen(model: Any) -> None:
    """Draw parameters that make logits and their margins wide, and biases and norms that matter."""
    for name, parameter in model.named_parameters():
        vision = "vision_tower" in name
        with torch.no_grad():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5 - (not vision), 1.5 - (not vision))  # the others are stored less 1
            elif parameter.ndim == 1:
                parameter.normal_(std=0.3)
            elif vision:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.0 if "embed" in name else 1.3 * parameter.shape[1] ** -0.5)


def load_theirs(folder: Path) -> Any:
    kind = transformers.Gemma3ForConditionalGeneration
    return in_memory(kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval())


class Batch:
    """Two rows of text with images, and targets.

    Attributes:
        tokens: ``[rows, time]``.
        targets: likewise.
        pixels: ``[images, height, width, channels]``.
    """

    def __init__(self, config: Any, seed: int, *, text: int = 3) -> None:
        rng = np.random.default_rng(seed)
        places, image, vision = config.mm_tokens_per_image, config.image_token_index, config.vision_config
        words = [token for token in range(config.text_config.vocab_size) if token != image]

        def row(pattern: str) -> list[int]:
            parts = ([image] * places if part == "i" else rng.choice(words, text) for part in pattern)
            return [int(token) for part in parts for token in part]

        self.tokens = np.array([row(pattern) for pattern in PATTERNS])
        self.targets = rng.integers(0, config.text_config.vocab_size, self.tokens.shape)
        shape = (sum(pattern.count("i") for pattern in PATTERNS), *(vision.image_size,) * 2, vision.num_channels)
        self.pixels = rng.normal(size=shape).astype(np.float32)
        self.image = image

    def theirs(self) -> dict[str, Any]:
        """Return the arguments of transformers' forward."""
        tokens = torch.from_numpy(self.tokens)
        return {
            "input_ids": tokens,
            "pixel_values": torch.from_numpy(self.pixels).permute(0, 3, 1, 2),
            "token_type_ids": (tokens == self.image).long(),
        }


def theirs_loss(model: Any, batch: Batch) -> tuple[Any, Any]:
    """Return transformers' logits and the summed cross-entropy."""
    logits = model(**batch.theirs()).logits
    targets = torch.from_numpy(batch.targets)
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def ours(model: Any, batch: Batch) -> tuple[jax.Array, jax.Array, Any]:
    """Return our logits, the summed cross-entropy, and its gradients."""
    definition, params = split(model)
    tokens, targets = (jnp.asarray(x, jnp.int32) for x in (batch.tokens, batch.targets))

    @jax.jit
    def run(params: Any, pixels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            model = merge(definition, params)
            flat = tokens.reshape(-1)
            positions = jnp.tile(jnp.arange(tokens.shape[1], dtype=jnp.int32), len(tokens))
            mixer = DenseMixer.of(tokens, together=model.together(tokens))
            embeds = model.embed(flat, model.embed_images(pixels))
            hidden, _, _ = model.hidden(flat, positions, mixer, embeds=embeds)
            weight, bias, cap = model.unembedding()
            total = linear_cross_entropy(hidden, weight, targets.reshape(-1), bias=bias, softcap=cap)
            return total, model.unembed(hidden).reshape(*tokens.shape, -1)

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits, value, gradients

    return run(params, jnp.asarray(batch.pixels))
