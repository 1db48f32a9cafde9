"""Random models for texts with images against transformers: logits, all gradients, export, replies to images."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from encoders import named_arrays
from multimodal import Batch, load_theirs, ours, random_multimodal, theirs_loss

from dovetail_kernels import DenseMixer
from dovetail_models import from_pretrained, merge, save_pretrained, split, weight_map
from dovetail_models.hf_gemma3 import MADE
from dovetail_weights import open_directory, save, write_directory

REPLY, MARGIN = 12, 1e-3


@pytest.mark.parametrize("seed", range(10))
def test_random_configurations(seed: int, tmp_path: Path) -> None:
    """A checkpoint computes and trains here as it does there, and goes back unchanged."""
    random_multimodal(seed).save_pretrained(tmp_path / "theirs")
    theirs = load_theirs(tmp_path / "theirs")
    model = from_pretrained(tmp_path / "theirs")
    batch = Batch(theirs.config, seed)

    logits, loss = theirs_loss(theirs, batch)
    loss.backward()
    got, value, gradients = ours(model, batch)
    np.testing.assert_allclose(got, logits.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)

    save(tmp_path / "gradients", weight_map(model.config).spelled(MADE), gradients)
    found = open_directory(tmp_path / "gradients")
    expected = named_arrays(theirs, tmp_path / "expected", lambda p: torch.zeros_like(p) if p.grad is None else p.grad)
    assert set(found) == set(expected)
    largest = max(np.abs(expected.read(name)).max() for name in expected)
    for name in expected:
        gradient = expected.read(name)
        scale = max(np.abs(gradient).max(), 1e-2 * largest)
        np.testing.assert_allclose(found.read(name) / scale, gradient / scale, atol=1e-4, err_msg=name)

    save_pretrained(model, tmp_path / "ours", token_ids={"eos_token_id": 2}, max_shard_bytes=20_000)
    again = load_theirs(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(**batch.theirs()).logits, logits.detach())


def test_images_matter(tmp_path: Path) -> None:
    """The comparison would not notice models that see neither the images nor each place of them."""
    random_multimodal(3).save_pretrained(tmp_path / "theirs")
    theirs, model = load_theirs(tmp_path / "theirs"), from_pretrained(tmp_path / "theirs")
    batch = Batch(theirs.config, 3)
    given = batch.theirs()
    with torch.no_grad():
        logits = theirs(**given).logits.numpy()
        del given["token_type_ids"]
        one_way = theirs(**given).logits.numpy()
    assert np.abs(one_way - logits).max() > 1e-2
    batch.pixels = batch.pixels[::-1].copy()
    assert np.abs(ours(model, batch)[0] - logits).max() > 1e-2


def greedy(model: Any, tokens: list[int], pixels: np.ndarray, length: int) -> tuple[list[int], list[float]]:
    """Return the tokens that our full forward chooses one after the other, and by how much each is the best."""
    definition, params = split(model)
    size = len(tokens) + length

    @jax.jit
    def run(params: Any, row: jax.Array) -> jax.Array:
        model = merge(definition, params)
        rows = row[None]
        embeds = model.embed(row, model.embed_images(jnp.asarray(pixels)))
        mixer = DenseMixer.of(rows, together=model.together(rows))
        hidden, _, _ = model.hidden(row, jnp.arange(size, dtype=jnp.int32), mixer, embeds=embeds)
        return model.unembed(hidden)

    margins = []
    for _ in range(length):
        row = jnp.asarray(np.pad(tokens, (0, size - len(tokens))), jnp.int32)
        best = jax.lax.top_k(run(params, row)[len(tokens) - 1], 2)
        margins.append(float(best[0][0] - best[0][1]))
        tokens = [*tokens, int(best[1][0])]
    return tokens[-length:], margins


@pytest.mark.parametrize("seed", [0, 2, 3, 5, 7, 8])
def test_replies_to_images(seed: int, tmp_path: Path) -> None:
    """What transformers generates after a prompt with images, with its caches, is what the full forward chooses."""
    theirs = random_multimodal(seed)
    while theirs.config.text_config.sliding_window < 2:  # its cache is wrong for windows of 1
        theirs.config.text_config.sliding_window = 6
    theirs.config.image_token_index = theirs.config.text_config.vocab_size + 3  # a reply must not hold it
    theirs.save_pretrained(tmp_path)
    theirs, model = load_theirs(tmp_path), from_pretrained(tmp_path)
    batch = Batch(theirs.config, seed)
    images = int((batch.tokens[0] == batch.image).sum()) // theirs.config.mm_tokens_per_image
    given = batch.theirs()
    given = {"input_ids": given["input_ids"][:1], "pixel_values": given["pixel_values"][:images]} | {
        "token_type_ids": given["token_type_ids"][:1]
    }
    theirs.generation_config.eos_token_id = None
    mask = torch.ones_like(given["input_ids"])
    out = theirs.generate(**given, attention_mask=mask, do_sample=False, max_new_tokens=REPLY, pad_token_id=0)
    expected = out[0, batch.tokens.shape[1] :].tolist()
    got, margins = greedy(model, batch.tokens[0].tolist(), batch.pixels[:images], REPLY)
    close = next((i for i, margin in enumerate(margins) if margin < MARGIN), REPLY)
    assert close >= 0.9 * REPLY
    assert got[:close] == expected[:close]


def test_names_of_the_hub(tmp_path: Path) -> None:
    """The names of original checkpoints are those that are read and written, and stay so when transformers writes."""
    random_multimodal(0).save_pretrained(tmp_path / "theirs")
    ours = save_pretrained(from_pretrained(tmp_path / "theirs"), tmp_path / "ours")
    load_theirs(ours).save_pretrained(tmp_path / "again")
    before, after = open_directory(ours), open_directory(tmp_path / "again")
    assert set(before) == set(after)
    for name in (
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.mm_input_projection_weight",
    ):
        assert np.array_equal(before.read(name), after.read(name))
    theirs = load_theirs(ours)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert "model.language_model.norm.weight" in tensors
    files = {"config.json": (ours / "config.json").read_text()}
    in_memory = from_pretrained(write_directory(tmp_path / "memory", tensors, extra_files=files))
    jax.tree.map(np.testing.assert_array_equal, split(in_memory)[1], split(from_pretrained(ours))[1])
