"""Texts with images: golden checkpoints of transformers, places and rows of images, configurations, what is refused."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dovetail_kernels import DenseMixer, linear_cross_entropy
from dovetail_models import (
    Gemma3,
    Gemma3Config,
    Gemma3Multimodal,
    Gemma3MultimodalConfig,
    SiglipVisionConfig,
    Stack,
    config_from_hf,
    config_to_hf,
    convert,
    describe,
    from_pretrained,
    logical_axes,
    merge,
    placements,
    save_pretrained,
    split,
    weight_map,
)
from dovetail_models.commands import Describe
from dovetail_protocols import FullCache, LanguageModel, WindowCache, paths
from dovetail_protocols.testing import FakeQuantized, check_language_model
from dovetail_runtime import FSDP_TENSOR, batch_sharding, mesh, use
from dovetail_weights import open_directory, save

CASES: dict[str, Any] = tomllib.loads((Path(__file__).parent / "multimodal.toml").read_text())
NAMES = pytest.mark.parametrize("name", CASES)
TEXT = Gemma3Config(
    vocab_size=24, features=16, hidden=24, layers=2, heads=4, kv_heads=2, windows=(3, None), query_dim=5, init_std=0.5
)
SIZES = {"features": 8, "hidden": 16, "layers": 2, "heads": 2, "image_size": 4, "patch_size": 1, "init_std": 0.5}
VISION = SiglipVisionConfig(**SIZES, head=False)
IDS = {"tokens_per_image": 4, "image_token_id": 24, "begin_image_id": 3, "end_image_id": 4}
CONFIG = Gemma3MultimodalConfig(text=TEXT, vision=VISION, **IDS)
CONTRACTED = [
    "text/layers/*/{attention,mlp}/{query,key,value,out,up,gate,down}",
    "vision/layers/*/{attention,mlp}/{query,key,value,out,up,down}",
    "{vision/patches,projector}/weight",
    "text/{embedding,head}",
]


def hidden_of(model: Any, tokens: jax.Array, pixels: jax.Array, segment_ids: Any = None, positions: Any = None) -> Any:
    """The final hidden states of a [batch, time] batch with images."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    places = places if positions is None else positions
    embeds = model.embed(tokens.reshape(-1), model.embed_images(pixels))
    mixer = DenseMixer.of(tokens, segment_ids, together=model.together(tokens))
    hidden, aux, _ = model.hidden(tokens.reshape(-1), places.reshape(-1), mixer, embeds=embeds)
    assert not aux
    return hidden


def logits_of(model: Any, tokens: jax.Array, *rest: Any) -> Any:
    """The logits of a batch with images."""
    return model.unembed(hidden_of(model, tokens, *rest)).reshape(*tokens.shape, -1)


