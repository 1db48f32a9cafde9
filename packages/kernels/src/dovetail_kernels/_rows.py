"""Numbers per row of a linear layer's output, a chunk of rows at a time, with their gradients.

What the numbers are is a `RowFunction`. Where their weighted sum is wanted, the gradient is made in the same pass as
the sum, while a chunk's logits are at hand: the backward pass only scales it, and nothing is computed twice. (The idea
of Liger-Kernel's fused linear cross-entropy, arXiv:2410.10989.) Where one number per row is wanted, the factors of
their gradients are not known yet, so the backward pass computes the logits of each chunk once more.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dovetail_kernels._dtypes import exact
from dovetail_kernels._head import weighted
from dovetail_kernels._manual import alike
from dovetail_kernels.operation import Call

__all__ = [
    "SAVED",
    "Found",
    "Head",
    "Job",
    "Layer",
    "RowFunction",
    "Softmax",
    "band_count",
    "chunk_rows",
    "configs",
    "each",
    "find",
    "summed",
]

SAVED = "dovetail_kernels.loss_gradient"
LEAST_LOGITS = 1 << 22
MOST_LOGITS = 9 << 21
LEAST_CHUNKS = 3
LEAST_BAND = 48
MOST_BANDS = 4


class Head(NamedTuple):
    """The differentiable operands besides the hidden states."""

    weight: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Layer:
    """How logits come from the output of a linear layer: first the soft cap, then the temperature."""

    softcap: float | None = None
    temperature: float = 1.0

    def logits(self, hidden: jax.Array, head: Head) -> jax.Array:
        """Return ``[rows, vocab]``."""
        wide = exact(hidden.dtype)
        raw = jnp.einsum("td,dv->tv", hidden, head.weight.astype(hidden.dtype), preferred_element_type=wide)
        if head.bias is not None:
            raw = raw + head.bias.astype(wide)
        capped = raw if self.softcap is None else self.softcap * jnp.tanh(raw / self.softcap)
        return capped if self.temperature == 1 else capped / self.temperature

    def pull(self, logits: jax.Array, gradient: jax.Array) -> jax.Array:
        """Return the gradient of the linear layer's output from that of the logits."""
        if self.temperature != 1:
            gradient = gradient / self.temperature
        if self.softcap is not None:
            gradient = gradient * (1 - (logits * (self.temperature / self.softcap)) ** 2)
        return gradient


class RowFunction(Protocol):
    """A static, hashable function of the logits of some rows."""

    def __call__(self, logits: jax.Array, rows: Any, fixed: Any, /) -> tuple[tuple[jax.Array, ...], Callable[..., Any]]:
        """Return numbers ``[rows]``, and the gradient of the logits as a function of the numbers' cotangents.

        Args:
            logits: ``[rows, vocab]``, or this device's part of the vocabulary.
            rows: what else there is per row.
            fixed: what else there is.
        """
        ...


class Job(NamedTuple):
    """The static part of a call."""

    layer: Layer
    function: RowFunction
    chunk: int | None
    """Rows at a time."""
    bands: int | None
    """Parts of the features in which the gradient of the weight is added up; what divides them equally is taken."""


