"""Cross-entropy of a linear layer.

``reference`` holds all logits: every derivative, any float dtype. ``blocked`` never does: it takes chunks of rows and
makes the gradient of the summed loss in the same pass (see `_rows`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer

from dovetail_kernels._dtypes import exact, int32
from dovetail_kernels._head import check_head, check_rows, dense, only, weighted, whole_vocabulary
from dovetail_kernels._rows import Head, Job, Layer, Softmax, configs, each, find, summed
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted
from dovetail_protocols import LowRankArray, QuantizedArray

__all__ = ["LINEAR_CROSS_ENTROPY", "CrossEntropyOptions", "LossAndZLoss", "linear_cross_entropy"]


@dataclasses.dataclass(frozen=True)
class CrossEntropyOptions:
    """What is asked for besides the plain cross-entropy.

    Attributes:
        label_smoothing: share of the target that is spread over the whole vocabulary, in [0, 1].
        z_loss: factor of the squared log-sum-exp that is added to a row's loss (PaLM, arXiv:2204.02311, section 5).
        per_token: return the loss of every row, times its weight, in place of the sum.
        return_z_loss: return `LossAndZLoss`.
        vocab_axis: inside ``jax.shard_map``, the mesh axis over which `weight` and `bias` hold equal parts of the
            vocabulary, in order. Targets count over the whole vocabulary; the loss is that of all parts together.

    Raises:
        ValueError: a number out of its range.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    per_token: bool = False
    return_z_loss: bool = False
    vocab_axis: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}; expected a number from 0 to 1")
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss={self.z_loss}; expected a finite number, at least 0")


class LossAndZLoss(NamedTuple):
    """A loss and what of it is z-loss.

    Attributes:
        loss: everything.
        z_loss: the part, to report; it has no gradient.
    """

    loss: Float[Array, "..."]
    z_loss: Float[Array, "..."]