def loss_of(model: Any, tokens: jax.Array, targets: jax.Array, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summed cross-entropy of a batch with images, and the logits."""
    hidden = hidden_of(model, tokens, pixels)
    weight, bias, cap = model.unembedding()
    loss = linear_cross_entropy(hidden, weight, targets.reshape(-1), bias=bias, softcap=cap)
    return loss, model.unembed(hidden).reshape(*tokens.shape, -1)


def batch_of(rows: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Tokens with one image each, somewhere, and the images."""
    rng = np.random.default_rng(seed)
    words = rng.integers(5, TEXT.vocab_size, (rows, 6))
    tokens = [[*row[:at], *CONFIG.image, *row[at:]] for row, at in zip(words, rng.integers(0, 7, rows), strict=True)]
    pixels = rng.normal(size=(rows, *(VISION.image_size,) * 2, 3))
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(pixels, jnp.float32)


@pytest.fixture(scope="module")
def model() -> Gemma3Multimodal:
    return Gemma3Multimodal(CONFIG, rngs=nnx.Rngs(0))


@NAMES
def test_logits_and_gradients(name: str, golden: Path, tmp_path: Path) -> None:
    """A checkpoint trained elsewhere computes and trains differently here."""
    expected = np.load(golden / name / "expected.npz")
    tokens, targets, pixels = (jnp.asarray(expected[key]) for key in ("tokens", "targets", "pixels"))
    model = from_pretrained(golden / name)
    definition, params = split(model)

    @jax.jit
    def run(params: Any) -> Any:
        return jax.value_and_grad(lambda p: loss_of(merge(definition, p), tokens, targets, pixels), has_aux=True)(
            params
        )

    (loss, logits), gradients = run(params)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
    found = open_directory(save(tmp_path / "gradients", weight_map(model.config), gradients))
    theirs = {key.removeprefix("gradient "): expected[key] for key in expected.files if key.startswith("gradient ")}
    assert set(found) == {canonical(tensor) for tensor in theirs}
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for tensor, gradient in theirs.items():
        ours = found.read(canonical(tensor))
        scale = max(np.abs(gradient).max(), 1e-2 * largest)
        np.testing.assert_allclose(ours / scale, gradient / scale, atol=1e-4, err_msg=tensor)


def canonical(tensor: str) -> str:
    plain = tensor.startswith("vision_tower.") and not tensor.startswith("vision_tower.vision_model.")
    return tensor.replace("vision_tower.", "vision_tower.vision_model.") if plain else tensor


@NAMES
def test_there_and_back(name: str, golden: Path, tmp_path: Path) -> None:
    """No bit of a tensor changes, none is lost; names are those of the original checkpoints, whatever they were."""
    model = from_pretrained(golden / name)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=10_000)
    convert(golden / name, tmp_path / "converted")
    before, after, converted = (open_directory(x) for x in (golden / name, tmp_path / "out", tmp_path / "converted"))
    assert len(after.files) > 1
    assert {canonical(tensor) for tensor in before} == set(after) == set(converted)
    for tensor in before:
        assert before.read(tensor).tobytes() == after.read(canonical(tensor)).tobytes(), tensor
        assert before.read(tensor).tobytes() == converted.read(canonical(tensor)).tobytes(), tensor
    assert from_pretrained(tmp_path / "out").config == from_pretrained(tmp_path / "converted").config == model.config
    assert model.config == config_from_hf(config_to_hf(model.config, dtype="float32"))
    found = describe(model.config, time=8)
    assert found.parameters == sum(math.prod(tensor.shape) for tensor in before.values())
    assert found.forward.matmul_flops > 0
    assert not found.forward.uncounted
    vision = describe(model.config.vision, time=model.config.vision.max_position).forward.matmul_flops
    projector = 2 * model.config.tokens_per_image * model.config.vision.features * model.config.text.features
    assert found.image.matmul_flops == vision + projector


def test_golden_cases_are_what_they_are_for(golden: Path) -> None:
    """Cases of one kind leave the others untested."""
    models = [from_pretrained(golden / name) for name in CASES]
    first, second = (model.config for model in models)
    assert (first.tied, second.tied) == (True, False)
    assert first.image_token_id > first.text.vocab_size > second.image_token_id
    assert (first.tokens_per_image, second.tokens_per_image) == (9, 1)
    assert first.vision.image_size % first.vision.patch_size
    assert min(width for width in first.text.windows or () if width) < first.tokens_per_image
    names = [set(open_directory(golden / name)) for name in CASES]
    assert any("vision_tower.embeddings" in tensor for tensor in names[0])
    assert any("vision_tower.vision_model.embeddings" in tensor for tensor in names[1])
    tokens = np.load(golden / "gemma3_images" / "expected.npz")["tokens"]
    together = np.asarray(models[0].together(jnp.asarray(tokens)))
    assert together.shape[0] == 2
    assert [sorted(set(row.tolist())) for row in together] == [[0, 1, 2], [0, 1, 2, 3]]


def test_conformance(model: Any) -> None:
    """Texts alone are what every user of models relies on, with plain and with quantized weights."""
    definition, params = split(model)
    chosen = paths.select(
        params, ["text/embedding", "text/layers/*/{attention,mlp}/{query,key,value,out,up,gate,down}"]
    )
    leaves = paths.flatten(params)
    assert isinstance(model, LanguageModel)
    assert model.cache_specs() == (WindowCache(2, 4, 4, 3), FullCache(2, 4, 4))
    check_language_model(
        model,
        make_mixer=lambda segments: DenseMixer.of(segments, segments),
        rebuild=lambda transform: merge(definition, paths.update(params, {a: transform(leaves[a]) for a in chosen})),
    )


def test_quantized_weights(model: Any) -> None:
    """Every contraction and lookup goes through the seam: quantized weights give what their dequantized ones give."""
    definition, params = split(model)
    fake = FakeQuantized.of(params, [a for a in paths.flatten(params) if paths.matches(a, CONTRACTED)])
    tokens, pixels = batch_of(2)
    got, plain = (
        jax.jit(lambda p: logits_of(merge(definition, p), tokens, pixels))(p) for p in (fake.quantized, fake.dense)
    )
    np.testing.assert_allclose(got, plain, atol=1e-4)
    axes = jax.tree.leaves(logical_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(x) for x in axes] == [leaf.ndim for leaf in jax.tree.leaves(params)]


