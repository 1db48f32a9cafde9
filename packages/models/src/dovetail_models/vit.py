"""The ViT family: pre-norm encoders of patches and a class token (Dosovitskiy et al., arXiv:2010.11929)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dovetail_models.encoder import EncoderConfig, Linear, encode
from dovetail_models.family import Family
from dovetail_models.hf_config import ConfigMap, Fields
from dovetail_models.hf_encoder import (
    SIZES,
    activation_field,
    attention_rules,
    linear_rules,
    mlp_rules,
    norm_rules,
)
from dovetail_models.hf_fields import ConfigError, field
from dovetail_models.layers import ACTIVATION_FUNCTIONS, PlainActivation, exact, logits_dtype, parameter
from dovetail_models.patches import ImageSizes, Patches, patch_rules
from dovetail_weights import Reshape, Rule, WeightMap

__all__ = ["CLASSIFIER", "FAMILY", "ViTClassifierConfig", "ViTConfig", "ViTForImageClassification", "ViTModel"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageSizes, EncoderConfig):
    """Sizes and options of a ViT; see `EncoderConfig` for the others.

    Attributes:
        image_size: height and width.
        patch_size: height and width of a patch.
        channels: of the image.
        qkv_bias: biases of queries, keys and values.
        pooled: features that the pooler makes; None for `features`.
        pooler_activation: what the pooler ends with.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    qkv_bias: bool = True
    pooled: int | None = None
    pooler_activation: PlainActivation = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_image()
        if self.pooled is not None and self.pooled < 1:
            raise ValueError(f"pooled={self.pooled}; expected at least 1, or None")
        if self.pooler_activation not in ACTIVATION_FUNCTIONS:
            raise ValueError(
                f"pooler_activation={self.pooler_activation!r}; expected one of {list(ACTIVATION_FUNCTIONS)}"
            )

    @property
    def max_position(self) -> int:
        """Places of a row: the class token and the patches."""
        return self.patches + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTClassifierConfig(ViTConfig):
    """Sizes and options of a ViT that classifies.

    Attributes:
        labels: names of the classes.
    """

    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels:
            raise ValueError("labels=(); expected at least one")


