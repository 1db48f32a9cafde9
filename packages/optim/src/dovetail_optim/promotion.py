"""Run optax under jax's standard dtype promotion: its bias correction mixes int32 and float32."""

from typing import Any

import jax
import optax

__all__ = ["with_standard_promotion"]


def with_standard_promotion(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return the same transformation, which also works where ``jax_numpy_dtype_promotion`` is ``"strict"``."""
    inner = optax.with_extra_args_support(transformation)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(inner.init, update)
