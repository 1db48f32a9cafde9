"""The SigLIP family: an encoder of images and one of texts whose pooled rows meet (Zhai et al., arXiv:2303.15343)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dovetail_kernels import attention, einsum, take
from dovetail_models.encoder import EncoderConfig, Linear, encode
from dovetail_models.hf_encoder import no_more_tokens
from dovetail_models.layers import MLP, PlainActivation, exact, logits_dtype, parameter
from dovetail_models.patches import ImageSizes, Patches

__all__ = [
    "SiglipConfig",
    "SiglipModel",
    "SiglipTextConfig",
    "SiglipTextModel",
    "SiglipVisionConfig",
    "SiglipVisionModel",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig(ImageSizes, EncoderConfig):
    """Sizes and options of SigLIP's encoder of images; see `EncoderConfig` for the others.

    Attributes:
        image_size: height and width.
        patch_size: height and width of a patch.
        channels: of the image.
        head: pool the patches by attention.
    """

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    head: bool = True
    activation: PlainActivation = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_image()

    @property
    def max_position(self) -> int:
        """Places of a row: the patches."""
        return self.patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipTextConfig(EncoderConfig):
    """Sizes and options of SigLIP's encoder of texts; see `EncoderConfig` for the others.

    Attributes:
        vocab_size: tokens.
        max_position: learned positions.
        projection: features of a pooled row; None for `features`.
    """

    vocab_size: int
    max_position: int = 64
    projection: int | None = None
    activation: PlainActivation = "gelu_tanh"
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocab_size", "max_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.projection is not None and self.projection < 1:
            raise ValueError(f"projection={self.projection}; expected at least 1, or None")

    @property
    def pooled(self) -> int:
        """Features of a pooled row."""
        return self.features if self.projection is None else self.projection


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Both encoders, whose pooled rows have equally many features.

    Attributes:
        text: of texts.
        vision: of images.
    """

    text: SiglipTextConfig
    vision: SiglipVisionConfig

    def __post_init__(self) -> None:
        if not self.vision.head:
            raise ValueError("vision.head=False; texts meet pooled images only")
        if self.text.pooled != self.vision.features:
            raise ValueError(f"text.projection={self.text.pooled}; expected vision.features={self.vision.features}")

    @property
    def layers(self) -> int:
        """Blocks of both."""
        return self.text.layers + self.vision.layers

    @property
    def max_position(self) -> int:
        """Tokens of a text."""
        return self.text.max_position


