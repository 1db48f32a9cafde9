"""Encoders: golden checkpoints of transformers, quantized weights, configurations, and what is refused."""

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

from dovetail_models import (
    FAMILIES,
    BertConfig,
    BertForMaskedLM,
    BertMaskedLMConfig,
    BertModel,
    ConfigError,
    SiglipConfig,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5EncoderConfig,
    T5EncoderModel,
    ViTClassifierConfig,
    ViTConfig,
    ViTModel,
    config_from_hf,
    config_to_hf,
    describe,
    from_pretrained,
    logical_axes,
    merge,
    save_pretrained,
    split,
    weight_map,
)
from dovetail_models.encoder import Bidirectional
from dovetail_models.t5_encoder import relative_buckets
from dovetail_protocols import paths
from dovetail_protocols.testing import FakeQuantized
from dovetail_weights import WeightsError, open_directory, save

CASES: dict[str, Any] = tomllib.loads((Path(__file__).parent / "encoders.toml").read_text())
NAMES = pytest.mark.parametrize("name", CASES)
SIZES = {"features": 8, "hidden": 12, "layers": 2, "heads": 2}
CONTRACTED = [
    "**/{query,key,value,out,up,gate,down}",
    "**/{patches,pooler,classifier,transform}/weight",
    "head/weight",
    "{text/,}embedding",
    "**/embeddings/{tokens,positions,types}",
    "distances",
]


def outputs(model: Any, inputs: dict[str, Any]) -> list[jax.Array]:
    """What the golden outputs are, in their order."""
    kind = type(model).__name__
    if kind == "SiglipModel":
        tokens, pixels = inputs["tokens"], inputs["pixels"]
        return [model(tokens, pixels), model.embed_texts(tokens), model.embed_images(pixels)]
    options = {"segment_ids": inputs["mask"]} if kind.startswith(("Bert", "T5")) else {}
    options |= {"types": inputs["types"]} if kind.startswith("Bert") else {}
    whole = model(inputs["tokens"] if "tokens" in inputs else inputs["pixels"], **options)
    first = jnp.where(inputs["mask"][:, :, None] > 0, whole, 0) if options else whole
    return [first, model.pooled(whole)] if hasattr(model, "pooler") or hasattr(model, "head") else [first]


def parts(expected: Any, kind: str) -> dict[str, Any]:
    return {name.split(" ", 1)[1]: expected[name] for name in expected.files if name.startswith(f"{kind} ")}


def inputs_of(expected: Any) -> dict[str, jax.Array]:
    found = parts(expected, "input")
    return {name: jnp.asarray(x, jnp.float32 if name == "pixels" else jnp.int32) for name, x in found.items()}


