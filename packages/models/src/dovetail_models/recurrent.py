"""What recurrent layers share: short causal convolutions in front of the recurrence, each with a state of its own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

__all__ = ["TAPS", "conv_state", "convolved"]

TAPS = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=0)
"""How convolutions ``[channels, width]`` begin, as torch's."""


def conv_state(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the states of convolutions ``[channels, width]``: the inputs before the next one."""
    return {f"conv_{name}": (weight.shape[1] - 1, weight.shape[0]) for name, weight in weights.items()}


def convolved(
    convolve: Callable[..., Any],
    state: Mapping[str, Any],
    inputs: Mapping[str, Any],
    weights: Mapping[str, Any],
    biases: Mapping[str, Any],
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return inputs by name, convolved and through SiLU, and the states after them.

    Args:
        convolve: `dovetail_kernels.causal_conv1d`, or its form for one token.
        state: see `conv_state`.
        inputs: by name, channels last.
        weights: ``[channels, width]`` by name.
        biases: by name, of those that have one.
    """
    outs, after = dict[str, Any](), dict[str, Any]()
    for name, x in inputs.items():
        key = f"conv_{name}"
        outs[name], after[key] = convolve(x, weights[name], biases.get(name), activation="silu", state=state[key])
    return outs, after