class AttentionPooling(nnx.Module):
    """One learned query per row attends to all of its places; an MLP is added to what it finds."""

    def __init__(self, config: SiglipVisionConfig, *, init: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        d, h, e = config.features, config.heads, config.dim
        zeros = nnx.initializers.zeros
        self.probe = parameter(rngs, (d,), ("embed",), init, dtype)
        for name in ("query", "key", "value"):
            setattr(self, name, parameter(rngs, (d, h, e), ("embed", "heads", None), init, dtype, 1))
            setattr(self, f"{name}_bias", parameter(rngs, (h, e), ("heads", None), zeros, dtype))
        self.out = parameter(rngs, (h, e, d), ("heads", None, "embed"), init, dtype, 2)
        self.out_bias = parameter(rngs, (d,), ("embed",), zeros, dtype)
        self.norm = config.norm(dtype)
        self.mlp = MLP(d, config.hidden, activation=config.activation, init=init, dtype=dtype, rngs=rngs)

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        batch, time, d = x.shape
        y = einsum("td,dhk->thk", x.reshape(-1, d), getattr(self, name).get_value())
        y = y + getattr(self, f"{name}_bias").get_value().astype(y.dtype)
        return y.reshape(batch, time, *y.shape[1:])

    def __call__(self, hidden: Float[Array, "batch time features"]) -> Float[Array, "batch features"]:
        """Return one vector per row."""
        probe = jnp.broadcast_to(self.probe.get_value().astype(hidden.dtype), (len(hidden), 1, hidden.shape[2]))
        mixed = attention(self._project("query", probe), self._project("key", hidden), self._project("value", hidden))
        x = einsum("thk,hkd->td", mixed[:, 0], self.out.get_value())
        x = x + self.out_bias.get_value().astype(x.dtype)
        return x + self.mlp(self.norm(x))


class SiglipVisionModel(nnx.Module):
    """SigLIP's encoder of images.

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
    """

    def __init__(
        self, config: SiglipVisionConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        weights: dict[str, Any] = {"init": config.init, "dtype": param_dtype, "rngs": rngs}
        shape = (config.patches, config.features)
        self.patches = Patches(config, **weights)
        self.positions = parameter(rngs, shape, (None, "embed"), config.init, param_dtype)
        self.layers = nnx.List([config.block(before=True, **weights) for _ in range(config.layers)])
        self.norm = config.norm(param_dtype)
        if config.head:
            self.head = AttentionPooling(config, **weights)

    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch patches features"]:
        """Return the last hidden states.

        Raises:
            ValueError: images of another size than the configuration's.
        """
        x = self.patches(pixels, self.dtype) + self.positions.get_value().astype(self.dtype)
        return self.norm(encode(self.layers, x))

    def pooled(self, hidden: Float[Array, "batch patches features"]) -> Float[Array, "batch features"]:
        """Return what the head makes of the rows."""
        return self.head(hidden)

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one image.

        Raises:
            ValueError: another number of places than an image makes.
        """
        if time != self.config.max_position:
            raise ValueError(f"time={time}; an image makes a row of {self.config.max_position}")
        return (self.patches.example(),)


class SiglipTextModel(nnx.Module):
    """SigLIP's encoder of texts; for the arguments see `SiglipVisionModel`.

    All tokens see each other, padding included: that is how the models were trained, and a row is pooled at its last
    place. So pad every text to the same length, that of training.
    """

    def __init__(
        self, config: SiglipTextConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None
    ) -> None:
        self.config, self.vocab_size = config, config.vocab_size
        self.dtype = jnp.dtype(param_dtype if dtype is None else dtype)
        weights: dict[str, Any] = {"init": config.init, "dtype": param_dtype, "rngs": rngs}
        d = config.features
        self.embedding = parameter(
            rngs, (config.vocab_size, d), ("vocab", "embed"), config.init, param_dtype, table=True
        )
        self.positions = parameter(rngs, (config.max_position, d), (None, "embed"), config.init, param_dtype)
        self.layers = nnx.List([config.block(before=True, **weights) for _ in range(config.layers)])
        self.norm = config.norm(param_dtype)
        self.head = Linear(d, config.pooled, ("embed", None), **weights)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time features"]:
        """Return the last hidden states.

        Raises:
            ValueError: rows are longer than there are positions.
        """
        time = tokens.shape[1]
        no_more_tokens(time, self.config.max_position)
        x = take(self.embedding.get_value(), tokens).astype(self.dtype)
        return self.norm(encode(self.layers, x + self.positions.get_value()[:time].astype(self.dtype)))

    def pooled(self, hidden: Float[Array, "batch time features"]) -> Float[Array, "batch projection"]:
        """Return what the head makes of the last place of each row."""
        return self.head(hidden[:, -1])

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one row."""
        return (jax.ShapeDtypeStruct((1, time), jnp.int32),)


class SiglipModel(nnx.Module):
    """Images and texts in one space; for the arguments see `SiglipVisionModel`, for `output_dtype` `Decoder`."""

    def __init__(
        self, config: SiglipConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32, dtype: Any = None,
        output_dtype: Any = jnp.float32,
    ) -> None:  # fmt: skip
        self.config = config
        self.text = SiglipTextModel(config.text, rngs=rngs, param_dtype=param_dtype, dtype=dtype)
        self.vision = SiglipVisionModel(config.vision, rngs=rngs, param_dtype=param_dtype, dtype=dtype)
        self.dtype, self.output_dtype = self.text.dtype, logits_dtype(output_dtype)
        self.logit_scale = nnx.Param(jnp.full((), jnp.log(10.0), param_dtype), axes=())
        self.logit_bias = nnx.Param(jnp.full((), -10.0, param_dtype), axes=())

    def embed_texts(self, tokens: Int[Array, "texts time"]) -> Float[Array, "texts features"]:
        """Return vectors of length 1."""
        return _unit(self.text.pooled(self.text(tokens)))

    def embed_images(self, pixels: Float[Array, "images height width channels"]) -> Float[Array, "images features"]:
        """Return vectors of length 1."""
        return _unit(self.vision.pooled(self.vision(pixels)))

    def __call__(
        self, tokens: Int[Array, "texts time"], pixels: Float[Array, "images height width channels"]
    ) -> Float[Array, "texts images"]:
        """Return the logits of every pair; their transpose is what an image has for the texts."""
        texts, images = self.embed_texts(tokens), self.embed_images(pixels)
        similar = einsum("td,id->ti", texts, images, dtype=exact(texts))
        scale, bias = (x.get_value().astype(similar.dtype) for x in (self.logit_scale, self.logit_bias))
        return (similar * jnp.exp(scale) + bias).astype(self.output_dtype)

    def example(self, time: int) -> tuple[Any, ...]:
        """Return shapes of the arguments of a call on one text and one image."""
        return (*self.text.example(time), *self.vision.example(self.vision.config.max_position))


def _unit(x: jax.Array) -> jax.Array:
    wide = x.astype(exact(x))
    return (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(x.dtype)
