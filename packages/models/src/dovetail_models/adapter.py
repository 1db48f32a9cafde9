"""Adapters apart from their models: small trees to keep, add up, and move.

An adapter is a nested dict like the parameters of `dovetail_models.split`, with a `Lora` in the place of each adapted
weight. Its addresses are those of layers one by one (``layers/3/attention/query``), so that the same adapter fits a
model whose layers are a `Stack`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from dovetail_models.state import nested
from dovetail_protocols import paths

__all__ = ["Adapter", "Lora", "flat_adapter", "stack_lora"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapter of one weight, see `dovetail_protocols.LowRankArray`.

    Attributes:
        a: ``[*leading, *inputs, rank]``.
        b: ``[*leading, rank, *outputs]``.
        magnitude: ``[*leading, *outputs]`` of DoRA, or None.
        scale: factor of the product.
        leading: how many first axes all have: 1 for experts, 0 otherwise.
    """

    a: Any
    b: Any
    magnitude: Any = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    leading: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[-1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that it adapts."""
        return (*self.a.shape[:-1], *self.b.shape[self.leading + 1 :])

    def scaled(self, rank: int, scale: float) -> "Lora":
        """Return the same adapter with a larger rank, padded with zeros, and another scale, made up for in `b`."""
        more = rank - self.rank
        a = jnp.pad(self.a, [(0, 0)] * (self.a.ndim - 1) + [(0, more)]) if more else self.a
        pads = [(0, more if axis == self.leading else 0) for axis in range(self.b.ndim)]
        b = jnp.pad(self.b, pads) if more else self.b
        return Lora(a, b if scale == self.scale else b * (self.scale / scale), self.magnitude, scale, self.leading)


Adapter: TypeAlias = dict[Any, Any]
"""A nested dict of `Lora`."""


def flat_adapter(adapter: Adapter) -> dict[str, Lora]:
    """Return the parts of an adapter by address.

    Raises:
        TypeError: a leaf is no `Lora`.
        ValueError: there is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lambda x: isinstance(x, Lora))
    flat = {paths.path_of(key_path): leaf for key_path, leaf in leaves}
    for address, leaf in flat.items():
        if not isinstance(leaf, Lora):
            raise TypeError(f"{address or 'the adapter'} is {type(leaf).__name__}; expected a nested dict of Lora")
    if not flat:
        raise ValueError("the adapter is empty; expected a nested dict of Lora")
    return flat


def stack_lora(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Return the adapter that changes a model by the weighted sum of what others do.

    The thin arrays follow each other, so that ranks add up and nothing is approximated; where scales times weights
    differ, they become part of `b`.

    Args:
        adapters: of one model, of the same weights or others.
        weights: a number for each; None for 1.

    Raises:
        ValueError: no adapter, another number of weights, one that is not finite, or a weight whose shape differs; a
            magnitude, which is no sum (merge such an adapter first).

    >>> one = {"up": Lora(jnp.ones((4, 1)), jnp.ones((1, 6)))}
    >>> stack_lora([one, one], [0.5, 0.25])["up"].a.shape
    (4, 2)
    """
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if not adapters or len(factors) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters and {len(factors)} weights; expected as many, at least one")
    if not np.isfinite(factors).all():
        raise ValueError(f"weights={factors}; expected finite numbers")
    parts: dict[str, list[tuple[Lora, float]]] = {}
    for adapter, factor in zip(adapters, factors, strict=True):
        for address, part in flat_adapter(adapter).items():
            parts.setdefault(address, []).append((part, part.scale * factor))
    return nested({address: _joined(address, *zip(*pairs, strict=True)) for address, pairs in parts.items()})


def _joined(address: str, parts: Sequence[Lora], scales: Sequence[float]) -> Lora:
    if any(part.magnitude is not None for part in parts):
        raise ValueError(f"{address}: an adapter with magnitudes is not added to others; merge it into the model")
    if len({(part.a.shape[:-1], part.weight_shape, part.leading) for part in parts}) > 1:
        shapes = [(tuple(part.a.shape), tuple(part.b.shape)) for part in parts]
        raise ValueError(f"{address}: adapters of different shapes {shapes}; expected those of one model")
    scale = scales[0] if len(set(scales)) == 1 else 1.0
    b = [part.b if own == scale else part.b * (own / scale) for part, own in zip(parts, scales, strict=True)]
    leading = parts[0].leading
    return Lora(jnp.concatenate([part.a for part in parts], -1), jnp.concatenate(b, leading), None, scale, leading)
