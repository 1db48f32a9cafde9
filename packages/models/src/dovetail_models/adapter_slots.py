"""Adapters on and off models, and one in the place of another."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer

from dovetail_models.adapter import Adapter, Lora, flat_adapter
from dovetail_models.lora import adapted, check_finite, check_in_memory, division
from dovetail_models.stack import single_addresses
from dovetail_models.state import nested, replaced, variables
from dovetail_protocols import LowRankArray
from dovetail_weights.errors import nearest

M = TypeVar("M", bound=nnx.Module)

__all__ = ["check_fit", "lora_of", "no_such_weight", "swap_lora", "with_lora"]

_Parts: TypeAlias = dict[str, Lora | None]
"""What an adapter has of a weight by address, of which a stacked one has several: those of its layers."""


def lora_of(model: nnx.Module) -> Adapter:
    """Return the adapter of a model.

    Raises:
        TypeError: it is no model in memory.
        ValueError: it has none.
    """
    weights = adapted(model)
    singles = single_addresses(model, weights)
    flat: dict[str, Lora] = {}
    for address, w in weights.items():
        whole = Lora(w.a, w.b, w.magnitude, w.scale, w.leading)
        if singles[address] == [address]:
            flat[address] = whole
            continue
        one = dataclasses.replace(whole, leading=w.leading - 1)
        for i, single in enumerate(singles[address]):
            flat[single] = jax.tree.map(lambda x, i=i: x[i], one)
    return nested(flat)


def with_lora(model: M, adapter: Adapter) -> M:
    """Return a model without adapters with one.

    Layers of a `Stack` share an array: where they differ, ranks are padded with zeros, and scales become part of `b`.

    Raises:
        TypeError: `model` is a directory or a `LazyModel`.
        ValueError: the adapter has a weight that the model does not have or of another shape, one that has an adapter
            already or can have none, or NaN; or of the layers of a `Stack` that it has, some have magnitudes and others
            none.
    """
    check_in_memory(model)
    known = variables(model)
    made: dict[str, Any] = {}
    for address, parts in _by_weight(model, known, flat_adapter(adapter)).items():
        given = {single: part for single, part in parts.items() if part}
        magnitudes = _have_magnitudes(address, given)
        scales, rank = {part.scale for part in given.values()}, max(part.rank for part in given.values())
        slot = _Slot(address, known[address], rank, scales.pop() if len(scales) == 1 else 1.0)
        made[address] = slot.filled(parts, magnitudes=magnitudes)
    return replaced(model, made)


def _have_magnitudes(address: str, given: Mapping[str, Lora]) -> bool:
    """Tell whether adapters of layers that share an array have magnitudes: all of them, or none."""
    those = [single for single, part in given.items() if part.magnitude is not None]
    others = [single for single, part in given.items() if part.magnitude is None]
    if those and others:
        raise ValueError(
            f"{address}: of the layers that share it {', '.join(those)} have magnitudes and {', '.join(others)} have "
            "none; expected all or none of them, or a model without scan=True"
        )
    return bool(those)


def swap_lora(model: M, adapter: Adapter | None) -> M:
    """Return an adapted model with another adapter in the same form: no shape, dtype or static part changes.

    So it runs in the programs that the first one was compiled for, such as those of an engine: ranks are padded with
    zeros, scales become part of `b`, and what the adapter lacks changes nothing. Make the first one with `add_lora`, of
    the largest rank, for all weights that any adapter has, and with magnitudes if any has some.

    Args:
        model: with adapters, which are replaced.
        adapter: None for none, which gives what the bases give.

    Raises:
        TypeError: `model` is a directory or a `LazyModel`.
        ValueError: the adapter has a weight that the model's does not have, a larger rank, magnitudes where the model
            has none, a scale where the model's is 0, another shape, or NaN.

    >>> from dovetail_models import Llama, LlamaConfig, add_lora
    >>> base = Llama(LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2), rngs=nnx.Rngs(0))
    >>> slots = add_lora(base, ["layers/*/mlp/*", "layers/*/attention/*"], rank=8, rngs=nnx.Rngs(1))
    >>> other = lora_of(add_lora(base, "layers/*/mlp/up", rank=2, rngs=nnx.Rngs(2)))
    >>> jax.tree.structure(swap_lora(slots, other)) == jax.tree.structure(slots)
    True
    """
    weights, known = adapted(model), variables(model)
    bases = {address: known[address].replace(w.base) for address, w in weights.items()}
    given = {} if adapter is None else _by_weight(model, bases, flat_adapter(adapter))
    singles = single_addresses(model, weights)
    made: dict[str, Any] = {}
    for address, w in weights.items():
        slot = _Slot(address, bases[address], w.rank, w.scale)
        parts = given.get(address, dict.fromkeys(singles[address]))
        new = slot.filled(parts, magnitudes=w.magnitude is not None)
        made[address] = jax.tree.map(_like, new, w)
    return replaced(model, made)


def _like(new: Any, old: Any) -> Any:
    """Return an array with the dtype and at the place of another."""
    made = new if new.dtype == old.dtype else new.astype(old.dtype)
    return made if new is old or isinstance(made, Tracer) else jax.device_put(made, old.sharding)


def _by_weight(model: nnx.Module, known: Mapping[str, Any], flat: Mapping[str, Lora]) -> dict[str, _Parts]:
    """Return what an adapter has for each of the model's weights."""
    singles = single_addresses(model, known)
    found = {address: {single: flat.get(single) for single in singles[address]} for address in known}
    taken = {single for address in known for single in singles[address]}
    for address in flat:
        if address not in taken:
            raise no_such_weight(address, taken)
    return {address: parts for address, parts in found.items() if any(parts.values())}


