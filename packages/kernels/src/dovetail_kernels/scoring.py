"""Log-probabilities and entropies of tokens from hidden states, for scoring and reinforcement learning.

``reference`` holds all logits; ``blocked`` takes chunks of rows, and computes them once more for the gradient.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Integer

from dovetail_kernels._dtypes import exact, int32
from dovetail_kernels._head import check_head, check_rows, check_static, dense, whole_vocabulary
from dovetail_kernels._rows import Head, Job, Layer, Softmax, configs, each, find
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted
from dovetail_protocols import LowRankArray, QuantizedArray

__all__ = ["TOKEN_LOGPROBS", "LogprobsAndEntropy", "token_logprobs"]


class LogprobsAndEntropy(NamedTuple):
    """What a model says about each token, in nats.

    Attributes:
        logprobs: log-probability of the token.
        entropy: of the distribution that it comes from.
    """

    logprobs: Float[Array, " tokens"]
    entropy: Float[Array, " tokens"]


def token_logprobs(
    hidden: Float[Array, "tokens features"],
    weight: Float[Array, "features vocab"] | QuantizedArray | LowRankArray,
    tokens: Integer[Array, " tokens"],
    *,
    temperature: float = 1.0,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    entropy: bool = False,
    vocab_axis: str | None = None,
    implementation: Wanted = None,
) -> Any:
    """Return the log-probability of each token under ``softmax((hidden @ weight + bias) / temperature)``.

    In float32 (float64 for float64 hidden states), equal to what `logprobs` says of the same logits. The gradients of
    log-probabilities and entropies reach `hidden`, `weight` and `bias`.

    Args:
        hidden: final hidden states of the positions before the tokens.
        weight: unembedding; a QuantizedArray is used dequantized and gets no gradient; a LowRankArray is
            added up, and the gradient of the whole is made on the way to its parts.
        tokens: one outside ``[0, vocab)`` gives NaN.
        temperature: divides the logits.
        bias: added to the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``, before the temperature.
        entropy: return `LogprobsAndEntropy`.
        vocab_axis: inside ``jax.shard_map``, the mesh axis over which `weight` and `bias` hold equal parts of the
            vocabulary, in order.
        implementation: a name, an own implementation, or several in order; None chooses.

    Raises:
        ValueError: shapes that do not fit, `temperature` or `softcap` not positive, or `vocab_axis` is not an axis that
            `weight` varies over.
        TypeError: tokens are not integers, or `hidden` not floats.

    >>> scored = token_logprobs(jnp.zeros((1, 2)), jnp.zeros((2, 8)), jnp.array([3]), entropy=True)
    >>> round(float(scored.logprobs[0]), 4), round(float(scored.entropy[0]), 4)
    (-2.0794, 2.0794)
    """
    check_head(hidden, weight, bias, softcap, vocab_axis)
    check_rows(hidden, tokens=tokens)
    check_static("temperature", temperature)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature}; expected a finite positive number")
    if hidden.shape[0] == 0:
        nothing = jnp.zeros((0,), exact(hidden.dtype))
        return LogprobsAndEntropy(nothing, nothing) if entropy else nothing
    numbers = TOKEN_LOGPROBS(
        implementation,
        hidden=hidden,
        weight=dense(weight),
        tokens=int32(tokens),
        temperature=float(temperature),
        bias=bias,
        softcap=softcap,
        entropy=entropy,
        vocab_axis=vocab_axis,
    )
    return LogprobsAndEntropy(*numbers) if entropy else numbers[0]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Log-probability and, if asked for, entropy of rows."""

    entropy: bool
    vocab_axis: str | None

    def __call__(self, logits: jax.Array, tokens: jax.Array, fixed: None, /) -> Any:
        del fixed
        (found, hit, known), logits = find(logits, tokens, self.vocab_axis)
        softmax = Softmax.of(logits, self.vocab_axis)
        surprise = jnp.where(softmax.e > 0, softmax.lse[:, None] - logits, 0)
        entropy = softmax.sum(softmax.e * surprise) / softmax.total
        numbers = jnp.where(known, found - softmax.lse, jnp.nan), entropy

        def pull(*cotangents: jax.Array) -> jax.Array:
            cotangent = jnp.where(known, cotangents[0], jnp.nan)
            share = cotangent / softmax.total
            if not self.entropy:
                return jnp.where(hit, cotangent[:, None], 0) - softmax.e * share[:, None]
            spread = (cotangents[1] / softmax.total)[:, None] * (surprise - entropy[:, None])
            return jnp.where(hit, cotangent[:, None], 0) + softmax.e * (spread - share[:, None])

        return numbers if self.entropy else numbers[:1], pull


def _blocked(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    tokens: jax.Array,
    temperature: float,
    bias: jax.Array | None,
    softcap: float | None,
    entropy: bool,
    vocab_axis: str | None,
    chunk: int | None = None,
    bands: int | None = None,
) -> tuple[jax.Array, ...]:
    job = Job(Layer(softcap, temperature), _Rows(entropy, vocab_axis), chunk, bands)
    return each(job, hidden, Head(weight, bias), tokens, None)


def _reference(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    tokens: jax.Array,
    temperature: float,
    bias: jax.Array | None,
    softcap: float | None,
    entropy: bool,
    vocab_axis: None,
) -> tuple[jax.Array, ...]:
    del vocab_axis
    every = jax.nn.log_softmax(Layer(softcap, temperature).logits(hidden, Head(weight, bias)))
    found = jnp.take_along_axis(every, tokens[:, None], 1, mode="fill", fill_value=jnp.nan)[:, 0]
    found = jnp.where(tokens < 0, jnp.nan, found)  # the gather counts negative ones from the end
    if not entropy:
        return (found,)
    possible = jnp.isfinite(every)
    return found, -jnp.sum(jnp.where(possible, jnp.exp(every) * jnp.where(possible, every, 0), 0), 1)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    hidden, weight = (call.arguments[name] for name in ("hidden", "weight"))
    exactly = {"dtype": str(hidden.dtype), "features": hidden.shape[1], "entropy": call.arguments["entropy"]}
    return exactly, {"tokens": hidden.shape[0], "vocab": weight.shape[1]}


TOKEN_LOGPROBS = Operation(
    "token_logprobs",
    (
        Implementation("blocked", _blocked, configs=configs, gradient="first order, reverse mode"),
        Implementation("reference", _reference, whole_vocabulary, features="no sharded vocabulary"),
    ),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 2e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: PartitionSpec(axes["hidden"][0]),
)
