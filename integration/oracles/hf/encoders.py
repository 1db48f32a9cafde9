"""Random encoders of transformers, their inputs, and what both sides make of them."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

__all__ = ["ENCODERS", "inputs_of", "named_arrays", "ours_outputs", "random_encoder", "their_outputs", "widen"]

BATCH = 2


def sizes(rng: random.Random) -> dict[str, Any]:
    heads = rng.choice([1, 2, 3])
    return {
        "hidden_size": heads * rng.choice([4, 6]),
        "intermediate_size": rng.randint(6, 30),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "layer_norm_eps": rng.choice([1e-12, 1e-6, 1e-2]),
        "hidden_act": rng.choice(["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]),
    }


def image(rng: random.Random) -> dict[str, Any]:
    patch = rng.choice([2, 3])
    return {"image_size": patch * rng.randint(1, 3) + rng.choice([0, 1]), "patch_size": patch, "num_channels": 3}


def bert(rng: random.Random) -> Any:
    return transformers.BertConfig(
        **sizes(rng), vocab_size=rng.randint(10, 60), max_position_embeddings=40, pad_token_id=None,
        type_vocab_size=rng.choice([1, 2, 3]),
    )  # fmt: skip


def vit(rng: random.Random) -> Any:
    more = {"pooler_output_size": rng.choice([None, 5]), "pooler_act": rng.choice(["tanh", "gelu"])}
    labels = {i: f"kind {i}" for i in range(rng.randint(1, 5))}
    return transformers.ViTConfig(**sizes(rng), **image(rng), **more, qkv_bias=rng.random() < 0.5, id2label=labels)


def siglip_text(rng: random.Random) -> Any:
    tokens = {"vocab_size": rng.randint(10, 60), "bos_token_id": 1, "eos_token_id": 2}
    return transformers.SiglipTextConfig(
        **sizes(rng), **tokens, max_position_embeddings=40, projection_size=rng.choice([None, 5])
    )


def siglip_vision(rng: random.Random) -> Any:
    return transformers.SiglipVisionConfig(**sizes(rng), **image(rng), vision_use_head=rng.random() < 0.6)


def siglip(rng: random.Random) -> Any:
    text, vision = siglip_text(rng), siglip_vision(rng)
    text.projection_size, vision.vision_use_head = vision.hidden_size, True
    return transformers.SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())


def t5(rng: random.Random) -> Any:
    return transformers.T5Config(
        vocab_size=rng.randint(10, 60), d_model=rng.randint(6, 20), d_kv=rng.choice([3, 4]), d_ff=rng.randint(6, 30),
        num_layers=rng.randint(1, 3), num_heads=rng.choice([1, 3]), pad_token_id=None,
        relative_attention_num_buckets=rng.choice([8, 12, 32]), relative_attention_max_distance=rng.choice([20, 128]),
        feed_forward_proj=rng.choice(["relu", "gelu", "gated-gelu", "gated-silu"]),
        layer_norm_epsilon=rng.choice([1e-6, 1e-2]),
    )  # fmt: skip


ENCODERS: dict[str, Callable[[random.Random], Any]] = {
    "BertForMaskedLM": bert,
    "BertModel": bert,
    "SiglipModel": siglip,
    "SiglipTextModel": siglip_text,
    "SiglipVisionModel": siglip_vision,
    "T5EncoderModel": t5,
    "ViTForImageClassification": vit,
    "ViTModel": vit,
}


def random_encoder(architecture: str, seed: int) -> Any:
    """Make a model whose outputs are wide, and whose biases and norms matter."""
    config = ENCODERS[architecture](random.Random(seed))
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").float().eval()
    widen(model)
    return model


def widen(model: Any) -> None:
    """Draw parameters that make outputs wide, and biases and norms that matter."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.3 if parameter.ndim < 2 else 0.5)


def inputs_of(config: Any, seed: int, time: int = 37) -> dict[str, np.ndarray]:
    """Draw tokens with padding behind them, and images, as far as the model takes them."""
    rng = np.random.default_rng(seed)
    vision, text = getattr(config, "vision_config", config), getattr(config, "text_config", config)
    found: dict[str, np.ndarray] = {}
    if hasattr(text, "vocab_size"):
        found["tokens"] = rng.integers(0, text.vocab_size, (BATCH, time))
        lengths = rng.integers(1, time + 1, BATCH)
        found["mask"] = (np.arange(time) < lengths[:, None]).astype(np.int32)
        found["types"] = rng.integers(0, getattr(text, "type_vocab_size", 1), (BATCH, time))
    if hasattr(vision, "image_size"):
        found["pixels"] = rng.normal(size=(BATCH, vision.image_size, vision.image_size, vision.num_channels)).astype(
            np.float32
        )
    return found


def their_outputs(model: Any, inputs: dict[str, np.ndarray]) -> list[Any]:
    """Return what transformers makes of them; what stands in padding is zero."""
    kind, given = type(model).__name__, {name: torch.from_numpy(value) for name, value in inputs.items()}
    more = {}
    if kind.startswith(("Bert", "T5")):
        more["attention_mask"] = given["mask"]
    if kind.startswith("Bert"):
        more["token_type_ids"] = given["types"]
    if "tokens" in given:
        more["input_ids"] = given["tokens"]
    if "pixels" in given:
        more["pixel_values"] = given["pixels"].permute(0, 3, 1, 2)
    out = model(**more)
    if kind == "SiglipModel":
        return [out.logits_per_text, out.text_embeds, out.image_embeds]
    whole = out.logits if hasattr(out, "logits") else out.last_hidden_state
    whole = whole * given["mask"][:, :, None] if "attention_mask" in more else whole
    return [x for x in (whole, getattr(out, "pooler_output", None)) if x is not None]


def ours_outputs(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Return what our model makes of them, in the same order."""
    kind = type(model).__name__
    if kind == "SiglipModel":
        tokens, pixels = inputs["tokens"], inputs["pixels"]
        return [model(tokens, pixels), model.embed_texts(tokens), model.embed_images(pixels)]
    options = {"segment_ids": inputs["mask"]} if kind.startswith(("Bert", "T5")) else {}
    options |= {"types": inputs["types"]} if kind.startswith("Bert") else {}
    whole = model(inputs["tokens"] if "tokens" in inputs else inputs["pixels"], **options)
    pools = hasattr(model, "pooled") and (hasattr(model, "pooler") or hasattr(model, "head"))
    first = whole * inputs["mask"][:, :, None].astype(whole.dtype) if options else whole
    return [first, model.pooled(whole)] if pools else [first]


def named_arrays(model: Any, folder: Any, of: Callable[[Any], Any]) -> Any:
    """Return an array for each parameter by the names that checkpoints have, which are not those in memory."""
    from dovetail_weights import open_directory

    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, _ in kept:
        parameter.data = of(parameter)
    model.save_pretrained(folder)
    for parameter, data in kept:
        parameter.data = data
    return open_directory(folder)