def no_such_weight(address: str, known: Collection[str]) -> ValueError:
    """Return the error of an adapter that has more than the model."""
    near = nearest(address, sorted(known))
    return ValueError(f"{address}: the adapter has it, the model has no such weight; the nearest are: {near}")


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A weight, and rank and scale of the adapter that it is to have."""

    address: str
    variable: Any
    rank: int
    scale: float

    def filled(self, parts: _Parts, *, magnitudes: bool) -> LowRankArray:
        """Return the weight with an adapter: of its own, or for each of several stacked layers, or for some."""
        leading, inputs = division(self.address, self.variable)
        base = self.variable.get_value()
        stacked = self.variable.get_metadata()["axes"][:1] == ("layers",)
        divided = (leading - stacked, inputs)
        shape = tuple(base.shape[1:] if stacked else base.shape)
        whole = [self._fitted(single, part, shape, divided, magnitudes) for single, part in parts.items()]
        a, b, lengths = ([getattr(part, name) for part in whole] for name in ("a", "b", "magnitude"))
        join = jnp.stack if stacked else lambda arrays: arrays[0]
        w = LowRankArray(base, join(a), join(b), None, self.scale)
        if not magnitudes:
            return w
        if not any(length is None for length in lengths):
            return dataclasses.replace(w, magnitude=join(lengths))
        norms = w.norm()
        own = norms if stacked else norms[None]
        lengths = [norm if length is None else length for norm, length in zip(own, lengths, strict=True)]
        return dataclasses.replace(w, magnitude=join(lengths))

    def _fitted(
        self, address: str, part: Lora | None, shape: tuple[int, ...], divided: tuple[int, int], magnitudes: bool
    ) -> Lora:
        leading, inputs = divided
        if part is None:
            end = leading + inputs
            a, b = jnp.zeros((*shape[:end], self.rank)), jnp.zeros((*shape[:leading], self.rank, *shape[end:]))
            return Lora(a, b, None, self.scale, leading)
        check_fit(address, part, shape, divided)
        if part.magnitude is not None and not magnitudes:
            raise ValueError(
                f"{address}: the adapter has magnitudes, the model's has none; expected add_lora(..., dora=True)"
            )
        if part.rank > self.rank:
            raise ValueError(f"{address}: the adapter has rank {part.rank}, the model's {self.rank}")
        if self.scale == 0 and part.scale != 0:
            raise ValueError(
                f"{address}: the adapter has scale {part.scale}, and the model's is 0, which nothing makes up for; "
                "expected slots with another scale, as add_lora makes them"
            )
        return part.scaled(self.rank, self.scale)


def check_fit(address: str, part: Lora, shape: tuple[int, ...], divided: tuple[int, int]) -> None:
    """Check that an adapter is one of a weight with so many leading axes and inputs.

    Raises:
        ValueError: it is none, or holds NaN.
    """
    leading, inputs = divided
    try:
        LowRankArray.checked(jax.ShapeDtypeStruct(shape, "float32"), part.a, part.b, part.magnitude, part.scale)
    except ValueError as error:
        raise ValueError(f"{address}: the adapter does not fit the weight {shape}: {error}") from error
    if part.leading != leading or part.a.ndim - 1 - leading != inputs:
        raise ValueError(
            f"{address}: the adapter has a {tuple(part.a.shape)} with {part.leading} leading axes; expected {leading}, "
            f"and {inputs} that a product sums over"
        )
    check_finite(f"{address} of the adapter", part)
