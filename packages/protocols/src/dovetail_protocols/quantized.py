"""QuantizedArray: what `kernels.einsum` and `kernels.take` accept in place of a weight."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["QuantizedArray"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    r"""An affine-quantized array, a pytree of its three arrays.

    With :math:`r(s)` the scale (and zero point) repeated along every axis to the shape of `qvalue`,

    .. math:: x_i = r(\mathrm{scale})_i \; (\mathrm{qvalue}_i - r(\mathrm{zero\_point})_i)

    Along each axis the length of `scale` divides that of `qvalue`: 1 is one scale for the whole axis, the full
    length one scale per element, anything between one per group of consecutive elements.

    Attributes:
        qvalue: integers or low-precision floats, the logical shape.
        scale: floats of the same rank.
        zero_point: like `scale`, or None for a symmetric quantization.
        dtype: the logical dtype, that of `dequantize()`.
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    dtype: Any = dataclasses.field(default=jnp.float32, metadata={"static": True})

    @classmethod
    def checked(cls, qvalue: Any, scale: Any, zero_point: Any = None, dtype: Any = jnp.float32) -> "QuantizedArray":
        """Build one from user input.

        Raises:
            ValueError: ranks differ, or a scale's axis does not divide that of `qvalue`.
        """
        for name, part in (("scale", scale), ("zero_point", zero_point)):
            if part is None:
                continue
            fits = part.ndim == qvalue.ndim and all(
                s > 0 and n % s == 0 for n, s in zip(qvalue.shape, part.shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"{name} has shape {part.shape}; expected the rank of qvalue {qvalue.shape} "
                    "and along every axis a divisor of its length"
                )
        return cls(qvalue, scale, zero_point, jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.qvalue.shape)

    @property
    def ndim(self) -> int:
        """The logical rank."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The logical number of elements."""
        return math.prod(self.shape)

    @property
    def T(self) -> "QuantizedArray":
        """The array with its axes reversed."""
        zero_point = None if self.zero_point is None else self.zero_point.T
        return QuantizedArray(self.qvalue.T, self.scale.T, zero_point, self.dtype)

    def dequantize(self) -> jax.Array:
        """Return the array in its logical dtype and shape."""
        value = self.qvalue.astype(self.scale.dtype)
        if self.zero_point is not None:
            value = value - self._spread(self.zero_point.astype(self.scale.dtype))
        return (value * self._spread(self.scale)).astype(self.dtype)

    def _spread(self, part: jax.Array) -> jax.Array:
        for axis, (n, s) in enumerate(zip(self.shape, part.shape, strict=True)):
            if s not in (1, n):
                part = jnp.repeat(part, n // s, axis=axis)
        return jnp.broadcast_to(part, self.shape)
