"""The tensors of an adapter of `peft` as adapters of our weights."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from dovetail_models.adapter import Lora
from dovetail_models.peft_config import CONFIG, PeftConfig
from dovetail_models.peft_coverage import check_complete, check_names
from dovetail_models.peft_targets import Part, Target
from dovetail_models.peft_writing import UNTIED, nesting, tied_head
from dovetail_weights.errors import nearest

__all__ = ["PeftConfig", "read_adapter"]

NAME = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?:embedding_)?(?P<part>[AB])(?:\.weight)?|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?)"
)


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """What a module's adapter has there: ``A [rank, columns]``, ``B [rows, rank]``, and a magnitude for each row."""

    a: Shaped[np.ndarray, "..."]
    b: Shaped[np.ndarray, "..."]
    magnitude: Shaped[np.ndarray, "..."] | None


def read_adapter(
    tensors: Mapping[str, Any], config: PeftConfig, targets: Sequence[Target], model_config: Any
) -> dict[str, Lora]:
    """Return the adapters by address; see `dovetail_models.load_lora`."""
    found = _modules(tensors)
    named = {target.module: tied_head(target.parts[0].address, model_config) for target in targets}
    heads = {module: head for module, head in named.items() if head is not None}
    _check_known(found, targets, heads.values())
    check_names(config, targets, heads.values())
    modules = _without_head(found, config, targets, model_config)
    flat: dict[str, Lora] = {}
    for name, parts in modules.items():
        target = _target(name, modules, config, targets)
        flat |= _parts(parts, config, target)
    check_complete({name.replace(".base_layer", "") for name in found}, config, targets, heads)
    return flat


def _check_known(modules: Collection[str], targets: Sequence[Target], heads: Collection[str]) -> None:
    if not modules:
        raise ValueError("the adapter has no tensors; expected some named lora_A and lora_B")
    known = {target.module for target in targets} | set(heads)
    for name in modules:
        if name.replace(".base_layer", "") not in known:
            near = nearest(name, sorted(known))
            raise ValueError(f"{name}: the adapter changes it, the model has no such weight; the nearest are: {near}")


def _modules(tensors: Mapping[str, Any]) -> dict[str, _Tensors]:
    found: dict[str, dict[str, Any]] = {}
    for name, lazy in tensors.items():
        match = NAME.fullmatch(name)
        if match is None and name.endswith(".base_layer.weight"):  # a copy of the base's
            continue
        if match is None:
            raise ValueError(
                f"tensor {name!r} is none of LoRA or DoRA; expected lora_A, lora_B, or magnitudes of modules"
            )
        found.setdefault(match["module"], {})[match["part"] or "magnitude"] = np.array(lazy.read())
    for module, parts in found.items():
        if not {"A", "B"} <= parts.keys():
            raise ValueError(f"{module}: the adapter has {sorted(parts)} of it; expected A and B")
    return {name: _Tensors(parts["A"], parts["B"], parts.get("magnitude")) for name, parts in found.items()}


def _without_head(
    modules: dict[str, _Tensors], config: PeftConfig, targets: Sequence[Target], model_config: Any
) -> dict[str, _Tensors]:
    """Take out the adapter of an unembedding that is the embedding, whose own it must be."""
    for target in targets:
        address = target.parts[0].address
        head = tied_head(address, model_config)
        if head is None or (target.module not in modules and head not in modules):
            continue
        one, other = modules.get(target.module), modules.get(head)
        same = one and other and np.array_equal(one.a, other.b.T) and np.array_equal(one.b, other.a.T)
        if one is None or (other is None and not config.tied) or (other is not None and not same):
            raise ValueError(
                f"{address}: {target.module} and {head} are one weight, and the adapter changes them apart; {UNTIED}"
            )
        if other is not None and config.scale(target.module, one.a.shape[0]) != config.scale(head, other.a.shape[0]):
            raise ValueError(f"{address}: {target.module} and {head} are one weight, but their adapters' scales differ")
        if one.magnitude is not None:
            raise ValueError(
                f"{address}: {target.module} and {head} are one weight; magnitudes are of one use; {UNTIED}"
            )
        return {name: found for name, found in modules.items() if name != head}
    return modules


def _target(name: str, modules: Mapping[str, Any], config: PeftConfig, targets: Sequence[Target]) -> Target:
    bare = name.replace(".base_layer", "")
    here = [target for target in targets if target.module == bare]
    if here[0].parameter is None:
        if not config.adapts(bare):
            raise ValueError(f"{bare}: there are tensors for it, but {CONFIG} does not name it in target_modules")
        return here[0]
    adapted = [t for t in here if config.adapts_parameter(t.name)]
    nested = sum(other.replace(".base_layer", "") == bare for other in modules)
    if len(adapted) != nested:
        raise ValueError(f"{bare}: {nested} of its parameters have tensors, but target_parameters names {len(adapted)}")
    return sorted(adapted, key=nesting)[nested - 1 - name.count(".base_layer")]


def _parts(found: _Tensors, config: PeftConfig, target: Target) -> dict[str, Lora]:
    count = max(target.experts, 1)
    rank = found.a.shape[0] // count
    expected = (rank * count, target.columns), (target.rows, rank * count)
    if (found.a.shape, found.b.shape) != expected or rank < 1:
        raise ValueError(
            f"{target.parts[0].address}: the adapter of {target.name} has A {found.a.shape} and B {found.b.shape}; "
            f"expected {expected[0]} and {expected[1]}: is it for another base?"
        )
    if (found.magnitude is not None) != config.dora or (config.dora and found.magnitude.shape != (target.rows,)):  # pyright: ignore
        shape = None if found.magnitude is None else found.magnitude.shape
        raise ValueError(
            f"{target.name}: magnitudes {shape} with use_dora={config.dora}; expected ({target.rows},) or none"
        )
    scale = config.scale(target.name, rank)
    return {part.address: _part(found, part, target, rank, scale) for part in target.parts}


def _part(found: _Tensors, part: Part, target: Target, rank: int, scale: float) -> Lora:
    count, leading = max(target.experts, 1), int(target.experts > 0)
    a = found.a.reshape(count, rank, -1)[:, :, part.columns].swapaxes(1, 2)
    b = found.b.reshape(-1, rank, count).transpose(2, 1, 0)[:, :, part.rows]
    first = (count,) if leading else ()
    magnitude = None if found.magnitude is None else jnp.asarray(found.magnitude[part.rows].reshape(part.outputs))
    return Lora(
        jnp.asarray(a.reshape(*first, *part.inputs, rank)),
        jnp.asarray(b.reshape(*first, rank, *part.outputs)),
        magnitude,
        scale,
        leading,
    )
