"""AdamW with the usual wiring of a language-model run: clipping, a decay mask and groups, in one call."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dovetail_optim.groups import GroupOptions
from dovetail_optim.promotion import with_standard_promotion
from dovetail_protocols import paths

__all__ = ["adamw", "decay_matrices"]


def decay_matrices(params: Any) -> Any:
    """Return a mask that is True for parameters of two and more dimensions: `adamw`'s default for weight decay.

    It goes by the rank alone: embeddings decay, biases and norm weights do not. Where layers are stacked along a
    leading axis, a norm's weight has two dimensions: give patterns there.

    >>> import jax.numpy as jnp
    >>> decay_matrices({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def adamw(
    learning_rate: float | Callable[[Any], Any],
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: str | Iterable[str] | Callable[[Any], Any] = decay_matrices,
    clip_norm: float | None = None,
    groups: Mapping[str, float | GroupOptions] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW: exactly ``optax.chain(clip_by_global_norm(clip_norm), optax.adamw(..., mask=decay))``.

    The defaults of `b2` and `weight_decay` are those of language-model pre-training. Decay is decoupled and goes with
    the learning rate: ``p -= lr (m / (sqrt(v) + eps) + weight_decay p)``, with bias-corrected m and v (Loshchilov and
    Hutter, "Decoupled Weight Decay Regularization", 2019).

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: its strength.
        decay: what decays: address patterns, or a function from the parameters to a mask; matrices by default.
        clip_norm: scales gradients down to this global norm; None does not.
        groups: ``{pattern: factor}`` on the learning rate, or ``{pattern: GroupOptions}``; the first match wins, the
            rest keeps the general settings.

    Raises:
        ValueError: a number is out of range.
        PatternError: at ``init``: a pattern matches nothing; lists the nearest addresses.

    >>> import jax.numpy as jnp
    >>> tx = adamw(1e-3, clip_norm=1.0, decay="**/kernel", groups={"embed/**": 0.1})
    >>> params = {"embed": {"kernel": jnp.ones((4, 2))}, "out": {"kernel": jnp.ones((2, 2))}}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> [round(float(u["kernel"][0, 0]), 6) for u in (updates["embed"], updates["out"])]
    [-0.00011, -0.0011]
    """
    _check(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm)
    options = {pattern: _options(value) for pattern, value in (groups or {}).items()}
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parts += [optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, _mask(decay, options))]
    if options:
        parts.append(_scale_groups({pattern: option.learning_rate for pattern, option in options.items()}))
    return with_standard_promotion(optax.chain(*parts, optax.scale_by_learning_rate(learning_rate)))


def _options(value: float | GroupOptions) -> GroupOptions:
    return value if isinstance(value, GroupOptions) else GroupOptions(value)


def _mask(decay: Any, options: Mapping[str, GroupOptions]) -> Callable[[Any], Any]:
    forced = {pattern: option.weight_decay for pattern, option in options.items()}

    def mask(params: Any) -> Any:
        general = decay(params) if callable(decay) else paths.mask(params, decay)
        if not forced:
            return general
        # A tree cannot hold None as a leaf: 0 and 1 force, -1 leaves the decision to the general rule.
        codes = {pattern: -1 if wanted is None else int(wanted) for pattern, wanted in forced.items()}
        return jax.tree.map(
            lambda code, rule: rule if code < 0 else code == 1, _first_match(params, codes, -1), general
        )

    return mask


def _first_match(params: Any, values: Mapping[str, Any], default: Any) -> Any:
    return paths.assign(params, values if "**" in values else {**values, "**": default})


def _scale_groups(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        _first_match(params, factors, 1.0)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        chosen = _first_match(updates, factors, 1.0)
        return jax.tree.map(lambda u, factor: u if factor == 1 else u * factor, updates, chosen), state

    return optax.GradientTransformation(init, update)


def _check(learning_rate: Any, **numbers: float | None) -> None:
    limits = {
        "b1": (0, 1),
        "b2": (0, 1),
        "eps": (0, math.inf),
        "weight_decay": (0, math.inf),
        "clip_norm": (0, math.inf),
    }
    for name, value in numbers.items():
        low, high = limits[name]
        if value is not None and not (low <= value < high):
            raise ValueError(f"adamw({name}={value}); expected {low} <= {name} < {high}")
    if numbers["clip_norm"] == 0:
        raise ValueError("adamw(clip_norm=0) would drop every gradient; give a positive norm, or None for no clipping")
    if not callable(learning_rate) and not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ValueError(f"adamw(learning_rate={learning_rate}); give a finite rate of at least 0, or a schedule")