def test_text_alone_is_the_text_model(model: Any) -> None:
    """Without images it is a Gemma 3; an image's place that nobody filled is NaN, not some word."""
    tokens, positions = jnp.arange(5, 12, dtype=jnp.int32), jnp.arange(7, dtype=jnp.int32)
    mixer = DenseMixer.of(tokens[None])
    got, plain = (one.hidden(tokens, positions, mixer)[0] for one in (model, model.text))
    np.testing.assert_array_equal(got, plain)
    embeds = model.embed(tokens, jnp.zeros((0, 4, 16)))
    np.testing.assert_array_equal(model.hidden(tokens, positions, mixer, embeds=embeds)[0], plain)
    np.testing.assert_array_equal(model.unembed(got), model.text.unembed(got))
    hidden, _, _ = model.hidden(tokens.at[6].set(24), positions, mixer)
    assert np.isnan(hidden[6]).all()


def test_runs_of_images(model: Any) -> None:
    """Two images apart are two runs, one right after the other make one, and rows count for themselves."""
    x = 24
    tokens = jnp.asarray([[x, x, 1, x, x, x, 2, x], [1, x, 1, 1, 1, 1, 1, 1], [1] * 8, [x] * 8], jnp.int32)
    expected = [[1, 1, 0, 2, 2, 2, 0, 3], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8, [1] * 8]
    np.testing.assert_array_equal(model.together(tokens), expected)


def test_rows_of_images_stand_at_their_places(model: Any) -> None:
    """Images in another order, or words that are not scaled, give other replies."""
    tokens, pixels = batch_of(3)
    images = model.embed_images(pixels)
    embeds = model.embed(tokens.reshape(-1), images).reshape(*tokens.shape, -1)
    place = np.asarray(tokens) == 24
    np.testing.assert_array_equal(np.asarray(embeds)[place], images.reshape(12, -1))
    words = 4 * np.asarray(model.text.embedding.get_value())[np.asarray(tokens)[~place]]
    np.testing.assert_allclose(np.asarray(embeds)[~place], words, rtol=1e-6)


def test_pooling_by_hand(model: Any) -> None:
    """Squares of two by two patches are averaged, in rows from the top left."""
    patches = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 8)), jnp.float32)
    grid = np.asarray(patches, np.float64).reshape(2, 4, 4, 8)
    means = np.stack([grid[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)], 1)
    normed = means / np.sqrt((means**2).mean(-1, keepdims=True) + VISION.norm_eps)
    weight = np.asarray(model.projector.weight.get_value(), np.float64)
    scaled = normed * (1 + np.asarray(model.projector.norm.weight.get_value()))
    np.testing.assert_allclose(model.projector(patches), scaled @ weight, atol=1e-4)


@pytest.mark.usefixtures("untyped")
def test_counts_of_places_and_rows(model: Any) -> None:
    """More or fewer places than rows are an error; in a compiled program everything is NaN, never a guess."""
    tokens, pixels = batch_of(2)
    images = model.embed_images(pixels)
    for flat in (tokens.reshape(-1)[1:], tokens.reshape(-1).at[5].set(24), tokens[0], jnp.arange(5, dtype=jnp.int32)):
        have = int(jnp.sum(flat == 24))
        if have != 8:
            with pytest.raises(
                ValueError, match=rf"{have} places of images \(token 24\), 2 images with 4 each; expected 8"
            ):
                model.embed(flat, images)
        assert np.isnan(jax.jit(model.embed)(flat, images)).all() == (have != 8)
    with pytest.raises(ValueError, match="4 places of images"):
        model.embed(tokens[0], images[:0])
    with pytest.raises(ValueError, match=r"images have shape \(2, 4, 15\); expected \[images, 4, 16\]"):
        model.embed(tokens.reshape(-1), images[:, :, 1:])
    with pytest.raises(ValueError, match=r"images have shape \(4, 2, 16\); expected \[images, 4, 16\]"):
        model.embed(tokens.reshape(-1), images.reshape(4, 2, 16))
    with pytest.raises(ValueError, match=r"images of shape \(4, 5, 3\); expected .* \(4, 1, 3\)"):
        model.embed_images(jnp.zeros((1, 4, 5, 3)))


