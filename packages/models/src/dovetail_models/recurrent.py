"""What recurrent layers share: projections, short causal convolutions, the recurrence, a gated norm, the output."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dovetail_kernels import causal_conv1d, causal_conv1d_step, einsum
from dovetail_models.layers import Tables
from dovetail_protocols import LayerIndex, RecurrentCache
from dovetail_runtime import constrain

__all__ = ["TAPS", "ConvolvedRecurrence", "RecurrentLayer", "conv_state", "convolved"]

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


class ConvolvedRecurrence:
    """A `dovetail_protocols.Recurrence` behind convolutions.

    Attributes:
        forms: of what follows them, for chunks and for single tokens.
    """

    forms: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]

    def chunk(
        self,
        state: Mapping[str, Any],
        inputs: tuple[Float[Array, "rows time _"], ...],
        segment_ids: Int[Array, "rows time"] | None,
    ) -> tuple[Float[Array, "rows time _"], Mapping[str, Any]]:
        """See `dovetail_protocols.Recurrence`."""
        forms = (functools.partial(form, segment_ids=segment_ids) for form in (causal_conv1d, self.forms[0]))
        return self.run(state, inputs, *forms)

    def step(
        self, state: Mapping[str, Any], inputs: tuple[Float[Array, "rows _"], ...]
    ) -> tuple[Float[Array, "rows _"], Mapping[str, Any]]:
        """See `dovetail_protocols.Recurrence`."""
        return self.run(state, inputs, causal_conv1d_step, self.forms[1])

    def run(
        self, state: Mapping[str, Any], inputs: tuple[Any, ...], convolve: Callable[..., Any], form: Callable[..., Any]
    ) -> tuple[jax.Array, Mapping[str, Any]]:
        """Return outputs and the state after them.

        Args:
            state: before the inputs.
            inputs: see the recurrence.
            convolve: see `convolved`.
            form: one of `forms`.
        """
        raise NotImplementedError


class RecurrentLayer(nnx.Module):
    """Projections around a recurrence, with a norm and a gate behind it; the mixer runs it.

    Attributes:
        inputs: the projections that the recurrence takes, and which of `ACTIVATIONS` each is; None for a small one.
        out: weights of the output, ``[inner, features]``.
        bias: of the output.
    """

    rotary = None
    bias = False
    inputs: ClassVar[Mapping[str, str | None]]
    out: nnx.Param[Any]
    out_bias: nnx.Param[Any]

    def __call__(
        self, layer: LayerIndex, x: Float[Array, "tokens features"], tables: Tables, mixer: Any
    ) -> tuple[Any, Any]:
        """Return the output ``[tokens, features]`` and the mixer."""
        del tables
        given = [self.project(name, x) for name in self.inputs]
        named = (
            y if name is None else checkpoint_name(y, name) for y, name in zip(given, self.inputs.values(), strict=True)
        )
        mixed, mixer = mixer.recur(layer, self.recurrence(), tuple(named))
        mixed = constrain(self.gate(mixed, self.project("gate", x)), "tokens", "heads")
        y = einsum("ti,id->td", checkpoint_name(mixed, "attention"), self.out.get_value())
        return (y + self.out_bias.get_value().astype(y.dtype) if self.bias else y), mixer

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """Return one of the `inputs`, or ``gate``."""
        raise NotImplementedError

    def gate(self, mixed: jax.Array, gate: jax.Array) -> jax.Array:
        """Return what the recurrence gave, normalised and gated."""
        raise NotImplementedError

    def recurrence(self) -> Any:
        """Return what the mixer runs."""
        raise NotImplementedError

    def cache_spec(self) -> RecurrentCache:
        """Return what the mixer must remember."""
        return self.recurrence().cache_spec()
