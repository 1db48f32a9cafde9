"""LowRankArray: a weight that is a base plus a product of two thin arrays, in place of a weight."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from dovetail_protocols.quantized import QuantizedArray

__all__ = ["LowRankArray"]

BATCH, INPUTS, OUTPUTS, RANK = "ABCDEFG", "abcdefg", "hijklmn", "r"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankArray:
    r"""An adapted weight, a pytree of its arrays: LoRA (Hu et al., arXiv:2106.09685), or DoRA with a magnitude.

    The axes of the weight are leading ones that every part has (layers, experts), those that a product sums over, and
    those of its result:

    .. math:: W = W_0 + \mathrm{scale} \; a b

    With a magnitude every output has a length of its own (DoRA, Liu et al., arXiv:2402.09353). The norm is over the
    summed axes, and its gradient is none, as in their section 4.3:

    .. math:: W = \mathrm{magnitude} \; \frac{W_0 + \mathrm{scale} \; a b}{\lVert W_0 + \mathrm{scale} \; a b \rVert}

    Attributes:
        base: ``[*leading, *inputs, *outputs]``, possibly quantized.
        a: ``[*leading, *inputs, rank]``.
        b: ``[*leading, rank, *outputs]``.
        magnitude: ``[*leading, *outputs]``; None for LoRA.
        scale: factor of the product.

    >>> w = LowRankArray.checked(jnp.zeros((3, 4)), jnp.ones((3, 2)), jnp.ones((2, 4)), scale=0.5)
    >>> float(w.dense()[0, 0]), w.shape, w.rank
    (1.0, (3, 4), 2)
    """

    base: jax.Array | QuantizedArray
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @classmethod
    def checked(cls, base: Any, a: Any, b: Any, magnitude: Any = None, scale: float = 1.0) -> "LowRankArray":
        """Build one from user input.

        Raises:
            ValueError: shapes that do not fit, a rank below 1, or a scale that is not finite.
        """
        made = cls(base, a, b, magnitude, float(scale))
        leading = a.ndim + b.ndim - 2 - base.ndim
        fits = min(leading, a.ndim - leading - 2, b.ndim - leading - 2) >= 0
        fits = fits and a.shape[:-1] + b.shape[leading + 1 :] == tuple(base.shape)
        if not fits or a.shape[:leading] != b.shape[:leading] or a.shape[-1] != b.shape[leading]:
            raise ValueError(
                f"a {tuple(a.shape)} and b {tuple(b.shape)} do not make {tuple(base.shape)}; expected "
                "[*leading, *inputs, rank] and [*leading, rank, *outputs]"
            )
        if a.shape[-1] < 1:
            raise ValueError(f"a {tuple(a.shape)} has rank {a.shape[-1]}; expected at least 1")
        expected = b.shape[:leading] + b.shape[leading + 1 :]
        if magnitude is not None and magnitude.shape != expected:
            raise ValueError(f"magnitude has shape {tuple(magnitude.shape)}; expected {expected}, one per output")
        if not math.isfinite(scale):
            raise ValueError(f"scale={scale}; expected a finite number")
        return made

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape."""
        return tuple(self.base.shape)

    @property
    def ndim(self) -> int:
        """The logical rank of the array (its number of axes)."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The logical number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """The logical dtype, that of the base."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[-1]

    @property
    def leading(self) -> int:
        """How many first axes all parts share."""
        return self.a.ndim + self.b.ndim - 2 - self.ndim

    @property
    def inputs(self) -> int:
        """How many axes after those a product sums over."""
        return self.a.ndim - 1 - self.leading

    @property
    def T(self) -> Any:
        """The weight with its axes reversed; with a magnitude, of which each output has one, a plain array.

        Raises:
            ValueError: there are leading axes.
        """
        if self.leading:
            raise ValueError(f"a weight {self.shape} with {self.leading} leading axes has no transpose")
        if self.magnitude is not None:
            return self.dense().T
        return LowRankArray(self.base.T, self.b.T, self.a.T, None, self.scale)

    def dense(self) -> jax.Array:
        """Return the array in its logical dtype and shape, computed in float32 (float64 for float64)."""
        labels = self._labels()
        base = self._wide_base()
        total = base + self.scale * _einsum(f"{labels.a},{labels.b}->{labels.base}", self.a, self.b, base.dtype)
        if self.magnitude is not None:
            total = total * jnp.expand_dims(self.gain(), range(self.leading, self.leading + self.inputs))
        return total.astype(self.dtype)

    def gain(self) -> jax.Array:
        """Return the factors ``[*leading, *outputs]`` that give outputs their magnitudes; norms of 0 count as 1."""
        norm = jax.lax.stop_gradient(self.norm())
        if self.magnitude is None:
            return jnp.ones_like(norm)
        return self.magnitude.astype(norm.dtype) / jnp.where(norm > 0, norm, jnp.ones_like(norm))

    def norm(self) -> jax.Array:
        """Return the norm of each output over the inputs, before a magnitude; ``[*leading, *outputs]``.

        The sum is never made: its square is that of the base, twice the product of both, and that of ``a b``.
        """
        labels, base = self._labels(), self._wide_base()
        summed = tuple(range(self.leading, self.leading + self.inputs))
        across = _einsum(f"{labels.base},{labels.a}->{labels.b}", base, self.a, base.dtype)
        inner = _einsum(f"{labels.a},{labels.other_a}->{labels.gram}", self.a, self.a, base.dtype)
        within = _einsum(f"{labels.gram},{labels.b}->{labels.other_b}", inner, self.b, base.dtype)
        change = jnp.sum((2 * across + self.scale * within) * self.b.astype(base.dtype), axis=self.leading)
        return jnp.sqrt(jnp.maximum(jnp.sum(base * base, axis=summed) + self.scale * change, 0))

    def _wide_base(self) -> jax.Array:
        wide = jnp.float64 if self.dtype == jnp.dtype("float64") else jnp.float32
        base = self.base.dequantize() if isinstance(self.base, QuantizedArray) else self.base
        return base.astype(wide)

    def _labels(self) -> "_Labels":
        return _Labels(BATCH[: self.leading], INPUTS[: self.inputs], OUTPUTS[: self.b.ndim - self.leading - 1])


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Letters of the axes."""

    leading: str
    inputs: str
    outputs: str

    @property
    def base(self) -> str:
        return self.leading + self.inputs + self.outputs

    @property
    def a(self) -> str:
        return self.leading + self.inputs + RANK

    @property
    def other_a(self) -> str:
        return self.leading + self.inputs + "s"

    @property
    def gram(self) -> str:
        return self.leading + RANK + "s"

    @property
    def b(self) -> str:
        return self.leading + RANK + self.outputs

    @property
    def other_b(self) -> str:
        return self.leading + "s" + self.outputs


def _einsum(spec: str, x: jax.Array, y: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), precision="highest")