class ViTModel(nnx.Module):
    """A ViT with its pooler.

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        pooler: make a pooler.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
    """

    def __init__(
        self, config: ViTConfig, *, rngs: nnx.Rngs, pooler: bool = True, param_dtype: Any = jnp.float32,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        self.config, d = config, config.features
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        weights: dict[str, Any] = {"init": config.init, "dtype": param_dtype, "rngs": rngs}
        self.patches = Patches(config, **weights)
        self.class_token = parameter(rngs, (d,), ("embed",), config.init, param_dtype)
        self.positions = parameter(rngs, (config.max_position, d), (None, "embed"), config.init, param_dtype)
        blocks = [config.block(before=True, bias=config.qkv_bias, **weights) for _ in range(config.layers)]
        self.layers = nnx.List(blocks)
        self.norm = config.norm(param_dtype)
        if pooler:
            self.pooler = Linear(d, config.pooled or d, ("embed", None), **weights)

    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch time features"]:
        """Return the last hidden states, that of the class token first.

        Raises:
            ValueError: images of another size than the configuration's.
        """
        patches = self.patches(pixels, self.dtype)
        first = jnp.broadcast_to(self.class_token.get_value().astype(self.dtype), (len(patches), 1, patches.shape[2]))
        x = jnp.concatenate([first, patches], 1) + self.positions.get_value().astype(self.dtype)
        return self.norm(encode(self.layers, x))

    def pooled(self, hidden: Float[Array, "batch time features"]) -> Float[Array, "batch pooled"]:
        """Return what the pooler makes of the class token."""
        return ACTIVATION_FUNCTIONS[self.config.pooler_activation](self.pooler(hidden[:, 0]))

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one image.

        Raises:
            ValueError: another number of places than an image makes.
        """
        if time != self.config.max_position:
            raise ValueError(f"time={time}; an image makes a row of {self.config.max_position}")
        return (self.patches.example(),)


class ViTForImageClassification(nnx.Module):
    """A ViT with a linear layer on its class token; for the arguments see `ViTModel`, for `output_dtype` `Decoder`."""

    def __init__(
        self, config: ViTClassifierConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None,
        output_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config = config
        self.encoder = ViTModel(config, rngs=rngs, pooler=False, param_dtype=param_dtype, dtype=dtype)
        self.dtype, self.output_dtype = self.encoder.dtype, logits_dtype(output_dtype)
        weights: dict[str, Any] = {"init": config.init, "dtype": param_dtype, "rngs": rngs}
        self.classifier = Linear(config.features, len(config.labels), ("embed", None), **weights)

    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch labels"]:
        """Return the logits."""
        first = self.encoder(pixels)[:, 0]
        return self.classifier(first, exact(first)).astype(self.output_dtype)

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one image."""
        return self.encoder.example(time)


NAMES = {
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
}


def _encoder_rules(config: ViTConfig, ours: str = "", theirs: str = "") -> list[Rule]:
    layer, their_layer, d = f"{ours}layers/{{i}}", f"{theirs}encoder.layer.{{i}}", config.features
    places = (config.max_position, d)
    return [
        *patch_rules(f"{ours}patches", f"{theirs}embeddings.patch_embeddings.projection"),
        Rule(f"{ours}class_token", f"{theirs}embeddings.cls_token", (Reshape((1, 1, d), (d,)),)),
        Rule(f"{ours}positions", f"{theirs}embeddings.position_embeddings", (Reshape((1, *places), places),)),
        *attention_rules(config, f"{layer}/attention", their_layer, NAMES),
        *norm_rules(f"{layer}/attention_norm", f"{their_layer}.layernorm_before"),
        *mlp_rules(f"{layer}/mlp", their_layer, "intermediate.dense", "output.dense"),
        *norm_rules(f"{layer}/mlp_norm", f"{their_layer}.layernorm_after"),
        *norm_rules(f"{ours}norm", f"{theirs}layernorm"),
    ]


def _weight_map(config: ViTConfig) -> WeightMap:
    return WeightMap([*_encoder_rules(config), *linear_rules("pooler", "pooler.dense")])


def _classifier_weight_map(config: ViTClassifierConfig) -> WeightMap:
    return WeightMap([*_encoder_rules(config, "encoder/", "vit."), *linear_rules("classifier", "classifier")])


def _read_labels(values: Mapping[str, Any], _: Mapping[str, Any]) -> Mapping[str, Any]:
    names = values.get("id2label")
    if names is None:
        names = {str(i): f"LABEL_{i}" for i in range(field(values, "num_labels", int, 2))}
    count = len(names) if isinstance(names, Mapping) else 0
    if not count or any(not isinstance(names.get(str(i)), str) for i in range(count)):
        raise ConfigError(f"id2label={names!r:.60}; expected an object of names for '0', '1' and so on")
    return {"labels": tuple(names[str(i)] for i in range(count))}


def _write_labels(config: ViTClassifierConfig) -> Mapping[str, Any]:
    names = {str(i): name for i, name in enumerate(config.labels)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


def _config_map(architecture: str, config: Any, *others: Fields, **more: Any) -> ConfigMap:
    return ConfigMap(
        architecture,
        "vit",
        config,
        sizes=SIZES,
        attends=False,
        options={
            "image_size": ("image_size", int, 224),
            "patch_size": ("patch_size", int, 16),
            "num_channels": ("channels", int, 3),
            "qkv_bias": ("qkv_bias", bool, True),
            "pooler_output_size": ("pooled", int, None),
            "layer_norm_eps": ("norm_eps", float, 1e-12),
            "initializer_range": ("init_std", float, 0.02),
        },
        ignored=("hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride", "tie_word_embeddings"),
        others=(
            activation_field("hidden_act", "activation", "gelu"),
            activation_field("pooler_act", "pooler_activation", "tanh"),
            *others,
        ),
        **more,
    )


FAMILY = Family(
    ViTModel,
    _config_map("ViTModel", ViTConfig, wholes=("ViTForImageClassification",)),
    _weight_map,
    ignored=("{vit.,}pooler.*", "classifier.*"),
    spellings=((("{x}", "vit.{x}"),),),
)
CLASSIFIER = Family(
    ViTForImageClassification,
    _config_map(
        "ViTForImageClassification",
        ViTClassifierConfig,
        Fields(("id2label", "label2id", "num_labels"), _read_labels, _write_labels),
    ),
    _classifier_weight_map,
    ignored=("vit.pooler.*",),
)
