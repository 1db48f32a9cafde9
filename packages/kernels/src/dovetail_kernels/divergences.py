"""Distillation: divergences between a student and its teacher, token by token, without holding all logits of either.

``reference`` holds all logits; ``blocked`` takes chunks of rows and makes the gradient of the summed loss in the same
pass (see `_rows`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from dovetail_kernels._dtypes import exact, int32
from dovetail_kernels._head import check_head, check_rows, check_static, dense, only, weighted
from dovetail_kernels._rows import Head, Job, Layer, Softmax, configs, each, summed
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted
from dovetail_protocols import LowRankArray, QuantizedArray

__all__ = ["DISTILLATION_LOSS", "Teacher", "TopLogprobs", "distillation_loss"]


class Teacher(NamedTuple):
    """A teacher as hidden states and the layer that makes its logits; it has the student's vocabulary.

    Attributes:
        hidden: final hidden states; `features` may differ from the student's.
        weight: unembedding.
        bias: added to the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
    """

    hidden: Float[Array, "tokens teacher_features"]
    weight: Float[Array, "teacher_features vocab"] | QuantizedArray | LowRankArray
    bias: Float[Array, " vocab"] | None = None
    softcap: float | None = None


class TopLogprobs(NamedTuple):
    """A teacher as the log-probabilities of some tokens per row; all other tokens together are one more outcome.

    Attributes:
        logprobs: at the temperature of the call. What they leave of 1 is the mass of the other tokens, and counts as at
            least the resolution of the dtype.
        ids: distinct tokens of a row; one outside the vocabulary makes the loss of its row NaN.
    """

    logprobs: Float[Array, "tokens top"]
    ids: Integer[Array, "tokens top"]


def distillation_loss(
    hidden: Float[Array, "tokens features"],
    weight: Float[Array, "features vocab"] | QuantizedArray | LowRankArray,
    teacher: Teacher | TopLogprobs,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    loss_weights: Float[Array, " tokens"] | Bool[Array, " tokens"] | None = None,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    per_token: bool = False,
    implementation: Wanted = None,
) -> Any:
    r"""Return :math:`\sum_t w_t D(p_t, q_t)` between a teacher's probabilities p and the student's q, in nats.

    D is :math:`KL(p \| q)` for ``beta=0``, the reverse :math:`KL(q \| p)` for ``beta=1``, and in between the
    generalized Jensen-Shannon divergence :math:`\beta KL(p \| m) + (1 - \beta) KL(q \| m)` with
    :math:`m = \beta p + (1 - \beta) q` (Agarwal et al., arXiv:2306.13649). Gradients reach the student's `hidden`,
    `weight` and `bias` only. The loss is not multiplied by the square of the temperature.

    Args:
        hidden: the student's final hidden states.
        weight: its unembedding; a QuantizedArray is used dequantized and gets no gradient; a LowRankArray is
            added up, and the gradient of the whole is made on the way to its parts.
        teacher: hidden states and weights, or the log-probabilities of the likeliest tokens.
        beta: which divergence, in [0, 1].
        temperature: divides the logits of both.
        loss_weights: default 1 for every row; booleans are a mask. A row of weight 0 may hold anything.
        bias: added to the student's logits.
        softcap: the student's logits become ``softcap * tanh(logits / softcap)``, before the temperature.
        per_token: return the loss of every row, times its weight, in place of the sum.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, or a number out of its range.
        TypeError: hidden states that are not floats, ids that are not integers, an unknown kind of teacher.

    >>> h, w = jnp.ones((3, 2)), jnp.arange(16.0).reshape(2, 8)
    >>> float(distillation_loss(h, w, Teacher(h, w)))
    0.0
    """
    check_head(hidden, weight, bias, softcap)
    check_rows(hidden, loss_weights=loss_weights)
    _check_teacher(hidden, weight, teacher)
    check_static("beta", beta)
    check_static("temperature", temperature)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}; expected a number from 0 to 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; expected a finite positive number")
    weights = None if loss_weights is None else jax.lax.stop_gradient(loss_weights.astype(exact(hidden.dtype)))
    teacher = _constant(teacher, None if weights is None else weights != 0)
    if weights is not None:
        hidden = only(weights != 0, hidden)
    if hidden.shape[0] == 0:
        return jnp.zeros((0,) if per_token else (), exact(hidden.dtype))
    return DISTILLATION_LOSS(
        implementation,
        hidden=hidden,
        weight=dense(weight),
        teacher=teacher,
        beta=float(beta),
        temperature=float(temperature),
        loss_weights=weights,
        bias=bias,
        softcap=softcap,
        per_token=per_token,
    )


def _check_teacher(hidden: Any, weight: Any, teacher: Any) -> None:
    if isinstance(teacher, Teacher):
        check_head(*teacher)
        if teacher.hidden.shape[0] != hidden.shape[0] or teacher.weight.shape[1] != weight.shape[1]:
            raise ValueError(
                f"teacher hidden {teacher.hidden.shape}, weight {teacher.weight.shape}; "
                f"expected {hidden.shape[0]} tokens and a vocabulary of {weight.shape[1]}, as the student"
            )
    elif isinstance(teacher, TopLogprobs):
        shapes = f"teacher logprobs {teacher.logprobs.shape}, ids {teacher.ids.shape}"
        if teacher.ids.ndim != 2 or teacher.ids.shape != teacher.logprobs.shape or len(teacher.ids) != len(hidden):
            raise ValueError(f"{shapes}; expected both [{hidden.shape[0]}, top]")
        if not 0 < teacher.ids.shape[1] <= weight.shape[1]:
            raise ValueError(f"{shapes}; expected from 1 to {weight.shape[1]} tokens per row")
        if not jnp.issubdtype(teacher.ids.dtype, jnp.integer):
            raise TypeError(f"teacher ids have dtype {teacher.ids.dtype}; expected integers")
    else:
        raise TypeError(f"teacher is {type(teacher).__name__}; expected Teacher or TopLogprobs")


def _constant(teacher: Any, live: jax.Array | None) -> Any:
    """Return a teacher without gradients, with nothing in the rows that do not count."""
    if isinstance(teacher, TopLogprobs):
        logprobs, ids = jax.lax.stop_gradient(teacher.logprobs), int32(teacher.ids)
        if live is None:
            return TopLogprobs(logprobs, ids)
        distinct = jnp.arange(ids.shape[1], dtype=jnp.int32)
        return TopLogprobs(only(live, logprobs), jnp.where(live[:, None], ids, distinct))
    hidden, weight, bias = jax.lax.stop_gradient((teacher.hidden, dense(teacher.weight), teacher.bias))
    return Teacher(hidden if live is None else only(live, hidden), weight, bias, teacher.softcap)


def _divergence(beta: float, p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return D per row and its gradient of the student's logits, from log-probabilities ``[rows, outcomes]``."""
    in_p, in_q = jnp.exp(p), jnp.exp(q)
    if beta == 0:
        return _kl(in_p, p, q), in_q - in_p
    middle = p if beta == 1 else jnp.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    share = 1.0 if beta == 1 else 1 - beta
    above = jnp.where(in_q > 0, q - middle, 0)
    mean = jnp.sum(in_q * above, 1)
    gradient = share * in_q * (above - mean[:, None])
    return share * mean + (0 if beta == 1 else beta * _kl(in_p, p, middle)), gradient


