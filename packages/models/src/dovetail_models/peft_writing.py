"""Adapters of our weights as the tensors of an adapter of `peft`."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from dovetail_models.adapter import Lora
from dovetail_models.peft_config import PeftConfig
from dovetail_models.peft_targets import Part, Target
from dovetail_weights.errors import nearest

__all__ = ["UNTIED", "nesting", "tied_head", "written"]

UNTIED = "untie the base first (tie_word_embeddings false, and a head of its own), or leave the embedding out"

PREFIX, MAGNITUDE = "base_model.model", "lora_magnitude_vector"


Array = Shaped[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class _Made:
    """An adapter of a module or parameter of theirs.

    Attributes:
        target: which it is of; None for an unembedding that is an embedding.
        name: of it.
        a: ``[experts, rank, columns]``, with 1 where there are none.
        b: ``[experts, rows, rank]``.
        magnitude: ``[rows]``.
        scale: of the product.
    """

    target: Target | None
    name: str
    a: Array
    b: Array
    magnitude: Array | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]

    @property
    def alpha(self) -> float:
        return self.scale * self.rank

    @property
    def parameter(self) -> bool:
        """It is no module of its own."""
        return self.target is not None and self.target.parameter is not None

    def padded(self, rank: int, scale: float) -> "_Made":
        """Return the same with another rank and scale."""
        more, b = rank - self.rank, self.b if scale == self.scale else self.b * (self.scale / scale)
        a, b = np.pad(self.a, ((0, 0), (0, more), (0, 0))), np.pad(b, ((0, 0), (0, 0), (0, more)))
        return dataclasses.replace(self, a=a, b=b.astype(self.b.dtype), scale=scale)

    def tensors(self, module: str) -> dict[str, Array]:
        """Return the tensors by name; experts are the outer part of the rank of A, the inner part of that of B."""
        a, b = self.a.reshape(-1, self.a.shape[2]), self.b.transpose(1, 2, 0).reshape(self.b.shape[1], -1)
        table = self.target is not None and self.target.table
        names = ("lora_embedding_A", "lora_embedding_B") if table else ("lora_A.weight", "lora_B.weight")
        found = {f"{PREFIX}.{module}.{name}": tensor for name, tensor in zip(names, (a, b), strict=True)}
        return found if self.magnitude is None else {**found, f"{PREFIX}.{module}.{MAGNITUDE}": self.magnitude}


def tied_head(address: str, config: Any) -> str | None:
    """Return the name of the module that unembeds with an embedding; None where it has a weight of its own."""
    if address == "embedding" and getattr(config, "tied", False):
        return "lm_head"
    return "cls.predictions.decoder" if address == "encoder/embeddings/tokens" else None


def written(
    flat: Mapping[str, Lora], targets: Sequence[Target], names: Sequence[str], config: Any
) -> tuple[dict[str, Array], PeftConfig, bool]:
    """Return tensors by name, the configuration, and whether linear layers are stored with inputs first.

    Args:
        flat: adapters by address.
        targets: all that the model has, see `find_targets`.
        names: of all its tensors in a checkpoint.
        config: the model's.
    """
    _check(flat, targets)
    made = _alike([_made(t, flat) for t in targets if any(part.address in flat for part in t.parts)])
    made += [head for one in made if (head := _head(one, config)) is not None]
    tensors: dict[str, Array] = {}
    for one in made:
        tensors |= one.tensors(one.name if one.target is None else _place(one.target, made))
    linear = [one.target.swapped for one in made if one.target and not one.parameter and not one.target.table]
    return tensors, _config(made, targets, names), bool(linear) and all(linear)


def _check(flat: Mapping[str, Lora], targets: Sequence[Target]) -> None:
    known = {part.address: (part, target) for target in targets for part in target.parts}
    dora = any(lora.magnitude is not None for lora in flat.values())
    for address, lora in flat.items():
        if address not in known:
            near = nearest(address, sorted(known))
            raise ValueError(f"{address}: no module there that peft adapts is this weight; the nearest are: {near}")
        part, target = known[address]
        shape = (*part.inputs, *part.outputs)
        if lora.weight_shape[lora.leading :] != shape or lora.leading != (target.experts > 0):
            raise ValueError(f"{address}: the adapter is of a weight {lora.weight_shape}, the model's is {shape}")
        lacking = [p.address for p in target.parts if p.address not in flat or flat[p.address].magnitude is None]
        if dora and lacking:
            raise ValueError(f"{lacking[0]}: it has no magnitude, others have; peft wants one of all that is adapted")
        if dora and target.parameter is not None:
            raise ValueError(f"{address}: peft has no magnitudes of parameters such as {target.name}")


def _made(target: Target, flat: Mapping[str, Lora]) -> _Made:
    parts = [(part, flat[part.address]) for part in target.parts if part.address in flat]
    scales = {lora.scale for _, lora in parts}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rows = [_rows(target, part, lora.scaled(lora.rank, scale)) for part, lora in parts]
    unlike = list({a.tobytes(): a for a, _ in rows}.values())  # what shares its first array needs it once
    starts = {a.tobytes(): sum(other.shape[1] for other in unlike[:i]) for i, a in enumerate(unlike)}
    a = np.concatenate(unlike, axis=1)
    b = np.zeros((len(a), target.rows, a.shape[1]), rows[0][1].dtype)
    for first, second in rows:
        start = starts[first.tobytes()]
        b[:, :, start : start + second.shape[2]] += second
    return _Made(target, target.name, a, b, _magnitudes(target, parts), scale)


def _rows(target: Target, part: Part, lora: Lora) -> tuple[Array, Array]:
    """Return A and B of one of our weights, in the shape of the whole."""
    count, ours_a, ours_b = max(target.experts, 1), np.asarray(lora.a), np.asarray(lora.b)
    a = np.zeros((count, lora.rank, target.columns), ours_a.dtype)
    a[:, :, part.columns] = ours_a.reshape(count, -1, lora.rank).swapaxes(1, 2)
    b = np.zeros((count, target.rows, lora.rank), ours_b.dtype)
    b[:, part.rows] = ours_b.reshape(count, lora.rank, -1).swapaxes(1, 2)
    return a, b


def _magnitudes(target: Target, parts: Sequence[tuple[Part, Lora]]) -> Array | None:
    if parts[0][1].magnitude is None:
        return None
    whole = np.zeros(target.rows, np.asarray(parts[0][1].magnitude).dtype)
    for part, lora in parts:
        whole[part.rows] = np.asarray(lora.magnitude).reshape(-1)
    return whole


def _alike(made: Sequence[_Made]) -> list[_Made]:
    """Give all parameters one rank and scale: patterns are meant for modules there."""
    some = [one for one in made if one.parameter]
    scales, rank = {one.scale for one in some}, max((one.rank for one in some), default=0)
    scale = scales.pop() if len(scales) == 1 else 1.0
    return [one.padded(rank, scale) if one.parameter else one for one in made]


def _head(made: _Made, config: Any) -> _Made | None:
    """Return the adapter of the unembedding that an embedding is, too."""
    address = made.target.parts[0].address if made.target else ""
    head = tied_head(address, config)
    if head is None:
        return None
    if made.magnitude is not None:
        raise ValueError(f"{address}: it embeds and unembeds, and a magnitude is for one of these; {UNTIED}")
    a, b = made.b.swapaxes(1, 2), made.a.swapaxes(1, 2)
    return dataclasses.replace(made, target=None, name=head, a=a, b=b)


def _place(target: Target, made: Sequence[_Made]) -> str:
    """Return the module's name; of several parameters of one module the first is the innermost."""
    same = [one.target for one in made if one.target is not None and one.target.module == target.module]
    return target.module + ".base_layer" * (len(same) - 1 - sorted(same, key=nesting).index(target))


def nesting(target: Target) -> bool:
    """Order parameters of a module of experts as they stand there."""
    return target.parameter == "down_proj"


def _config(made: Sequence[_Made], targets: Sequence[Target], names: Sequence[str]) -> PeftConfig:
    usual = [one for one in made if one.parameter] or made
    rank, _ = Counter(one.rank for one in usual).most_common(1)[0]
    alpha, _ = Counter(one.alpha for one in usual).most_common(1)[0]
    modules, parameters = ([one.name for one in made if one.parameter == kind] for kind in (False, True))
    every = [*(name.removesuffix(".weight") for name in names), *modules]
    return PeftConfig(
        rank,
        alpha,
        {one.name: one.rank for one in made if one.rank != rank},
        {one.name: one.alpha for one in made if one.alpha != alpha},
        dora=any(one.magnitude is not None for one in made),
        modules=_short(modules, every),
        parameters=_short(parameters, [*names, *(target.name for target in targets)]),
    )


def _short(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """Return the shortest ends of names that fit the chosen ones and no others."""
    others = set(every) - set(chosen)
    ends: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        ends[next(tail for tail in tails if not any(o == tail or o.endswith(f".{tail}") for o in others))] = None
    return sorted(ends)
