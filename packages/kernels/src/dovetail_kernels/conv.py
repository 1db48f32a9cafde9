"""Causal depthwise convolution over a short window, as in front of Mamba-2 and Gated DeltaNet: a sequence, or a token.

One sum of shifted products, which XLA fuses into a single pass: there is nothing to block.
"""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dovetail_kernels import _recurrent
from dovetail_kernels._dtypes import exact
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted

__all__ = ["CAUSAL_CONV1D", "ConvActivation", "causal_conv1d", "causal_conv1d_step"]

ConvActivation: TypeAlias = Literal["silu"] | None
"""What follows the convolution."""

ACTIVATIONS = {None: lambda x: x, "silu": jax.nn.silu}


def causal_conv1d(
    x: Float[Array, "batch time channels"],
    weight: Float[Array, "channels width"],
    bias: Float[Array, " channels"] | None = None,
    *,
    activation: ConvActivation = None,
    state: Float[Array, "batch before channels"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: Wanted = None,
) -> tuple[Float[Array, "batch time channels"], Float[Array, "batch before channels"]]:
    r"""Convolve every channel with its own taps, each token with itself and the ``width - 1`` tokens before it.

    .. math:: y_t = act(bias + \sum_{i=0}^{width-1} weight_i \, x_{t - width + 1 + i})

    The result has the dtype of `x`; sums are float32 (float64 for float64). A sequence may be split anywhere: the state
    that one call returns is the next call's `state`, and `causal_conv1d_step` continues it token by token.

    Args:
        x: inputs.
        weight: taps; the last one is the token's own, as in torch's ``Conv1d`` with its middle axis removed.
        bias: added to the sum.
        activation: applied to the sum.
        state: the ``width - 1`` inputs before the first, oldest first; None is zeros. They belong to the first segment.
        segment_ids: packed segments: nothing is read from another one. Tokens of segment 0 are padding: others see
            past them, they leave the state as it is and give 0.
        implementation: a name, an own implementation, or several in order; None chooses.

    Returns:
        The outputs, and the state after the last token in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit, an unknown activation or implementation.
        TypeError: operands that are not floats, segment ids that are not integers.

    >>> out, state = causal_conv1d(jnp.arange(4.0).reshape(1, 4, 1), jnp.array([[10.0, 1.0]]))
    >>> out[0, :, 0], state[0, :, 0]
    (Array([ 0.,  1., 12., 23.], dtype=float32), Array([3.], dtype=float32))
    """
    _check(x, weight, bias, state, activation)
    (batch, time, channels), before = x.shape, weight.shape[1] - 1
    _recurrent.check_segments(segment_ids, (batch, time))
    state = _recurrent.initial(state, (batch, before, channels), x.dtype)
    if 0 in x.shape:
        return x, state
    return CAUSAL_CONV1D(
        implementation,
        x=x,
        weight=weight,
        bias=bias,
        activation=activation,
        state=state,
        segment_ids=segment_ids,
    )


def causal_conv1d_step(
    x: Float[Array, "batch channels"],
    weight: Float[Array, "channels width"],
    bias: Float[Array, " channels"] | None = None,
    *,
    state: Float[Array, "batch before channels"],
    activation: ConvActivation = None,
) -> tuple[Float[Array, "batch channels"], Float[Array, "batch before channels"]]:
    """Run `causal_conv1d` for one token per row: the output and the new state.

    Raises:
        ValueError: shapes that do not fit, an unknown activation.
        TypeError: operands that are not floats.

    >>> causal_conv1d_step(jnp.array([[4.0]]), jnp.array([[10.0, 1.0]]), state=jnp.array([[[3.0]]]))[0]
    Array([[34.]], dtype=float32)
    """
    _check(x[:, None], weight, bias, state, activation)
    wide = exact(x.dtype)
    window = jnp.concatenate([state.astype(x.dtype), x[:, None]], axis=1)
    out = jnp.sum(window.astype(wide) * weight.astype(wide).T, axis=1)
    return _finish(out, bias, activation).astype(x.dtype), window[:, 1:]


def _check(x: jax.Array, weight: jax.Array, bias: Any, state: Any, activation: Any) -> None:
    _recurrent.check_floats(x=x, weight=weight, bias=bias, state=state)
    if x.ndim != 3 or weight.ndim != 2 or not weight.shape[1]:
        raise ValueError(
            f"x {x.shape}, weight {weight.shape}; expected [batch, time, channels] and [channels, width >= 1]"
        )
    sizes = dict(zip(("batch", "time", "channels"), x.shape, strict=True))
    sizes |= {"width": weight.shape[1], "width - 1": weight.shape[1] - 1}
    _recurrent.check_shapes(
        sizes,
        weight=(weight, ("channels", "width")),
        bias=(bias, ("channels",)),
        state=(state, ("batch", "width - 1", "channels")),
    )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}; expected one of {list(ACTIVATIONS)}")


