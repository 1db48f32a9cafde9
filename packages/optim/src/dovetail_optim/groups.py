"""Parameter groups by address pattern: one optax transformation per group, or one with different options."""

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import optax

from dovetail_optim.promotion import with_standard_promotion
from dovetail_protocols import paths

__all__ = ["GroupOptions", "group"]


@dataclass(frozen=True)
class GroupOptions:
    """What is different for a group of parameters.

    Attributes:
        learning_rate: a factor on the learning rate (weight decay, which goes with the rate, included).
        weight_decay: True or False; None follows the optimizer's general rule.

    Raises:
        ValueError: the factor is negative or not finite.
    """

    learning_rate: float = 1.0
    weight_decay: bool | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise ValueError(f"learning_rate={self.learning_rate}; a group's factor is finite and at least 0")


def group(
    params: Any,
    groups: Mapping[str, optax.GradientTransformation | GroupOptions | None],
    *,
    optimizer: Callable[[GroupOptions], optax.GradientTransformation] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that treats each group of parameters with its own.

    Args:
        params: the parameters, or any tree of their structure (``jax.ShapeDtypeStruct`` leaves will do).
        groups: ``{pattern: transformation}`` over addresses; the first match wins and every parameter must match one
            (end with ``"**"``). None freezes a group: no update and no state. `GroupOptions` go through `optimizer`.
        optimizer: makes a transformation from `GroupOptions`.

    Returns:
        A transformation whose state is a plain pytree, ``inner_states`` with a key per group in the given order.

    Raises:
        PatternError: a pattern matches nothing, or a parameter is matched by no pattern.
        ValueError: a pattern is always hidden by earlier ones.
        TypeError: a value is none of these, or `GroupOptions` come without `optimizer`.

    >>> import jax.numpy as jnp, optax
    >>> params = {"embedding": jnp.ones((4, 2)), "out": jnp.ones((2, 4))}
    >>> tx = group(params, {"embedding": optax.sgd(1.0), "**": optax.adam(1e-3)})
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> float(updates["embedding"][0, 0])
    -1.0
    """
    names = {pattern: f"group_{i:02}" for i, pattern in enumerate(groups)}
    labels = paths.assign(params, names)
    used = set(paths.flatten(labels).values())
    for pattern, name in names.items():
        if name not in used:
            earlier = list(names)[: list(names).index(pattern)]
            raise ValueError(f"the pattern {pattern!r} never comes first: {earlier} match all that it does; reorder")
    members: dict[Hashable, optax.GradientTransformation] = {
        names[pattern]: _transformation(pattern, value, optimizer) for pattern, value in groups.items()
    }
    return with_standard_promotion(optax.partition(members, labels))


def _transformation(
    pattern: str, value: Any, optimizer: Callable[[GroupOptions], optax.GradientTransformation] | None
) -> optax.GradientTransformation:
    if value is None:
        return optax.set_to_zero()
    if isinstance(value, GroupOptions):
        if optimizer is None:
            raise TypeError(
                f"group {pattern!r} has GroupOptions; pass optimizer=, which makes a transformation of them"
            )
        return optimizer(value)
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(f"group {pattern!r} is {value!r}; expected an optax transformation, GroupOptions or None")
    return value
