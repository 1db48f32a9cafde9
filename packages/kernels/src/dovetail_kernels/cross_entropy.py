"""Cross-entropy of a linear layer without ever holding all its logits.

Rows are taken in chunks whose logits fit in a few megabytes. When a gradient is asked for, it is computed in the same
pass, while a chunk's logits are at hand: the backward pass only scales it, and nothing is computed twice. (The idea of
Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from dovetail_kernels._manual import alike
from dovetail_protocols import QuantizedArray

__all__ = ["linear_cross_entropy"]

CHUNK_LOGITS = 1 << 22


class _Head(NamedTuple):
    """The differentiable operands besides the hidden states."""

    weight: jax.Array
    bias: jax.Array | None


def linear_cross_entropy(
    hidden: Float[Array, "tokens features"],
    weight: Float[Array, "features vocab"] | QuantizedArray,
    targets: Integer[Array, " tokens"],
    *,
    loss_weights: Float[Array, " tokens"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Float[Array, ""]:
    r"""Return :math:`\sum_t w_t (\log \sum_v e^{z_{tv}} - z_{t y_t})` with logits :math:`z = h W + b`, in float32.

    Gradients (first order, reverse mode) reach `hidden`, `weight` and `bias`; `loss_weights` are data.

    Args:
        hidden: final hidden states.
        weight: unembedding; a QuantizedArray is used dequantized and gets no gradient.
        targets: the right token of each row. One outside ``[0, vocab)`` makes the loss NaN.
        loss_weights: default 1 for every row. A row of weight 0 may hold anything, NaN and wrong targets included.
        bias: added to the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        chunk: rows per chunk; default so that a chunk has at most 4 million logits.

    Raises:
        ValueError: shapes that do not fit, `chunk` below 1, `softcap` not positive.
        TypeError: targets are not integers, or `hidden` not floats.

    >>> h, w = jnp.zeros((3, 2)), jnp.zeros((2, 8))
    >>> round(float(linear_cross_entropy(h, w, jnp.array([0, 1, 7]))) / 3, 4)  # the entropy of 8 equal classes
    2.0794
    """
    _check(hidden, weight, targets, loss_weights, bias)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk}; expected at least one row")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap}; expected a positive number or None")
    rows, vocab = hidden.shape[0], weight.shape[1]
    if loss_weights is None:
        loss_weights = jnp.ones((rows,), jnp.float32)
    if isinstance(weight, QuantizedArray):
        weight = jax.lax.stop_gradient(weight.dequantize())
    if rows == 0:
        return jnp.zeros((), jnp.float32)
    size = min(rows, chunk or max(1, CHUNK_LOGITS // vocab))
    size = -(-rows // -(-rows // size))  # equal chunks, so that little is padded
    *head, hidden, targets, loss_weights = alike(weight, bias, hidden, targets.astype(jnp.int32), loss_weights)
    padded = [_pad(x, -rows % size) for x in (hidden, targets, loss_weights)]
    return _loss(size, softcap, padded[0], _Head(*head), padded[1], padded[2])


def _check(hidden: Any, weight: Any, targets: Any, loss_weights: Any, bias: Any) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[0] or not weight.shape[1]:
        raise ValueError(
            f"hidden {hidden.shape}, weight {weight.shape}; "
            "expected [tokens, features] and [features, vocab] with vocab > 0"
        )
    if not jnp.issubdtype(hidden.dtype, jnp.floating):
        raise TypeError(f"hidden has dtype {hidden.dtype}; expected a float")
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets have dtype {targets.dtype}; expected integers")
    for name, array, shape in (
        ("targets", targets, hidden.shape[:1]),
        ("loss_weights", loss_weights, hidden.shape[:1]),
        ("bias", bias, weight.shape[1:]),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; expected {shape}")


def _pad(x: Any, extra: int) -> jax.Array:
    return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)) if extra else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(size: int, softcap: float | None, hidden: Any, head: _Head, targets: Any, weights: Any) -> jax.Array:
    def add(total: jax.Array, rows: Any) -> tuple[jax.Array, None]:
        return total + _chunk(softcap, _live(rows), head)[0], None

    zero = jnp.zeros_like(weights, jnp.float32, shape=())
    return jax.lax.scan(add, zero, _chunks(size, hidden, targets, weights))[0]


def _forward_rule(size: int, softcap: float | None, hidden: Any, head: _Head, targets: Any, weights: Any) -> Any:
    def add(carry: Any, rows: Any) -> Any:
        total, d_head = carry
        rows = _live(rows)
        loss, d_logits = _chunk(softcap, rows, head)
        d_logits = d_logits.astype(hidden.dtype)
        d_weight = jnp.einsum("td,tv->dv", rows[0], d_logits, preferred_element_type=jnp.float32)
        d_bias = None if head.bias is None else d_head.bias + jnp.sum(d_logits, axis=0, dtype=jnp.float32)
        d_hidden = jnp.einsum("tv,dv->td", d_logits, head.weight.astype(hidden.dtype))
        return (total + loss, _Head(d_head.weight + d_weight, d_bias)), d_hidden

    zero, zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (weights[0], head))
    chunks = _chunks(size, hidden, targets, weights)
    if chunks[0].shape[0] == 1:
        (total, d_head), d_hidden = add((zero, zeros), jax.tree.map(lambda x: x[0], chunks))
        d_hidden = d_hidden[None]
    else:
        (total, d_head), d_hidden = jax.lax.scan(add, (zero, zeros), chunks)
    return total, (
        d_hidden.swapaxes(0, 1).reshape(hidden.shape),
        jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head),
    )


def _backward_rule(size: int, softcap: float | None, saved: Any, d_total: jax.Array) -> tuple[Any, ...]:
    del size, softcap
    d_hidden, d_head = jax.tree.map(lambda g: g * d_total.astype(g.dtype), saved)
    return d_hidden, d_head, None, None


_loss.defvjp(_forward_rule, _backward_rule)


def _chunks(size: int, *rows: jax.Array) -> tuple[jax.Array, ...]:
    """Split rows into ``[chunks, size, ...]``, row i into chunk ``i % chunks``: sharded rows leave no device idle."""
    return tuple(x.reshape(size, -1, *x.shape[1:]).swapaxes(0, 1) for x in rows)


def _live(rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Replace what rows of weight 0 hold, so that not even NaN spreads from them."""
    hidden, targets, weights = rows
    live = weights != 0
    return jnp.where(live[:, None], hidden, jnp.zeros((), hidden.dtype)), jnp.where(live, targets, 0), weights


def _chunk(softcap: float | None, rows: Any, head: _Head) -> tuple[jax.Array, jax.Array]:
    """Return the summed loss of a chunk and its gradient with respect to the linear layer's output."""
    hidden, targets, weights = rows
    raw = jnp.einsum("td,dv->tv", hidden, head.weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if head.bias is not None:
        raw = raw + head.bias.astype(jnp.float32)
    capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
    peak = jnp.max(capped, axis=1, keepdims=True)
    p = jnp.exp(capped - peak)
    total = jnp.sum(p, axis=1, keepdims=True)
    right = jnp.take_along_axis(capped, targets[:, None], axis=1, mode="clip")
    inside = (targets >= 0) & (targets < raw.shape[1])
    scaled = jnp.where(inside, weights.astype(jnp.float32), jnp.nan)[:, None]
    loss = jnp.sum((peak + jnp.log(total) - right) * scaled)
    is_target = targets[:, None] == jnp.arange(raw.shape[1], dtype=targets.dtype)
    gradient = (p / total - is_target.astype(jnp.float32)) * scaled
    if softcap is not None:
        gradient = gradient * (1 - (capped / softcap) ** 2)
    return loss, gradient
