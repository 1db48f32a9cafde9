"""What is computed in which dtype: softmaxes, norms, routers and logits stay float32 in a model of 16 bits."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_toys import MODELS, by_default

from dovetail_kernels import DenseMixer, attention
from dovetail_models import (
    BertForMaskedLM,
    BertMaskedLMConfig,
    Phi3,
    Qwen2,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SparseMLP,
    T5EncoderConfig,
    T5EncoderModel,
    ViTClassifierConfig,
    ViTForImageClassification,
    abstract,
    from_pretrained,
    merge,
    save_pretrained,
)

HALF, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")
TOKENS = jax.ShapeDtypeStruct((2, 6), jnp.int32)
EXACT = {"exp", "exp2", "log", "log1p", "expm1", "rsqrt", "sqrt", "cumsum", "cumlogsumexp", "reduce_sum"}
QWEN = dataclasses.replace(MODELS["qwen2"][1], windows=None)
SIZES = {"features": 8, "hidden": 12, "layers": 1, "heads": 2}
IMAGES = {"image_size": 4, "patch_size": 2, "channels": 1}
ENCODERS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForMaskedLM, BertMaskedLMConfig(**SIZES, vocab_size=20)),
    "vit": (ViTForImageClassification, ViTClassifierConfig(**SIZES, **IMAGES)),
    "siglip": (
        SiglipModel,
        SiglipConfig(
            text=SiglipTextConfig(**SIZES, vocab_size=20, max_position=5), vision=SiglipVisionConfig(**SIZES, **IMAGES)
        ),
    ),
}


def half(build: Any, config: Any, **options: Any) -> tuple[Any, Any]:
    """Definition and shapes of a model of 16 bits."""
    return abstract(lambda: build(config, rngs=nnx.Rngs(0), param_dtype=HALF, **options))


def operations(jaxpr: Any) -> Iterator[tuple[str, set[Any]]]:
    """Names of all operations, inner ones included, and dtypes of what they take."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, {v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")}
        inner = jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        for x in inner:
            if hasattr(x, "eqns"):
                yield from operations(x)