def _kl(in_p: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    there = in_p > 0
    return jnp.sum(jnp.where(there, in_p * jnp.where(there, p - q, 0), 0), 1)


@dataclasses.dataclass(frozen=True)
class _Full:
    """Divergence from a teacher's hidden states."""

    beta: float
    layer: Layer

    def __call__(self, logits: jax.Array, hidden: jax.Array, fixed: Head, /) -> Any:
        theirs = self.layer.logits(hidden, fixed).astype(logits.dtype)
        p, q = theirs - Softmax.of(theirs).lse[:, None], logits - Softmax.of(logits).lse[:, None]
        loss, gradient = _divergence(self.beta, p, q)
        return (loss,), lambda cotangent: gradient * cotangent[:, None]


@dataclasses.dataclass(frozen=True)
class _Top:
    """Divergence from a teacher's log-probabilities of some tokens."""

    beta: float

    def __call__(self, logits: jax.Array, top: TopLogprobs, fixed: None, /) -> Any:
        del fixed
        p, at, known = _outcomes(top, logits)
        rest = logits.at[at].set(-jnp.inf)
        other = _log_sum(rest)
        chosen = jnp.concatenate([logits[at], other[:, None]], 1)
        loss, gradient = _divergence(self.beta, p, chosen - _log_sum(chosen)[:, None])

        def pull(cotangent: jax.Array) -> jax.Array:
            scaled = gradient * jnp.where(known, cotangent, jnp.nan)[:, None]
            share = jnp.exp(rest - jnp.where(jnp.isneginf(other), 0, other)[:, None])
            return (share * scaled[:, -1:]).at[at].set(scaled[:, :-1])

        return (jnp.where(known, loss, jnp.nan),), pull


def _outcomes(top: TopLogprobs, logits: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
    """Return the teacher's log-probabilities with that of all others last, where they sit, and whether all exist."""
    logprobs = top.logprobs.astype(logits.dtype)
    left = 1 - jnp.sum(jnp.exp(logprobs), 1, keepdims=True)
    least = jnp.finfo(logits.dtype).eps / 2
    everything = top.ids.shape[1] == logits.shape[1]
    tail = jnp.full_like(left, -jnp.inf) if everything else jnp.log(jnp.maximum(left, least))
    known = jnp.all((top.ids >= 0) & (top.ids < logits.shape[1]), 1)
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    return jnp.concatenate([logprobs, tail], 1), (row, top.ids), known


def _log_sum(x: jax.Array) -> jax.Array:
    peak = jnp.max(x, 1)
    safe = jnp.where(jnp.isneginf(peak), 0, peak)
    return jnp.where(jnp.isneginf(peak), -jnp.inf, safe + jnp.log(jnp.sum(jnp.exp(x - safe[:, None]), 1)))


def _blocked(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    teacher: Teacher | TopLogprobs,
    beta: float,
    temperature: float,
    loss_weights: jax.Array | None,
    bias: jax.Array | None,
    softcap: float | None,
    per_token: bool,
    chunk: int | None = None,
    bands: int | None = None,
) -> jax.Array:
    if isinstance(teacher, TopLogprobs):
        function, rows, fixed = _Top(beta), teacher, None
    else:
        function = _Full(beta, Layer(teacher.softcap, temperature))
        rows, fixed = teacher.hidden, Head(teacher.weight, teacher.bias)
    job, head = Job(Layer(softcap, temperature), function, chunk, bands), Head(weight, bias)
    if not per_token:
        return summed(job, hidden, head, rows, fixed, loss_weights)[0]
    return weighted(each(job, hidden, head, rows, fixed)[0], loss_weights)


def _reference(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    teacher: Teacher | TopLogprobs,
    beta: float,
    temperature: float,
    loss_weights: jax.Array | None,
    bias: jax.Array | None,
    softcap: float | None,
    per_token: bool,
) -> jax.Array:
    q = jax.nn.log_softmax(Layer(softcap, temperature).logits(hidden, Head(weight, bias)))
    if isinstance(teacher, TopLogprobs):
        p, at, known = _outcomes(teacher, q)
        other = jax.nn.logsumexp(q, 1, where=~jnp.zeros(q.shape, bool).at[at].set(True))
        q = jnp.where(known[:, None], jnp.concatenate([q[at], other[:, None]], 1), jnp.nan)
    else:
        layer, head = Layer(teacher.softcap, temperature), Head(teacher.weight, teacher.bias)
        p = jax.nn.log_softmax(layer.logits(teacher.hidden, head)).astype(q.dtype)
    in_p, in_q = jnp.exp(p), jnp.exp(q)
    if beta in (0, 1):
        loss = _kl(in_p, p, q) if beta == 0 else _kl(in_q, q, p)
    else:
        mass = beta * in_p + (1 - beta) * in_q
        middle = jnp.log(jnp.where(mass > 0, mass, 1))
        loss = beta * _kl(in_p, p, middle) + (1 - beta) * _kl(in_q, q, middle)
    loss = weighted(loss, loss_weights)
    return loss if per_token else jnp.sum(loss)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    hidden, weight, teacher = (call.arguments[name] for name in ("hidden", "weight", "teacher"))
    exactly = {
        "dtype": str(hidden.dtype),
        "features": hidden.shape[1],
        "teacher": "top" if isinstance(teacher, TopLogprobs) else teacher.hidden.shape[1],
        "per_token": call.arguments["per_token"],
    }
    return exactly, {"tokens": hidden.shape[0], "vocab": weight.shape[1]}


DISTILLATION_LOSS = Operation(
    "distillation_loss",
    (
        Implementation("blocked", _blocked, configs=configs, gradient="first order, reverse mode"),
        Implementation("reference", _reference),
    ),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 2e-2 in bfloat16",
    key=_key,
    outcome=lambda given, axes: PartitionSpec(*axes["hidden"][: int(given["per_token"])]),
)
