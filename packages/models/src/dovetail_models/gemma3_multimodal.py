"""Gemma 3 with images: places in a text whose embeddings are patches that SigLIP saw (arXiv:2503.19786).

The places of an image see each other in both directions, in every layer; see `DenseMixer.of`'s `together`.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from dovetail_kernels import einsum
from dovetail_models.gemma3 import Gemma3, Gemma3Config
from dovetail_models.layers import RMSNorm, parameter
from dovetail_models.remat import Remat
from dovetail_models.siglip import SiglipVisionConfig, SiglipVisionModel
from dovetail_protocols import Auxiliary, CacheSpec

__all__ = ["Gemma3Multimodal", "Gemma3MultimodalConfig", "ImageProjector"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3MultimodalConfig:
    """Sizes and options of a Gemma3Multimodal.

    Attributes:
        text: of the decoder, which has no soft cap of the logits.
        vision: of the encoder of images, which has no head.
        tokens_per_image: places of an image in a text: a square, whose side divides that of the patches.
        image_token_id: stands at these places; it may lie outside the vocabulary.
        begin_image_id: stands before them.
        end_image_id: stands after them.
    """

    text: Gemma3Config
    vision: SiglipVisionConfig
    tokens_per_image: int = 256
    image_token_id: int = 262144
    begin_image_id: int = 255999
    end_image_id: int = 256000

    def __post_init__(self) -> None:
        if self.vision.head:
            raise ValueError("vision.head=True; expected False: texts meet patches, not pooled images")
        if self.text.final_softcap is not None:
            raise ValueError(f"text.final_softcap={self.text.final_softcap}; expected None: it has none with images")
        if self.tokens_per_image < 1 or math.isqrt(self.tokens_per_image) ** 2 != self.tokens_per_image:
            raise ValueError(f"tokens_per_image={self.tokens_per_image}; expected a square, such as 256")
        patches = math.isqrt(self.vision.patches)
        if patches % self.side:
            raise ValueError(
                f"tokens_per_image={self.tokens_per_image}, {self.side} a side, for {patches} patches a side; "
                "expected a divisor"
            )
        ids = self.image_token_id, self.begin_image_id, self.end_image_id
        if min(ids) < 0 or self.image_token_id in ids[1:]:
            raise ValueError(
                f"image_token_id={ids[0]}, begin_image_id={ids[1]}, end_image_id={ids[2]}; expected numbers of at "
                "least 0, the first unlike the others"
            )

    @property
    def side(self) -> int:
        """Places along a side of an image."""
        return math.isqrt(self.tokens_per_image)

    @property
    def image(self) -> tuple[int, ...]:
        """The tokens of an image in a text."""
        return (self.begin_image_id, *(self.image_token_id,) * self.tokens_per_image, self.end_image_id)

    @property
    def layers(self) -> int:
        """Blocks of both."""
        return self.text.layers + self.vision.layers

    @property
    def max_position(self) -> int:
        """The context length of the decoder."""
        return self.text.max_position

    @property
    def tied(self) -> bool:
        """The decoder's unembedding is its embedding."""
        return self.text.tied


