"""Images as rows of patches (Dosovitskiy et al., arXiv:2010.11929)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dovetail_kernels import einsum
from dovetail_models.layers import parameter
from dovetail_weights import Rule, Transpose

__all__ = ["ImageSizes", "Patches", "patch_rules"]


class ImageSizes:
    """What configurations of encoders of images have in common: `image_size`, `patch_size` and `channels`."""

    image_size: int
    patch_size: int
    channels: int

    def check_image(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: one is below 1, or the image is smaller than a patch.
        """
        for name in ("image_size", "patch_size", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} is below patch_size={self.patch_size}")

    @property
    def patches(self) -> int:
        """Patches of an image; what is left of it at the right and below is not seen."""
        return (self.image_size // self.patch_size) ** 2


class Patches(nnx.Module):
    """A product of every patch, with a bias: a convolution whose stride is its size."""

    def __init__(self, config: Any, *, init: Any, dtype: Any, rngs: nnx.Rngs) -> None:
        shape = (config.patch_size, config.patch_size, config.channels, config.features)
        self.weight = parameter(rngs, shape, (None, None, None, "embed"), init, dtype, 3)
        self.bias = parameter(rngs, shape[-1:], ("embed",), nnx.initializers.zeros, dtype)
        self.sizes = (config.image_size, config.patch_size, config.channels)

    def __call__(
        self, pixels: Float[Array, "batch height width channels"], dtype: Any
    ) -> Float[Array, "batch patches features"]:
        """Return the embeddings of an image's patches, row by row.

        Raises:
            ValueError: images of another size.
        """
        size, patch, channels = self.sizes
        if pixels.shape[1:] != (size, size, channels):
            raise ValueError(f"images of shape {pixels.shape[1:]}; expected [height, width, channels] = {self.sizes}")
        batch, count = pixels.shape[0], size // patch
        whole = pixels[:, : count * patch, : count * patch].astype(dtype)
        cut = whole.reshape(batch, count, patch, count, patch, channels).swapaxes(2, 3)
        flat = cut.reshape(batch * count * count, patch, patch, channels)
        y = einsum("tpqc,pqcd->td", flat, self.weight.get_value())
        y = y + self.bias.get_value().astype(y.dtype)
        return y.reshape(batch, count * count, -1)

    def example(self) -> jax.ShapeDtypeStruct:
        """Return the shape of one image."""
        size, _, channels = self.sizes
        return jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)


def patch_rules(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of `Patches`."""
    return [
        Rule(f"{ours}/weight", f"{theirs}.weight", (Transpose((2, 3, 1, 0)),)),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]