class Softmax(NamedTuple):
    """A softmax over a vocabulary, which may be in parts over a mesh axis.

    Attributes:
        e: exponentials of the logits less the largest of a row, ``[rows, part of vocab]``.
        total: their sum over the whole vocabulary, ``[rows]``.
        lse: log-sum-exp of the logits, ``[rows]``.
        axis: the mesh axis or None.
    """

    e: jax.Array
    total: jax.Array
    lse: jax.Array
    axis: str | None

    @classmethod
    def of(cls, logits: jax.Array, axis: str | None = None) -> "Softmax":
        """Compute it."""
        peak = jnp.max(logits, 1)
        if axis is not None:
            peak = jax.lax.pmax(peak, axis)
        e = jnp.exp(logits - peak[:, None])
        total = _over(axis, jnp.sum(e, 1))
        return cls(e, total, peak + jnp.log(total), axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """Sum ``[rows, part of vocab]`` over the whole vocabulary."""
        return _over(self.axis, jnp.sum(x, 1))

    @property
    def vocab(self) -> int:
        """Size of the whole vocabulary."""
        return self.e.shape[1] * (1 if self.axis is None else jax.lax.axis_size(self.axis))


class Found(NamedTuple):
    """Where an id sits in each row.

    Attributes:
        logit: the id's, ``[rows]``.
        hit: where it is, ``[rows, part of vocab]``.
        known: whether it is in the vocabulary, ``[rows]``.
    """

    logit: jax.Array
    hit: jax.Array
    known: jax.Array


def find(logits: jax.Array, ids: jax.Array, axis: str | None = None) -> tuple[Found, jax.Array]:
    """Return where an id sits in each row, and the logits, to be used from here on so that one buffer is enough."""
    size = logits.shape[1]
    local = ids if axis is None else ids - jax.lax.axis_index(axis).astype(ids.dtype) * size
    logit = jnp.take_along_axis(logits, local[:, None], axis=1, mode="clip")[:, 0]
    logit, logits = jax.lax.optimization_barrier((logit, logits))
    if axis is not None:
        here = (local >= 0) & (local < size)
        logit = jax.lax.psum(jnp.where(here, logit, 0), axis)
    vocab = size * (1 if axis is None else jax.lax.axis_size(axis))
    hit = local[:, None] == jnp.arange(size, dtype=ids.dtype)
    return Found(logit, hit, (ids >= 0) & (ids < vocab)), logits


def _over(axis: str | None, x: jax.Array) -> jax.Array:
    return x if axis is None else jax.lax.psum(x, axis)


def chunk_rows(rows: int, vocab: int) -> int:
    """Return how many rows to take at a time where nobody says.

    Every chunk adds to the whole gradient of the weight, so few large chunks are fast; a third of the rows is still
    small next to all logits and their gradient.
    """
    least, most = max(1, LEAST_LOGITS // vocab), max(1, MOST_LOGITS // vocab)
    return max(least, min(most, -(-rows // LEAST_CHUNKS)))


def band_count(features: int) -> int:
    """Return in how many bands of features to add up the gradient of the weight where nobody says.

    With several devices it is one: the partitioner would exchange every band of every chunk.
    """
    most = min(MOST_BANDS, features // LEAST_BAND) if jax.device_count() == 1 else 1
    return next((bands for bands in range(most, 1, -1) if features % bands == 0), 1)


def configs(call: Call) -> Iterator[dict[str, int]]:
    """Return configurations worth trying."""
    rows = call.arguments["hidden"].shape[0]
    yield from ({"chunk": size} for size in (64, 128, 256, 512, 1024, 2048) if size < 2 * rows)


def summed(
    job: Job, hidden: jax.Array, head: Head, rows: Any, fixed: Any, weights: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Return weighted sums of a `RowFunction`'s numbers over the rows; only the first has a gradient."""
    weights = jnp.ones(hidden.shape[:1], exact(hidden.dtype)) if weights is None else weights
    job, hidden, rows = _fitted(job, head, (hidden, rows))
    weights = jnp.pad(weights.astype(exact(hidden.dtype)), (0, hidden.shape[0] - weights.shape[0]))
    hidden, head = _alike((hidden, head), (rows, fixed, weights))
    return _summed(job, hidden, head, rows, fixed, weights)


def each(job: Job, hidden: jax.Array, head: Head, rows: Any, fixed: Any) -> tuple[jax.Array, ...]:
    """Return the numbers of a `RowFunction` for every row; all have gradients."""
    count = hidden.shape[0]
    job, hidden, rows = _fitted(job, head, (hidden, rows))
    hidden, head = _alike((hidden, head), (rows, fixed))
    return jax.tree.map(lambda x: x[:count], _each(job, hidden, head, rows, fixed))


def _fitted(job: Job, head: Head, tree: Any) -> tuple[Any, ...]:
    """Make chunks of equal size, so that little is padded; with the last row, which is as good as the others."""
    count = tree[0].shape[0]
    size = min(count, job.chunk or chunk_rows(count, head.weight.shape[1]))
    size = -(-count // -(-count // size))

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, -count % size)] + [(0, 0)] * (x.ndim - 1), mode="edge")

    features = head.weight.shape[0]
    job = job._replace(chunk=size, bands=math.gcd(features, job.bands or band_count(features)))
    return job, *(jax.tree.map(pad, tree) if count % size else tree)


def _alike(tree: Any, data: Any) -> Any:
    """Mark what is differentiated as varying as all operands do; data stay, so that a row's numbers vary as they do."""
    leaves, structure = jax.tree.flatten(tree)
    marked = alike(*leaves, *jax.tree.leaves(data))
    return jax.tree.unflatten(structure, marked[: len(leaves)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(job: Job, hidden: Any, head: Head, rows: Any, fixed: Any, weights: Any) -> tuple[jax.Array, ...]:
    def chunk(nothing: None, part: Any) -> Any:
        hidden, rows, weights = part
        numbers, _ = job.function(job.layer.logits(hidden, head), rows, fixed)
        return nothing, tuple(jnp.sum(weighted(x, weights)) for x in numbers)

    _, sums = _loop(job, chunk, None, (hidden, rows, weights))
    return tuple(jnp.sum(x) for x in sums)


def _summed_forward(job: Job, hidden: Any, head: Head, rows: Any, fixed: Any, weights: Any) -> Any:
    def chunk(sums: Head, part: Any) -> Any:
        hidden, rows, weights = part
        numbers, d_hidden, sums = _gradients(job, hidden, head, rows, fixed, (weights,), sums)
        return sums, (tuple(jnp.sum(weighted(x, weights)) for x in numbers), d_hidden)

    d_head, (totals, d_hidden) = _loop(job, chunk, _zeros(hidden, head), (hidden, rows, weights))
    saved = _together(d_hidden), jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head)
    return tuple(jnp.sum(x) for x in totals), jax.tree.map(lambda x: checkpoint_name(x, SAVED), saved)


def _summed_backward(job: Job, saved: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    del job
    factor = cotangents[0]

    def scaled(g: jax.Array) -> jax.Array:
        return (g.astype(factor.dtype) * factor).astype(g.dtype)  # a factor such as 1/300 has no place in 16 bits

    d_hidden, d_head = jax.tree.map(scaled, saved)
    return d_hidden, d_head, None, None, None


_summed.defvjp(_summed_forward, _summed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _each(job: Job, hidden: Any, head: Head, rows: Any, fixed: Any) -> tuple[jax.Array, ...]:
    def chunk(nothing: None, part: Any) -> Any:
        hidden, rows = part
        return nothing, job.function(job.layer.logits(hidden, head), rows, fixed)[0]

    return jax.tree.map(_together, _loop(job, chunk, None, (hidden, rows))[1])


def _each_forward(job: Job, hidden: Any, head: Head, rows: Any, fixed: Any) -> Any:
    return _each(job, hidden, head, rows, fixed), (hidden, head, rows, fixed)


def _each_backward(job: Job, saved: Any, cotangents: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    hidden, head, rows, fixed = saved

    def chunk(sums: Head, part: Any) -> Any:
        hidden, rows, cotangents = part
        _, d_hidden, sums = _gradients(job, hidden, head, rows, fixed, cotangents, sums)
        return sums, d_hidden

    d_head, d_hidden = _loop(job, chunk, _zeros(hidden, head), (hidden, rows, cotangents))
    return _together(d_hidden), jax.tree.map(lambda g, x: g.astype(x.dtype), d_head, head), None, None


_each.defvjp(_each_forward, _each_backward)


def _gradients(
    job: Job, hidden: jax.Array, head: Head, rows: Any, fixed: Any, cotangents: tuple[jax.Array, ...], sums: Head
) -> tuple[tuple[jax.Array, ...], jax.Array, Head]:
    """Return a chunk's numbers, its gradient of the hidden states, and the sums with its gradients of the head."""
    logits, wide = job.layer.logits(hidden, head), exact(hidden.dtype)
    numbers, pull = job.function(logits, rows, fixed)
    d_logits = job.layer.pull(logits, pull(*cotangents)).astype(hidden.dtype)
    d_bias = None if head.bias is None else sums.bias + jnp.sum(d_logits, axis=0, dtype=wide)
    d_hidden = jnp.einsum("tv,dv->td", d_logits, head.weight.astype(hidden.dtype))
    return numbers, d_hidden, Head(_add_product(job, sums.weight, hidden, d_logits), d_bias)


def _add_product(job: Job, total: jax.Array, hidden: jax.Array, d_logits: jax.Array) -> jax.Array:
    """Return ``total + hidden.T @ d_logits``, one band of features after the other, so that a product is small."""
    if not hidden.shape[1]:
        return total
    size = hidden.shape[1] // (job.bands or 1)

    def add(band: Any, total: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(hidden, band * size, size, 1)
        part = jnp.einsum("td,tv->dv", part, d_logits, preferred_element_type=total.dtype)
        part = part + jax.lax.dynamic_slice_in_dim(total, band * size, size, 0)
        return jax.lax.dynamic_update_slice_in_dim(total, part, band * size, 0)

    return jax.lax.fori_loop(0, hidden.shape[1] // size, add, total)


def _zeros(hidden: jax.Array, head: Head) -> Head:
    return jax.tree.map(lambda x: jnp.zeros_like(x, exact(hidden.dtype)), head)


def _loop(job: Job, body: Callable[..., Any], carry: Any, rows: Any) -> tuple[Any, Any]:
    """Scan over chunks; row i is in chunk ``i % chunks``, so that sharded rows leave no device idle."""
    count, size = jax.tree.leaves(rows)[0].shape[0], job.chunk or 1
    if count == size:
        carry, out = body(carry, rows)
        return carry, jax.tree.map(lambda x: x[None], out)
    parts = jax.tree.map(lambda x: x.reshape(size, count // size, *x.shape[1:]).swapaxes(0, 1), rows)
    return jax.lax.scan(body, carry, parts)


def _together(chunks: jax.Array) -> jax.Array:
    return chunks.swapaxes(0, 1).reshape(chunks.shape[0] * chunks.shape[1], *chunks.shape[2:])
