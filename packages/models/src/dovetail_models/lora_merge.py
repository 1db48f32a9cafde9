"""Adapters added to the weights: of a model in memory, or of a checkpoint tensor by tensor."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from dovetail_models.adapter import Adapter, Lora, flat_adapter
from dovetail_models.adapter_slots import check_fit, no_such_weight, with_lora
from dovetail_models.lazy_model import LazyModel, surgery
from dovetail_models.lazy_parts import computing_dtype
from dovetail_models.lora import adapted, check_finite, division
from dovetail_models.state import replaced, variables
from dovetail_protocols import LowRankArray, QuantizedArray
from dovetail_weights import Lazy, WeightsError

__all__ = ["merge_lora"]


def merge_lora(model: Any, adapter: Adapter | None = None) -> Any:
    """Return the plain model whose weights are the sums of the bases and their adapters.

    Sums are float32 (float64 for float64), rounded once to the dtype of the weight. They cannot be taken apart again
    exactly: keep the adapted model, of which `remove_lora` gives the bases back bit by bit.

    Args:
        model: with adapters; or, where one is given, without: a model, a directory or a `LazyModel`, of which the last
            two become a `LazyModel` that adds up each tensor as it is read (see `dovetail_models.surgery`).
        adapter: to merge into a model that has none.

    Raises:
        TypeError: `model` is a directory or a `LazyModel`, and no adapter is given.
        ValueError: there are no adapters, one fits no weight of the model or a weight of another shape; a base is
            quantized, or a sum is not finite.
        dovetail_weights.WeightsError: a sum is not finite (of a `LazyModel`, when it is read).

    >>> from dovetail_models import Llama, LlamaConfig, add_lora
    >>> model = Llama(LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2), rngs=nnx.Rngs(0))
    >>> merged = merge_lora(add_lora(model, "layers/*/mlp/up", rank=4, rngs=nnx.Rngs(1)))
    >>> merged.layers[0].mlp.up.get_value().shape
    (8, 16)
    """
    if adapter is not None:
        return merge_lora(with_lora(model, adapter)) if isinstance(model, nnx.Module) else _merged(model, adapter)
    return replaced(model, {address: _sum(address, weight) for address, weight in adapted(model).items()})


def _sum(address: str, weight: LowRankArray) -> jax.Array:
    if isinstance(weight.base, QuantizedArray):
        raise ValueError(f"{address}: the base is quantized, and a sum is not; merge into the model it was made of")
    made = jax.jit(LowRankArray.dense)(weight)
    check_finite(f"{address} with its adapter", made)
    return made if isinstance(made, Tracer) else jax.device_put(made, weight.base.sharding)


@surgery
def _merged(model: LazyModel, adapter: Adapter) -> LazyModel:
    parts = flat_adapter(adapter)
    known = variables(model.module())
    for address in parts:
        if address not in model.tensors or address not in known:
            raise no_such_weight(address, known)
    changed = {
        address: _Sum.lazily(address, model.tensors[address], part, division(address, known[address]))
        for address, part in parts.items()
    }
    return LazyModel(model.family, model.config, {**model.tensors, **changed}, model.token_ids, model.files)


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A weight of a checkpoint and its adapter, added up where they are read."""

    address: str
    base: Lazy
    part: Lora
    inputs: int

    @classmethod
    def lazily(cls, address: str, base: Lazy, part: Lora, divided: tuple[int, int]) -> Lazy:
        check_fit(address, part, base.shape, divided)
        dtype = computing_dtype(base)
        return Lazy(
            base.shape,
            base.dtype,
            cls(address, base, jax.tree.map(lambda x: np.asarray(x, dtype), part), divided[1]).read,
        )

    @property
    def outputs(self) -> slice:
        """The axes of the result of a product."""
        return slice(self.part.leading + self.inputs, len(self.base.shape))

    def read(self, index: Any) -> Any:
        """Return a part of the sum."""
        with np.errstate(over="ignore", invalid="ignore"):  # which the check below sees
            made = self._before(index)
            if self.part.magnitude is not None:
                first, last = index[: self.part.leading], index[self.outputs]
                made = made * np.expand_dims(self._gain[(*first, *last)], self._summed)
            made = made.astype(self.base.dtype)
        if not np.isfinite(made).all():
            raise WeightsError(f"{self.address} with its adapter: holds NaN or infinity; expected finite numbers")
        return made

    @property
    def _summed(self) -> tuple[int, ...]:
        return tuple(range(self.part.leading, self.part.leading + self.inputs))

    def _before(self, index: Any) -> Any:
        """Return a part of the sum before it has magnitudes."""
        leading, rest = index[: self.part.leading], index[self.outputs]
        a = self.part.a[(*leading, *index[self.part.leading : self.outputs.start])]
        b = self.part.b[(*leading, slice(None), *rest)]
        first, into, out = "AB"[: self.part.leading], "abcdefg"[: self.inputs], "hijklmn"[: len(rest)]
        change = np.einsum(f"{first}{into}r,{first}r{out}->{first}{into}{out}", a, b)
        return self.base.read(index).astype(a.dtype) + self.part.scale * change

    @functools.cached_property
    def _gain(self) -> Any:
        """What gives each output its magnitude."""
        norm = np.sqrt(np.sum(self._before(tuple(slice(0, n) for n in self.base.shape)) ** 2, axis=self._summed))
        return self.part.magnitude / np.where(norm > 0, norm, 1)
