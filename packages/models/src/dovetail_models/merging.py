"""Several models become one: averages, spherical interpolation, and sums of what each learned beside a base."""

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from dovetail_models.layer_lists import parameter_axes
from dovetail_models.lazy_model import LazyModel, lazy, surgery
from dovetail_models.lazy_parts import Array, computing_dtype, finite
from dovetail_models.merge_methods import ELEMENTS, METHODS, Method, Part
from dovetail_models.same_tokens import tokens_that_differ
from dovetail_weights import Lazy, Reshape, Stack, Unstack

__all__ = ["merge_models"]

IRRELEVANT = ("init_std", "max_position")
"""Fields of configurations in which models may differ: they change no number."""

DENSITY = 0.2
SHOWN = 12
"""Differences that a message names."""


def merge_models(
    models: Sequence[Any],
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    base: Any = None,
    density: float | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Any:
    """Return a model of the same sizes whose parameters are made of those of several, one parameter at a time.

    With a base, what is merged are the differences to it, and the result is the base and `scale` times the merged
    difference. Experts are merged one by one.

    - "linear": the weighted average (Wortsman et al., arXiv:2203.05482); with a base the weighted sum of the
      differences (task arithmetic, Ilharco et al., arXiv:2212.04089).
    - "slerp": of two models: along the great circle from the first to the second, by the share of the second weight;
      along the straight line where they are nearly parallel.
    - "ties": of each difference the largest numbers, a share of `density`; of these the weighted mean of those whose
      sign has the larger sum (Yadav et al., arXiv:2306.01708).
    - "dare": of each difference a random share of `density`, divided by that; the weighted sum of these (Yu et al.,
      arXiv:2311.03099).

    Args:
        models: models in memory, of which the first one's options are the result's; or directories or `LazyModel`, and
            the result is a `LazyModel`, see `surgery`.
        method: one of these.
        weights: of the models; None for equal ones that sum to 1. Averages divide by their sum, sums of differences
            do not.
        base: what the models were before they were trained; needed by "ties" and "dare".
        density: which share of a difference stays, for "ties" and "dare"; None for 0.2.
        scale: factor of the merged difference; None for 1.
        seed: of what "dare" keeps.

    Raises:
        TypeError: a model is none.
        ValueError: an unknown method; too few models, or weights; an argument that the method does not use, or out of
            its range; models of different kinds or configurations, or directories whose tokenizers number tokens
            otherwise; what differs is named.
        dovetail_weights.WeightsError: when values are read: some are not finite, or do not fit the dtype.

    >>> from flax import nnx
    >>> from dovetail_models import Llama, LlamaConfig
    >>> config = LlamaConfig(vocab_size=16, features=8, hidden=16, layers=1, heads=2)
    >>> soup = merge_models([Llama(config, rngs=nnx.Rngs(seed)) for seed in (0, 1)], weights=[3.0, 1.0])
    """
    if isinstance(models, str | os.PathLike | nnx.Module | LazyModel) or not models:
        raise ValueError(f"models={models!r:.200}; expected a list of models or directories")
    made = _method(len(models), method, weights, has_base=base is not None, density=density, scale=scale, seed=seed)
    return _merged(models[0], [*models[1:], *([] if base is None else [base])], made)


def _method(
    count: int,
    name: str,
    weights: Sequence[float] | None,
    *,
    has_base: bool,
    density: float | None,
    scale: float | None,
    seed: int,
) -> Method:
    if name not in METHODS:
        raise ValueError(f"method={name!r}; expected one of {list(METHODS)}")
    given = [1 / count] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count or not all(map(math.isfinite, given)):
        raise ValueError(f"weights={given}; expected a finite number for each of {count} models")
    _check_arguments(name, count, given, has_base=has_base, density=density, scale=scale, seed=seed)
    thinned = DENSITY if density is None else density
    return Method(name, tuple(given), has_base, 1.0 if scale is None else scale, thinned, seed)


def _check_arguments(name: str, count: int, weights: Sequence[float], *, has_base: bool, **given: Any) -> None:
    """Refuse what a method does not use, and values out of range."""
    thins = name in ("ties", "dare")
    wrong = {
        f"base is missing; {name} merges differences to it": thins and not has_base,
        "base is given; slerp knows none": name == "slerp" and has_base,
        f"{count} models; slerp takes 2": name == "slerp" and count != 2,
        f"{count} model; expected at least 2, or a base": count < 2 and not has_base,
        f"density={given['density']}; {name} keeps all": given["density"] is not None and not thins,
        f"scale={given['scale']} without a base": given["scale"] is not None and not has_base,
        f"seed={given['seed']}; {name} draws nothing": given["seed"] != 0 and name != "dare",
        f"density={given['density']}; expected above 0 and at most 1": given["density"] is not None
        and not 0 < given["density"] <= 1,
        f"scale={given['scale']}; expected a finite number": not math.isfinite(given["scale"] or 0),
        f"weights={list(weights)}; expected none below 0, and a sum above": name in ("slerp", "ties")
        and (min(weights) < 0 or sum(weights) <= 0),
        f"weights={list(weights)}; expected a sum other than 0": not has_base and sum(weights) == 0,
    }
    found = [message for message, holds in wrong.items() if holds]
    if found:
        raise ValueError(f"method={name!r}: {'; '.join(found)}")


@surgery
def _merged(model: LazyModel, others: Sequence[Any], method: Method) -> LazyModel:
    models = [model, *(lazy(other) for other in others)]
    _check_alike(models, has_base=method.has_base)
    axes = parameter_axes(model)
    tensors: dict[str, Lazy] = {}
    for address, tensor in model.tensors.items():
        given = [other.tensors[address] for other in models]
        if not tensor.shape:
            made = [_parameter(address, Reshape((), (1,)).apply(given), method)]
            tensors[address] = Reshape((1,), ()).apply(made)[0]
        elif axes[address].names[:1] == ("experts",) and len(tensor.shape) > 1:
            each = zip(*(Unstack(tensor.shape[0]).apply([item]) for item in given), strict=True)
            made = [_parameter(f"{address}[{i}]", parts, method) for i, parts in enumerate(each)]
            tensors[address] = Stack(len(made)).apply(made)[0]
        else:
            tensors[address] = _parameter(address, given, method)
    return dataclasses.replace(model, tensors=tensors)


def _check_alike(models: Sequence[LazyModel], *, has_base: bool) -> None:
    first, differ = models[0], list[str]()
    for place, other in enumerate(models[1:], 1):
        if type(other.config) is not type(first.config):
            differ.append(f"{type(first.config).__name__} (0), {type(other.config).__name__} ({place})")
            continue
        for field in dataclasses.fields(first.config):
            a, b = getattr(first.config, field.name), getattr(other.config, field.name)
            if a != b and field.name not in IRRELEVANT:
                differ.append(f"{field.name}={a!r} (0), {field.name}={b!r} ({place})")
        for address in {**first.tensors, **other.tensors}:
            a, b = (x.tensors[address].shape if address in x.tensors else None for x in (first, other))
            if a != b:
                differ.append(f"{address}: {a} (0), {b} ({place})")
        differ += tokens_that_differ(place, first.files, other.files)
    if differ:
        base = " (of which the base is the last one)" if has_base else ""
        more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
        raise ValueError(f"the models{base} differ: {'; '.join(differ[:SHOWN])}{more}")


def _parameter(address: str, tensors: Sequence[Lazy], method: Method) -> Lazy:
    dtype, first = computing_dtype(tensors[0]), tensors[0]

    def read_one(place: int, index: Any) -> Array:
        return finite(f"{address} of model {place}", tensors[place].read(index)).astype(dtype)

    @functools.cache
    def whole() -> Any:
        return method.whole([functools.partial(read_one, place, ()) for place in range(len(tensors))])

    def read(index: Any) -> Array:
        out = np.empty([part.stop - part.start for part in index], first.dtype)
        rows = max(1, ELEMENTS // max(1, math.prod(out.shape[1:])))
        for start in range(0, len(out), rows):
            begin = index[0].start + start
            piece = (slice(begin, min(begin + rows, index[0].stop)), *index[1:])
            parts = [read_one(place, piece) for place in range(len(tensors))]
            out[start : start + rows] = method.combine(parts, Part(address, first.shape, piece, whole()))
        return out

    return Lazy(first.shape, first.dtype, read)