@NAMES
def test_outputs_and_gradients(name: str, golden: Path, tmp_path: Path) -> None:
    """A checkpoint trained elsewhere computes and trains differently here."""
    expected = np.load(golden / name / "expected.npz")
    inputs, weights = inputs_of(expected), list(parts(expected, "weight").values())
    model = from_pretrained(golden / name)
    definition, params = split(model)

    @jax.jit
    def run(params: Any) -> Any:
        def loss(params: Any) -> Any:
            got = outputs(merge(definition, params), inputs)
            return sum(jnp.sum(out * w) for out, w in zip(got, weights, strict=True)), got

        return jax.grad(loss, has_aux=True)(params)

    gradients, got = run(params)
    for ours, theirs in zip(got, parts(expected, "output").values(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)
    found = open_directory(save(tmp_path / "gradients", weight_map(model.config), gradients))
    theirs = parts(expected, "gradient")
    assert set(found) == set(theirs)
    largest = max(np.abs(gradient).max() for gradient in theirs.values())
    for tensor, gradient in theirs.items():
        scale = max(np.abs(gradient).max(), 1e-2 * largest)
        np.testing.assert_allclose(found.read(tensor) / scale, gradient / scale, atol=1e-4, err_msg=tensor)


@NAMES
def test_there_and_back(name: str, golden: Path, tmp_path: Path) -> None:
    """No bit of a tensor changes, none is lost or renamed; the description counts each once."""
    model = from_pretrained(golden / name)
    save_pretrained(model, tmp_path / "out", max_shard_bytes=3000)
    before, after = open_directory(golden / name), open_directory(tmp_path / "out")
    assert set(after) == set(before)
    for tensor in before:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    assert from_pretrained(tmp_path / "out").config == model.config
    found = describe(model.config)
    assert found.parameters == sum(math.prod(tensor.shape) for tensor in before.values())
    assert found.forward.matmul_flops > 0
    assert (found.cache_bytes_per_token, found.cache_bytes_at_most) == (0, 0)


def test_every_architecture_of_a_module_has_a_case() -> None:
    """One that has none is not compared with transformers."""
    modules = {FAMILIES[case["architecture"]].partition(":")[0] for case in CASES.values()}
    places = {place for place in FAMILIES.values() if place.partition(":")[0] in modules}
    assert {FAMILIES[case["architecture"]] for case in CASES.values()} == places


@pytest.mark.thin(2)
@NAMES
def test_quantized_weights(name: str, golden: Path) -> None:
    """Every contraction and lookup goes through the seam: quantized weights give what their dequantized ones give."""
    model = from_pretrained(golden / name)
    inputs = inputs_of(np.load(golden / name / "expected.npz"))
    definition, params = split(model)
    chosen = [a for a in paths.flatten(params) if paths.matches(a, CONTRACTED)]
    fake = FakeQuantized.of(params, chosen)
    got, plain = (outputs(merge(definition, p), inputs) for p in (fake.quantized, fake.dense))
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    for axes, leaf in zip(jax.tree.leaves(logical_axes(model), is_leaf=lambda x: isinstance(x, tuple)),
                          jax.tree.leaves(params), strict=True):  # fmt: skip
        assert len(axes) == leaf.ndim


def test_padding_and_segments() -> None:
    """Neither padding nor another segment changes what a token becomes."""
    config = BertConfig(**SIZES, vocab_size=20, max_position=16, init_std=0.5)
    model = BertModel(config, rngs=nnx.Rngs(0))
    first, second, rest = np.split(np.random.default_rng(0).integers(0, 20, 18).astype(np.int32), [4, 7])
    rows = [np.concatenate([first, second, rest[:2]]), np.append(first, rest[:5]), np.append(second, rest[5:11])]
    segments = [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 4 + [0] * 5, [1] * 3 + [0] * 6]
    positions = [[0, 1, 2, 3, 0, 1, 2, 0, 0], range(9), range(9)]
    packed, one, two = jax.jit(lambda *x: model(x[0], segment_ids=x[1], positions=x[2]))(
        *(jnp.asarray(x, jnp.int32) for x in (np.stack(rows), segments, [list(x) for x in positions]))
    )
    np.testing.assert_allclose(packed[:4], one[:4], atol=1e-5)
    np.testing.assert_allclose(packed[4:7], two[:3], atol=1e-5)


def test_losses_in_chunks() -> None:
    """The unembedding and the states before it make the logits."""
    model = BertForMaskedLM(BertMaskedLMConfig(**SIZES, vocab_size=20, init_std=0.5), rngs=nnx.Rngs(0))
    tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    weight, bias, _ = model.unembedding()
    np.testing.assert_allclose(model.hidden(tokens) @ weight + bias, model(tokens), atol=1e-5)


def test_half_precision() -> None:
    """Activations and parameters have the dtypes asked for, logits are float32."""
    model = BertForMaskedLM(
        BertMaskedLMConfig(**SIZES, vocab_size=20), rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.bfloat16
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    assert model.hidden(tokens).dtype == jnp.bfloat16
    assert model(tokens).dtype == jnp.float32


def test_relative_buckets() -> None:
    """T5's buckets by hand: one per distance up to 2, then two for larger ones, and the other half for later keys."""
    got = relative_buckets(jnp.array([0, -1, -2, -3, -9, -99, 1, 3, 99]), 8, 10)
    np.testing.assert_array_equal(got, [0, 1, 2, 2, 3, 3, 5, 6, 7])


def test_refused_calls(untyped: None) -> None:
    """Rows that are too long, images of another size, masks of another shape."""
    bert = BertModel(BertConfig(**SIZES, vocab_size=20, max_position=4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rows of 5 tokens; the model has positions for 4"):
        bert(jnp.zeros((1, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"segment_ids have shape \(1, 2\); expected \(1, 4\)"):
        bert(jnp.zeros((1, 4), jnp.int32), segment_ids=jnp.zeros((1, 2), jnp.int32))
    text = SiglipTextModel(SiglipTextConfig(**SIZES, vocab_size=20, max_position=4), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rows of 5 tokens"):
        text(jnp.zeros((1, 5), jnp.int32))
    for model in (
        ViTModel(ViTConfig(**SIZES, image_size=6, patch_size=3), rngs=nnx.Rngs(0)),
        SiglipVisionModel(SiglipVisionConfig(**SIZES, image_size=6, patch_size=3), rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(ValueError, match=r"images of shape \(6, 5, 3\)"):
            model(jnp.zeros((1, 6, 5, 3)))
        with pytest.raises(ValueError, match="time=3; an image makes a row of"):
            describe(model, time=3)
    mixer, x = Bidirectional(None, None, 1, 2), jnp.zeros((2, 1, 4))
    with pytest.raises(ValueError, match="window=3"):
        mixer.attend(0, x, x, x, scale=1.0, window=3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BertConfig(**SIZES | {"heads": 3}, vocab_size=9), "features=8 is no multiple of heads=3"),
        (lambda: BertConfig(**SIZES | {"layers": 0}, vocab_size=9), "layers=0"),
        (lambda: BertConfig(**SIZES, vocab_size=9, types=0), "types=0"),
        (lambda: BertConfig(**SIZES, vocab_size=9, norm_eps=-1.0), "norm_eps=-1.0"),
        (lambda: BertConfig(**SIZES, vocab_size=9, activation="swish"), "activation='swish'"),
        (lambda: ViTConfig(**SIZES, patch_size=0), "patch_size=0"),
        (lambda: ViTConfig(**SIZES, image_size=3), "image_size=3 is below patch_size=16"),
        (lambda: ViTConfig(**SIZES, pooled=0), "pooled=0"),
        (lambda: ViTConfig(**SIZES, pooler_activation="x"), "pooler_activation='x'"),
        (lambda: ViTClassifierConfig(**SIZES, labels=()), "labels"),
        (lambda: SiglipTextConfig(**SIZES, vocab_size=0), "vocab_size=0"),
        (lambda: SiglipTextConfig(**SIZES, vocab_size=9, projection=0), "projection=0"),
        (
            lambda: SiglipConfig(
                text=SiglipTextConfig(**SIZES, vocab_size=9, projection=3), vision=SiglipVisionConfig(**SIZES)
            ),
            "text.projection=3; expected vision.features=8",
        ),
        (
            lambda: SiglipConfig(
                text=SiglipTextConfig(**SIZES, vocab_size=9), vision=SiglipVisionConfig(**SIZES, head=False)
            ),
            "vision.head=False",
        ),
        (lambda: T5EncoderConfig(**SIZES, vocab_size=9, head_dim=0), "head_dim=0"),
        (lambda: T5EncoderConfig(**SIZES, vocab_size=9, buckets=7), "buckets=7"),
        (lambda: T5EncoderConfig(**SIZES, vocab_size=9, max_distance=8), "max_distance=8"),
        (lambda: T5EncoderConfig(**SIZES, vocab_size=9, gated=True, activation="tanh"), "activation='tanh'"),
    ],
)
def test_refused_configurations(build: Any, message: str, untyped: None) -> None:
    """A size that makes no model is named at once."""
    with pytest.raises(ValueError, match=message):
        build()


BASE = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
T5_BASE = {"vocab_size": 9, "d_model": 8, "d_ff": 12, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("architecture", "values", "expected"),
    [
        ("BertModel", {"vocab_size": 9}, {"max_position": 512, "types": 2, "activation": "gelu", "norm_eps": 1e-12}),
        ("BertForMaskedLM", {"vocab_size": 9, "tie_word_embeddings": None}, {"init_std": 0.02}),
        ("ViTModel", {}, {"image_size": 224, "patch_size": 16, "channels": 3, "qkv_bias": True, "pooled": None}),
        ("ViTForImageClassification", {}, {"labels": ("LABEL_0", "LABEL_1"), "pooler_activation": "tanh"}),
        ("ViTForImageClassification", {"num_labels": 1}, {"labels": ("LABEL_0",)}),
        ("SiglipTextModel", {"vocab_size": 9}, {"max_position": 64, "projection": None, "activation": "gelu_tanh"}),
        ("SiglipVisionModel", {}, {"head": True, "norm_eps": 1e-6, "patch_size": 16}),
    ],
)
def test_what_is_absent_is_as_in_transformers(architecture: str, values: Any, expected: Any) -> None:
    """A default that differs from theirs changes the numbers of a checkpoint that does not write it."""
    got = config_from_hf({"architectures": [architecture], **BASE, **values})
    assert {name: getattr(got, name) for name in expected} == expected


def test_other_absent_fields() -> None:
    """The encoder of T5 has other names; the original SigLIPs write what is not as in the base model alone."""
    t5 = config_from_hf({"architectures": ["T5EncoderModel"], **T5_BASE})
    assert (t5.head_dim, t5.buckets, t5.max_distance, t5.activation, t5.gated) == (64, 32, 128, "relu", False)
    both = config_from_hf({"model_type": "siglip", "text_config": {}, "vision_config": {"patch_size": 14}})
    assert (both.text.features, both.text.vocab_size, both.vision.patch_size, both.layers) == (768, 32000, 14, 24)
    assert config_from_hf({"model_type": "bert", "vocab_size": 9, **BASE}) == BertConfig(**SIZES, vocab_size=9)


@pytest.mark.parametrize("projection", ["relu", "gelu_new", "gated-gelu", "gated-silu", "gated-relu"])
def test_activations_of_t5(projection: str) -> None:
    """What is written is what was read, under the name that transformers takes."""
    config = config_from_hf({"architectures": ["T5EncoderModel"], **T5_BASE, "feed_forward_proj": projection})
    written = config_to_hf(config, dtype="float32")
    assert written["feed_forward_proj"] == projection
    assert config_from_hf(written) == config


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("BertModel", {"vocab_size": 9, "hidden_act": "mish"}, "hidden_act='mish'; supported are gelu"),
        ("BertModel", {"vocab_size": 9, "is_decoder": True}, "is_decoder=True; only False"),
        ("BertModel", {"vocab_size": 9, "position_embedding_type": "relative_key"}, "only 'absolute'"),
        ("BertModel", {"vocab_size": 9, "rope_theta": 1.0}, r"unknown fields \['rope_theta'\]"),
        ("BertModel", {}, r"missing fields \['vocab_size'\]"),
        ("BertForMaskedLM", {"vocab_size": 9, "tie_word_embeddings": False}, "tie_word_embeddings=False; only True"),
        ("ViTModel", {"image_size": [8, 8]}, "image_size"),
        ("ViTForImageClassification", {"id2label": ["a"]}, "id2label"),
        ("ViTForImageClassification", {"id2label": {"1": "a"}}, "id2label"),
        ("SiglipModel", {"text_config": 3}, "text_config=3; expected an object"),
        ("SiglipModel", {"text_config": {"hidden_size": "8"}}, "text_config: hidden_size='8'"),
        ("T5EncoderModel", {**T5_BASE, "feed_forward_proj": "gated-mish"}, "feed_forward_proj='gated-mish'"),
        ("T5EncoderModel", {**T5_BASE, "is_gated_act": True}, "is_gated_act=True contradicts"),
        ("T5EncoderModel", {**T5_BASE, "relative_attention_num_buckets": 3}, "buckets=3"),
    ],
)
def test_refused_fields(architecture: str, values: Any, message: str) -> None:
    """A field that the model cannot honour is not dropped in silence."""
    base = {} if architecture in ("SiglipModel", "T5EncoderModel") else BASE
    with pytest.raises(ConfigError, match=message):
        config_from_hf({"architectures": [architecture], **base, **values})


def test_refused_on_the_way_out() -> None:
    """Transformers has no gated unit with the exact GELU."""
    with pytest.raises(ConfigError, match="activation='gelu' with a gate"):
        config_to_hf(T5EncoderConfig(**SIZES, vocab_size=9, gated=True, activation="gelu"), dtype="float32")


def test_tensors_of_another_head(golden: Path, tmp_path: Path) -> None:
    """What pretraining left beside a masked model is ignored, what the model needs is not."""
    from dovetail_weights import write_directory

    source = golden / "bert_masked_lm"
    tensors = {name: np.array(tensor.read()) for name, tensor in open_directory(source).items()}
    files = {"config.json": (source / "config.json").read_text()}
    more = {"cls.seq_relationship.weight": np.ones((2, 8), np.float32), "bert.pooler.dense.bias": np.ones(8)}
    table = {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"]}
    write_directory(tmp_path / "more", tensors | more | table, extra_files=files)
    assert from_pretrained(tmp_path / "more").config.vocab_size == 23
    del tensors["cls.predictions.bias"]
    write_directory(tmp_path / "less", tensors, extra_files=files)
    with pytest.raises(WeightsError, match=r"cls\.predictions\.bias: missing"):
        from_pretrained(tmp_path / "less")
    labels = json.loads((golden / "vit_classifier/config.json").read_text())["id2label"]
    assert from_pretrained(golden / "vit_classifier").config.labels == tuple(labels.values())


def test_a_bias_of_the_logits_reaches_all_rows() -> None:
    """Positions of T5 act through the bias alone: without it the order of tokens does not matter."""
    model = T5EncoderModel(T5EncoderConfig(**SIZES, vocab_size=20), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 6)), jnp.int32)
    with_order = model(tokens[:, ::-1])[:, ::-1] - model(tokens)
    model.distances.set_value(jnp.zeros_like(model.distances.get_value()))
    without = model(tokens[:, ::-1])[:, ::-1] - model(tokens)
    assert np.abs(with_order).max() > 1e-3
    np.testing.assert_allclose(without, 0, atol=1e-5)