class ImageProjector(nnx.Module):
    """Squares of neighbouring patches, averaged, normalised and projected."""

    def __init__(self, config: Gemma3MultimodalConfig, *, init: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        features, self.side = config.vision.features, config.side
        self.norm = RMSNorm(features, eps=config.vision.norm_eps, offset=1.0, dtype=dtype)
        self.weight = parameter(rngs, (features, config.text.features), ("embed", None), init, dtype, 1)

    def __call__(
        self, patches: Float[Array, "images patches vision_features"]
    ) -> Float[Array, "images places features"]:
        """Return the rows of each image."""
        images, count, features = patches.shape
        square = math.isqrt(count) // self.side
        means = patches.reshape(images, self.side, square, self.side, square, features).mean((2, 4))
        flat = einsum("td,df->tf", self.norm(means.reshape(-1, features)), self.weight.get_value())
        return flat.reshape(images, self.side**2, -1)


class Gemma3Multimodal(nnx.Module):
    """A Gemma3 that reads texts with images; meets `dovetail_protocols.LanguageModel`.

    Texts alone need nothing but `hidden`. Images go in as `embeds`, and their places see each other:

    >>> from dovetail_kernels import DenseMixer
    >>> text = Gemma3Config(vocab_size=10, features=8, hidden=16, layers=1, heads=2)
    >>> sizes = {"features": 8, "hidden": 16, "layers": 1, "heads": 2, "image_size": 4, "patch_size": 1}
    >>> vision = SiglipVisionConfig(**sizes, head=False)
    >>> config = Gemma3MultimodalConfig(
    ...     text=text, vision=vision, tokens_per_image=4, image_token_id=10, begin_image_id=1, end_image_id=2
    ... )
    >>> model = Gemma3Multimodal(config, rngs=nnx.Rngs(0))
    >>> tokens = jnp.asarray([[5, *config.image, 6]], jnp.int32)
    >>> embeds = model.embed(tokens.reshape(-1), model.embed_images(jnp.ones((1, 4, 4, 3))))
    >>> mixer = DenseMixer.of(tokens, together=model.together(tokens))
    >>> hidden, _, _ = model.hidden(tokens.reshape(-1), jnp.arange(8, dtype=jnp.int32), mixer, embeds=embeds)
    >>> model.unembed(hidden).shape
    (8, 10)

    Args:
        config: sizes and options.
        rngs: where the initial weights come from.
        param_dtype: dtype of the parameters.
        dtype: dtype of activations and products; None for `param_dtype`.
        output_dtype: of the logits, see `Decoder`.
        scan: of the decoder, see `Decoder`.
        remat: likewise.

    Raises:
        ValueError: as `Decoder`.
    """

    def __init__(
        self,
        config: Gemma3MultimodalConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        dtype: Any = None,
        output_dtype: Any = jnp.float32,
        scan: bool = False,
        remat: str | Remat | None = None,
    ) -> None:
        self.config, self.vocab_size = config, config.text.vocab_size
        dtypes: dict[str, Any] = {"param_dtype": param_dtype, "dtype": dtype}
        self.text = Gemma3(config.text, rngs=rngs, output_dtype=output_dtype, scan=scan, remat=remat, **dtypes)
        self.vision = SiglipVisionModel(config.vision, rngs=rngs, **dtypes)
        self.projector = ImageProjector(config, init=config.text.init, dtype=param_dtype, rngs=rngs)
        self.dtype = self.text.dtype

    def embed_images(
        self, pixels: Float[Array, "images height width channels"]
    ) -> Float[Array, "images places features"]:
        """Return what stands at the places of each image.

        Raises:
            ValueError: images of another size than the configuration's.
        """
        return self.projector(self.vision(pixels))

    def embed(
        self, tokens: Int[Array, " tokens"], images: Float[Array, "images places features"]
    ) -> Float[Array, "tokens features"]:
        """Return the embeddings of tokens, and at the places of images the rows of these, in order.

        Args:
            tokens: of all sequences, flattened.
            images: from `embed_images`, in the order of their places.

        Raises:
            ValueError: `images` have another shape, or there are more or fewer places than rows. Where that cannot be
                known, under ``jax.jit``, all embeddings are NaN.
        """
        shape = (self.config.tokens_per_image, self.config.text.features)
        if images.shape[1:] != shape:
            raise ValueError(f"images have shape {images.shape}; expected [images, {shape[0]}, {shape[1]}]")
        place = tokens == self.config.image_token_id
        found, count = jnp.sum(place), len(images) * shape[0]
        if not isinstance(found, Tracer) and found != count:
            raise ValueError(
                f"{found} places of images (token {self.config.image_token_id}), {len(images)} images with {shape[0]} "
                f"each; expected {count}"
            )
        words = self.text.embed(jnp.where(place, 0, tokens))
        rows = images.reshape(count, shape[1]).astype(words.dtype)
        seen = jnp.take(rows, jnp.cumsum(place) - 1, axis=0, mode="fill") if count else jnp.nan
        embeds = jnp.where(place[:, None], seen, words)
        return jnp.where(found == count, embeds, jnp.nan)

    def together(self, tokens: Int[Array, "batch time"]) -> Int[Array, "batch time"]:
        """Return numbers of the runs of image tokens in each row, from 1 on; 0 for other tokens."""
        place = tokens == self.config.image_token_id
        begins = place & ~jnp.pad(place, ((0, 0), (1, 0)))[:, :-1]
        return jnp.where(place, jnp.cumsum(begins, axis=1, dtype=jnp.int32), 0)

    def hidden(
        self,
        tokens: Int[Array, " tokens"],
        positions: Int[Array, " tokens"],
        mixer: Any,
        *,
        embeds: Float[Array, "tokens features"] | None = None,
    ) -> tuple[Float[Array, "tokens features"], Auxiliary, Any]:
        """See `dovetail_protocols.LanguageModel.hidden`; `embeds` come from `embed` where there are images."""
        return self.text.hidden(tokens, positions, mixer, embeds=embeds)

    def unembedding(self) -> tuple[Any, None, None]:
        """Return ``(W[features, vocab], None, None)``."""
        weight, _, _ = self.text.unembedding()
        return weight, None, None

    def unembed(self, hidden: Float[Array, "tokens features"]) -> Float[Array, "tokens vocab"]:
        """Return the logits, of the dtype that was asked for."""
        return self.text.unembed(hidden)

    def cache_specs(self) -> tuple[CacheSpec, ...]:
        """Return what each layer's attention must remember."""
        return self.text.cache_specs()