def test_a_prompt_in_a_packed_row(model: Any) -> None:
    """Neither padding nor another document changes what is made of a text with an image."""
    tokens, pixels = batch_of(2)
    alone = jax.jit(lambda *x: logits_of(model, *x))(tokens, pixels)
    pad = jnp.zeros(3, jnp.int32)
    row = jnp.concatenate([tokens[0], tokens[1], pad])[None]
    segments = jnp.repeat(jnp.array([1, 2, 0]), jnp.array([12, 12, 3]), total_repeat_length=27)[None]
    places = jnp.concatenate([jnp.arange(12), jnp.arange(12), pad]).astype(jnp.int32)[None]
    packed = jax.jit(lambda *x: logits_of(model, *x))(row, pixels, segments, places)
    np.testing.assert_allclose(packed[0, :24].reshape(alone.shape), alone, atol=1e-4)


def test_looped_layers(tmp_path: Path) -> None:
    """A switch that is meant to save compilation or memory changes the numbers, or what is stored."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, layers=4, windows=(3, None) * 2))
    looped = Gemma3Multimodal(config, rngs=nnx.Rngs(0), scan=True, remat="full")
    save_pretrained(looped, tmp_path / "model")
    plain, again = (from_pretrained(tmp_path / "model", scan=scan) for scan in (False, True))
    assert isinstance(again.text.layers, Stack)
    jax.tree.map(np.testing.assert_array_equal, split(again)[1], split(looped)[1])
    tokens, pixels = batch_of(2)

    def gradients(model: Any) -> Any:
        definition, params = split(model)
        run = jax.jit(jax.grad(lambda p: loss_of(merge(definition, p), tokens, tokens % 24, pixels)[0]))
        return open_directory(save(tmp_path / str(id(model)), weight_map(config), run(params)))

    mine, theirs = gradients(looped), gradients(plain)
    assert set(mine) == set(theirs) == set(open_directory(tmp_path / "model"))
    largest = max(np.abs(theirs.read(tensor)).max() for tensor in theirs)
    for tensor in mine:
        scale = max(np.abs(theirs.read(tensor)).max(), 1e-2 * largest)
        np.testing.assert_allclose(mine.read(tensor) / scale, theirs.read(tensor) / scale, atol=1e-4, err_msg=tensor)


def test_on_a_mesh() -> None:
    """Data, FSDP and tensor parallelism at once leave loss and gradients as they are."""
    text, vision = dataclasses.replace(TEXT, layers=1, windows=None), dataclasses.replace(VISION, layers=1)
    config = dataclasses.replace(CONFIG, text=text, vision=vision)
    build = lambda: Gemma3Multimodal(config, rngs=nnx.Rngs(0))  # noqa: E731
    definition, params = split(build())
    tokens, pixels = batch_of(8)
    run = jax.jit(jax.value_and_grad(lambda p, t, x: loss_of(merge(definition, p), t, t % 24, x)[0] / t.size))
    loss, gradients = run(params, tokens, pixels)
    grid = mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, placements(nnx.eval_shape(build), grid, FSDP_TENSOR))
    with use(grid, FSDP_TENSOR):
        got = run(placed, *(jax.device_put(x, batch_sharding(grid, FSDP_TENSOR)) for x in (tokens, pixels)))
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(1, largest)), got[1], gradients)


def test_half_precision() -> None:
    """Activations and parameters have the dtypes asked for, logits are float32."""
    model = Gemma3Multimodal(CONFIG, rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.bfloat16)
    tokens, pixels = batch_of(1)
    assert model.embed_images(pixels).dtype == model.dtype == jnp.bfloat16
    assert model.embed(tokens[0], model.embed_images(pixels)).dtype == jnp.bfloat16
    assert logits_of(model, tokens, pixels).dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(split(model)[1])} == {jnp.dtype("float32")}


def test_commands(golden: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory is described with the parts of all three."""
    Describe(str(golden / "gemma3_images"), time=8).run()
    out = capsys.readouterr().out
    assert "Gemma3MultimodalConfig" in out
    for group in ("text/layers/*/attention ", "vision/layers/*/mlp ", "projector ", "an image: "):
        assert group in out


def test_a_text_model_out_of_one(model: Any, tmp_path: Path) -> None:
    """The decoder alone is a Gemma 3 that is stored as one."""
    save_pretrained(model.text, tmp_path / "text")
    assert json.loads((tmp_path / "text/config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    assert isinstance(from_pretrained(tmp_path / "text"), Gemma3)