def linear_cross_entropy(
    hidden: Float[Array, "tokens features"],
    weight: Float[Array, "features vocab"] | QuantizedArray | LowRankArray,
    targets: Integer[Array, " tokens"],
    *,
    loss_weights: Float[Array, " tokens"] | Bool[Array, " tokens"] | None = None,
    ignore_index: int | None = None,
    bias: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
    options: CrossEntropyOptions = CrossEntropyOptions(),
    implementation: Wanted = None,
) -> Any:
    r"""Return :math:`\sum_t w_t (\log \sum_v e^{z_{tv}} - z_{t y_t})` with logits :math:`z = h W + b`.

    Logits and sums are float32 (float64 for float64 hidden states). Gradients reach `hidden`, `weight` and `bias`;
    `loss_weights` are data. Under ``jax.checkpoint`` the gradient would be made twice: leave the loss outside, or save
    what it names with the policy ``save_only_these_names("dovetail_kernels.loss_gradient")``.

    Args:
        hidden: final hidden states.
        weight: unembedding; a QuantizedArray is used dequantized and gets no gradient; a LowRankArray is
            added up, and the gradient of the whole is made on the way to its parts.
        targets: the right token of each row. One outside ``[0, vocab)`` makes the loss NaN.
        loss_weights: default 1 for every row; booleans are a mask. A row of weight 0 may hold anything, NaN and wrong
            targets included.
        ignore_index: rows with this target have weight 0.
        bias: added to the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        options: label smoothing, z-loss, one loss per token, a vocabulary that is sharded.
        implementation: a name, an own implementation, or several in order; None chooses. ``configured("blocked",
            chunk=256)`` fixes the rows per chunk.

    Raises:
        ValueError: shapes that do not fit, `softcap` not positive, or `vocab_axis` is not an axis that `weight` varies
            over.
        TypeError: targets are not integers, or `hidden` not floats.

    >>> h, w = jnp.zeros((3, 2)), jnp.zeros((2, 8))
    >>> round(float(linear_cross_entropy(h, w, jnp.array([0, 1, 7]))) / 3, 4)  # the entropy of 8 equal classes
    2.0794
    """
    check_head(hidden, weight, bias, softcap, options.vocab_axis)
    check_rows(hidden, targets=targets, loss_weights=loss_weights)
    weights = None if loss_weights is None else jax.lax.stop_gradient(loss_weights.astype(exact(hidden.dtype)))
    if ignore_index is not None:
        ones = jnp.ones(targets.shape, exact(hidden.dtype)) if weights is None else weights
        weights = jnp.where(targets == ignore_index, 0, ones)
    targets = int32(targets)
    if weights is not None:
        hidden, targets = only(weights != 0, (hidden, targets))
    if hidden.shape[0] == 0:
        nothing = jnp.zeros((0,) if options.per_token else (), exact(hidden.dtype))
        return LossAndZLoss(nothing, nothing) if options.return_z_loss else nothing
    loss, z_loss = LINEAR_CROSS_ENTROPY(
        implementation,
        hidden=hidden,
        weight=dense(weight),
        targets=targets,
        loss_weights=weights,
        bias=bias,
        softcap=softcap,
        options=options,
    )
    return LossAndZLoss(loss, jax.lax.stop_gradient(z_loss)) if options.return_z_loss else loss


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Loss and z-loss of rows."""

    options: CrossEntropyOptions

    def __call__(self, logits: jax.Array, targets: jax.Array, fixed: None, /) -> Any:
        del fixed
        how = self.options
        (right, hit, known), logits = find(logits, targets, how.vocab_axis)
        softmax = Softmax.of(logits, how.vocab_axis)
        loss, z_loss = softmax.lse - right, how.z_loss * softmax.lse**2
        if how.label_smoothing:
            loss = loss + how.label_smoothing * (right - softmax.sum(logits) / softmax.vocab)

        def pull(cotangent: jax.Array, *reported: jax.Array) -> jax.Array:
            del reported
            cotangent = jnp.where(known, cotangent, jnp.nan)
            slope = cotangent * (1 + 2 * how.z_loss * softmax.lse) / softmax.total
            sure = (1 - how.label_smoothing) * cotangent
            gradient = softmax.e * slope[:, None] - jnp.where(hit, sure[:, None], 0)
            if how.label_smoothing:
                gradient = gradient - (how.label_smoothing / softmax.vocab * cotangent)[:, None]
            return gradient

        return (jnp.where(known, loss + z_loss, jnp.nan), z_loss), pull


def _blocked(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array | None,
    bias: jax.Array | None,
    softcap: float | None,
    options: CrossEntropyOptions,
    chunk: int | None = None,
    bands: int | None = None,
) -> tuple[jax.Array, ...]:
    job, head = Job(Layer(softcap), _Rows(options), chunk, bands), Head(weight, bias)
    if not options.per_token:
        return summed(job, hidden, head, targets, None, loss_weights)
    numbers = each(job, hidden, head, targets, None)
    return tuple(weighted(x, loss_weights) for x in numbers)


def _reference(
    *,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    loss_weights: jax.Array | None,
    bias: jax.Array | None,
    softcap: float | None,
    options: CrossEntropyOptions,
) -> tuple[jax.Array, ...]:
    logits = Layer(softcap).logits(hidden, Head(weight, bias))
    logprobs = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(logprobs, targets[:, None], 1, mode="fill", fill_value=jnp.nan)[:, 0]
    right = jnp.where(targets < 0, jnp.nan, right)  # the gather counts negative ones from the end
    loss = -(1 - options.label_smoothing) * right
    if options.label_smoothing:
        loss = loss - options.label_smoothing * jnp.mean(logprobs, 1)
    z_loss = options.z_loss * jax.nn.logsumexp(logits, 1) ** 2
    numbers = loss + z_loss, z_loss
    numbers = tuple(weighted(x, loss_weights) for x in numbers)
    return numbers if options.per_token else tuple(jnp.sum(x) for x in numbers)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    hidden, weight, options = (call.arguments[name] for name in ("hidden", "weight", "options"))
    exactly = {"dtype": str(hidden.dtype), "features": hidden.shape[1], "per_token": options.per_token}
    return exactly, {"tokens": hidden.shape[0], "vocab": weight.shape[1]}


LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    (
        Implementation("blocked", _blocked, configs=configs, gradient="first order, reverse mode"),
        Implementation("reference", _reference, whole_vocabulary, features="no sharded vocabulary"),
    ),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 2e-2 in bfloat16",
    key=_key,
    outcome=lambda given, axes: PartitionSpec(*axes["hidden"][: int(given["options"].per_token)]),
)