def narrow(function: Any, *arguments: Any) -> set[str]:
    """The operations that need float32 and are given less."""
    found = list(operations(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert {name for name, _ in found} & EXACT
    return {name for name, dtypes in found if name in EXACT and HALF in dtypes}


@pytest.mark.thin(2)
@pytest.mark.parametrize("name", by_default(MODELS))
def test_of_a_decoder(name: str, objective: Any) -> None:
    """A softmax of 16 bits forgets tokens of long rows; a sum of 16 bits stops growing at 256."""
    definition, shapes = half(*MODELS[name])
    backward = {"reduce_sum"}  # of biases and embeddings, whose gradients have the dtype of the activations' ones
    assert narrow(jax.value_and_grad(objective(definition)), shapes, TOKENS) <= backward

    def forward(params: Any, tokens: Any) -> Any:
        model, positions = merge(definition, params), jnp.tile(jnp.arange(6, dtype=jnp.int32), 2)
        hidden, _, _ = model.hidden(tokens.reshape(-1), positions, DenseMixer.of(tokens))
        return hidden, model.unembed(hidden)

    assert not narrow(forward, shapes, TOKENS)
    hidden, logits = jax.eval_shape(forward, shapes, TOKENS)
    assert (hidden.dtype, logits.dtype) == (HALF, WIDE)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("output", [None, HALF])
def test_of_an_encoder(name: str, output: Any) -> None:
    """Logits of pairs, classes and masked tokens are as exact as those of a decoder, and have the dtype asked for."""
    build, config = ENCODERS[name]
    definition, shapes = half(build, config, **({} if output is None else {"output_dtype": output}))
    arguments = merge(definition, shapes).example(5)

    def forward(params: Any, *arguments: Any) -> Any:
        return merge(definition, params)(*arguments)

    assert jax.eval_shape(forward, shapes, *arguments).dtype == (output or WIDE)
    assert not narrow(forward, shapes, *arguments)


def test_of_relative_positions() -> None:
    """A bias of the logits is added to them in float32."""
    definition, shapes = half(T5EncoderModel, T5EncoderConfig(**SIZES, vocab_size=20))
    assert not narrow(lambda params, tokens: merge(definition, params)(tokens), shapes, TOKENS)


def test_output_dtype(tmp_path: Any) -> None:
    """The dtype of logits is asked for where the model is made or read, and survives other lengths."""
    config = MODELS["phi3"][1]
    model = Phi3(config, rngs=nnx.Rngs(0), output_dtype=HALF)
    hidden = jnp.ones((3, config.features))
    assert model.unembed(hidden).dtype == model.for_length(64).unembed(hidden).dtype == HALF
    assert from_pretrained(save_pretrained(model, tmp_path / "model")).unembed(hidden).dtype == WIDE
    assert from_pretrained(tmp_path / "model", output_dtype=HALF).unembed(hidden).dtype == HALF
    with pytest.raises(ValueError, match=r"output_dtype=.*int32.*; expected a floating-point dtype"):
        Phi3(config, rngs=nnx.Rngs(0), output_dtype=jnp.int32)


def test_logits_are_not_rounded() -> None:
    """Logits of the sampler that are rounded to 16 bits on their way are not those of the trainer's loss."""
    model = MODELS["qwen3"][0](MODELS["qwen3"][1], rngs=nnx.Rngs(0), param_dtype=HALF)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((50, 8)), HALF)
    weight = np.asarray(model.head.get_value(), np.float64)
    wanted = np.asarray(hidden, np.float64) @ weight
    np.testing.assert_allclose(model.unembed(hidden), wanted, atol=1e-5)
    assert np.abs(np.asarray(jnp.asarray(wanted, HALF), np.float64) - wanted).max() > 1e-3


def test_attention_probabilities() -> None:
    """Attention of a model of 16 bits is a softmax in float32 of its own queries and keys, over 600 tokens."""
    model = Qwen2(QWEN, rngs=nnx.Rngs(0), param_dtype=HALF)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 24, 600), jnp.int32)
    seen: list[Any] = []

    class Mixer:
        """Notes what attention is given and gives."""

        def attend(self, layer: int, query: Any, key: Any, value: Any, **options: Any) -> Any:
            mixed, _ = DenseMixer.of(tokens[None]).attend(layer, query, key, value, **options)
            seen.append((query, key, value, mixed, options["scale"]))
            return mixed, self

    model.hidden(tokens, jnp.arange(600, dtype=jnp.int32), Mixer())
    assert len(seen) == QWEN.layers
    for query, key, value, mixed, scale in seen:
        assert {x.dtype for x in (query, key, value, mixed)} == {HALF}
        q, k, v = (np.asarray(x, np.float32) for x in (query, key, value))
        k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
        logits = np.where(np.tri(600, dtype=bool), np.einsum("qhd,khd->hqk", q, k) * scale, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        wanted = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
        np.testing.assert_allclose(np.asarray(mixed, np.float32), wanted, atol=2**-8 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_next"])
def test_router_probabilities(name: str) -> None:
    """Logits of a router that are rounded to 16 bits send tokens to other experts than those of the checkpoint."""
    build, config = MODELS[name]
    model = build(config, rngs=nnx.Rngs(0), param_dtype=HALF)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, config.features)), HALF)
    routers = [layer.mlp.router for layer in model.layers if isinstance(layer.mlp, SparseMLP)]
    assert routers
    for router in routers:
        found = router.choose(router.logits(x))
        assert found.weights.dtype == found.scores.dtype == WIDE
        logits = np.asarray(x, np.float64) @ np.asarray(router.weight.get_value(), np.float64)
        rounded = np.asarray(jnp.asarray(logits, HALF), np.float64)
        wanted, other = (scores(z, router.select.scoring) for z in (logits, rounded))
        np.testing.assert_allclose(found.scores, wanted, atol=1e-5)
        assert np.abs(other - wanted).max() > 2e-4


def scores(logits: Any, scoring: str) -> Any:
    """Of experts, from their logits."""
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_wider_activations() -> None:
    """What is float32 at least is not less than the activations have."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).standard_normal((9, 8)))
        model = MODELS["mixtral"][0](MODELS["mixtral"][1], rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        assert model.layers[0].mlp.router.logits(x).dtype == jnp.float64
        assert model.unembed(x).dtype == WIDE
        heads = x.reshape(1, 9, 2, 4)
        np.testing.assert_allclose(attention(heads, heads, heads, scale=1.0), dense(heads), rtol=1e-13)


def dense(x: Any) -> Any:
    """Attention of rows to themselves."""
    logits = np.einsum("bqhd,bkhd->bhqk", x, x)
    return np.einsum("bhqk,bkhd->bqhd", scores(logits, "softmax"), x)