def _finish(out: jax.Array, bias: jax.Array | None, activation: ConvActivation) -> jax.Array:
    return ACTIVATIONS[activation](out if bias is None else out + bias.astype(out.dtype))


def _reference(
    *,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    activation: ConvActivation,
    state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    segments = _recurrent.runs(segment_ids)
    if segments is None:
        out, after = _convolve(x, weight, state, None)
        return _finish(out, bias, activation).astype(x.dtype), after
    count = jnp.cumsum(segments.valid, axis=1, dtype=jnp.int32)
    tokens = count[:, -1:]
    place = jnp.where(segments.valid, count, tokens + jnp.cumsum(~segments.valid, axis=1, dtype=jnp.int32)) - 1
    order = jnp.argsort(place, axis=1)[..., None]
    front, index = (jnp.take_along_axis(part, order, axis=1) for part in (x, segments.number[..., None]))
    front = jnp.where(jnp.arange(x.shape[1], dtype=jnp.int32)[:, None] < tokens[..., None], front, 0)
    out, _ = _convolve(front, weight, state, index)
    out = _finish(jnp.take_along_axis(out, place[..., None], axis=1), bias, activation)
    after = _last(jnp.concatenate([state, front], axis=1), index, tokens, state.shape[1])
    return jnp.where(segments.valid[..., None], out, 0).astype(x.dtype), after


def _convolve(
    x: jax.Array, weight: jax.Array, state: jax.Array, index: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return sums of shifted products and the last inputs; ``index[batch, time, 1]`` tells runs apart."""
    wide, time, width = exact(x.dtype), x.shape[1], weight.shape[1]
    weight, every = weight.astype(wide), jnp.concatenate([state, x], axis=1)
    runs = None if index is None else jnp.pad(index, ((0, 0), (width - 1, 0), (0, 0)))
    out = jnp.zeros((), wide)
    for tap in range(width):
        part = every[:, tap : tap + time].astype(wide)
        if index is not None and runs is not None:
            part = jnp.where(runs[:, tap : tap + time] == index, part, 0)
        out = out + part * weight[:, tap]
    return out, every[:, time:]


def _last(every: jax.Array, index: jax.Array, tokens: jax.Array, before: int) -> jax.Array:
    """Return the `before` inputs up to the last token, zeros in place of those of earlier runs."""
    if not before:
        return every[:, :0]
    runs = jnp.pad(index, ((0, 0), (before, 0), (0, 0)))
    places = (tokens + jnp.arange(before, dtype=jnp.int32))[..., None]
    last = jnp.take_along_axis(runs, (tokens + before - 1)[..., None], axis=1)
    kept = jnp.take_along_axis(runs, places, axis=1) == last
    return jnp.where(kept, jnp.take_along_axis(every, places, axis=1), 0)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    x, weight = call.arguments["x"], call.arguments["weight"]
    exactly = {
        "dtype": str(x.dtype),
        "width": weight.shape[1],
        "activation": str(call.arguments["activation"]),
        "segments": call.arguments["segment_ids"] is not None,
    }
    return exactly, {"rows": x.shape[0], "time": x.shape[1], "channels": x.shape[2]}


CAUSAL_CONV1D = Operation(
    "causal_conv1d",
    (Implementation("reference", _reference),),
    accumulation="float32 (float64 for float64)",
    error="1e-6 of the largest value in float32, 1e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: (PartitionSpec(*axes["x"]), PartitionSpec(axes["x"][0], None, axes["x"][2])),
)
