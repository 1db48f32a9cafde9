"""The gated delta rule, the linear attention of Gated DeltaNet and Qwen3-Next: a whole sequence, or one token.

``reference`` is the recurrence, token after token. ``blocked`` solves for the corrections of a chunk of tokens at once
and walks over the chunks' states only (Yang et al., arXiv:2412.06464).
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from dovetail_kernels import _recurrent
from dovetail_kernels._dtypes import exact
from dovetail_kernels._manual import alike
from dovetail_kernels.operation import Call, Implementation, Operation, Wanted

__all__ = ["GATED_DELTA_RULE", "gated_delta_rule", "gated_delta_step"]

BLOCK = 8


def gated_delta_rule(
    query: Float[Array, "batch time key_heads key_dim"],
    key: Float[Array, "batch time key_heads key_dim"],
    value: Float[Array, "batch time heads value_dim"],
    log_decay: Float[Array, "batch time heads"],
    beta: Float[Array, "batch time heads"],
    *,
    scale: float | None = None,
    state: Float[Array, "batch heads key_dim value_dim"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: Wanted = None,
) -> tuple[Float[Array, "batch time heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    r"""Run the gated delta rule over a sequence (Yang et al., arXiv:2412.06464).

    .. math:: S_t = e^{g_t} (I - \beta_t k_t k_t^T) S_{t-1} + \beta_t k_t v_t^T, \qquad o_t = scale \; S_t^T q_t

    The result has the dtype of `value`; sums and the state are float32 (float64 for float64). Decays are products of
    exponentials of sums, so that none overflows. A sequence may be split anywhere: the state that one call returns is
    the next call's `state`, and `gated_delta_step` continues it token by token.

    Args:
        query: head h of the values reads key head ``h // (heads // key_heads)``. Models normalize queries and keys to
            length 1 before.
        key: keys; the recurrence is stable for ``beta * |key| ** 2 <= 2``.
        value: values.
        log_decay: logarithm of the decay, at most 0.
        beta: strength of a token's correction, between 0 and 1 (2 with negative eigenvalues).
        scale: factor of the output, default ``key_dim ** -0.5``.
        state: what came before; None is zeros. It belongs to the first segment.
        segment_ids: packed segments: the state is reset where the id changes. Tokens of segment 0 are padding: they
            leave the state as it is and give 0.
        implementation: a name, an own implementation, or several in order; None chooses.

    Returns:
        The outputs, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, or an implementation that does not exist or cannot run this.
        TypeError: operands that are not floats, segment ids that are not integers.

    >>> k, v, one = jnp.eye(4)[None, :, None], jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 2))
    >>> out, state = gated_delta_rule(k, k, v, 0 * one, one, scale=1.0)
    >>> out.shape, state.shape, float(out[0, 3, 0, 0])
    ((1, 4, 2, 8), (1, 2, 4, 8), 1.0)
    """
    _check(query, value, key=key, log_decay=log_decay, beta=beta, state=state)
    (batch, time, _, key_dim), (heads, value_dim) = query.shape, value.shape[2:]
    _recurrent.check_segments(segment_ids, (batch, time))
    before = _recurrent.initial(state, (batch, heads, key_dim, value_dim), exact(value.dtype))
    if 0 in (batch, time, heads, key_dim, value_dim):
        return jnp.zeros_like(value), before
    return GATED_DELTA_RULE(
        implementation,
        query=query,
        key=key,
        value=value,
        log_decay=log_decay,
        beta=beta,
        scale=float(key_dim**-0.5 if scale is None else scale),
        state=before,
        segment_ids=segment_ids,
    )


def gated_delta_step(
    query: Float[Array, "batch key_heads key_dim"],
    key: Float[Array, "batch key_heads key_dim"],
    value: Float[Array, "batch heads value_dim"],
    log_decay: Float[Array, "batch heads"],
    beta: Float[Array, "batch heads"],
    *,
    state: Float[Array, "batch heads key_dim value_dim"],
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads value_dim"], Float[Array, "batch heads key_dim value_dim"]]:
    """Run `gated_delta_rule` for one token per row: the output and the new state.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: operands that are not floats.

    >>> one = jnp.ones((1, 2))
    >>> out, state = gated_delta_step(
    ...     jnp.ones((1, 1, 4)), jnp.ones((1, 1, 4)), jnp.ones((1, 2, 8)), 0 * one, one, state=jnp.zeros((1, 2, 4, 8))
    ... )
    >>> float(out[0, 0, 0])
    2.0
    """
    rest = {"key": key, "log_decay": log_decay, "beta": beta}
    _check(query[:, None], value[:, None], **{name: x[:, None] for name, x in rest.items()}, state=state)
    wide = exact(value.dtype)
    now = tuple(x.astype(wide) for x in (query, key, value, log_decay, beta))
    state, out = _token(query.shape[-1] ** -0.5 if scale is None else scale, state.astype(wide), now)
    return out.astype(value.dtype), state


def _check(query: jax.Array, value: jax.Array, **others: jax.Array | None) -> None:
    _recurrent.check_floats(query=query, value=value, **others)
    shapes = f"query {query.shape}, value {value.shape}"
    if query.ndim != 4 or value.ndim != 4:
        raise ValueError(f"{shapes}; expected [batch, time, key_heads, key_dim] and [batch, time, heads, value_dim]")
    sizes = dict(zip(("batch", "time", "key_heads", "key_dim"), query.shape, strict=True))
    sizes |= {"heads": value.shape[2], "value_dim": value.shape[3]}
    if sizes["key_heads"] == 0 or sizes["heads"] % sizes["key_heads"]:
        raise ValueError(f"{shapes}; heads {sizes['heads']} must be a multiple of key_heads {sizes['key_heads']}")
    axes = {
        "value": ("batch", "time", "heads", "value_dim"),
        "key": ("batch", "time", "key_heads", "key_dim"),
        "log_decay": ("batch", "time", "heads"),
        "beta": ("batch", "time", "heads"),
        "state": ("batch", "heads", "key_dim", "value_dim"),
    }
    named = {"value": value, **others}
    _recurrent.check_shapes(sizes, **{name: (array, axes[name]) for name, array in named.items()})


def _token(scale: float, state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q, k, v, g, beta = now
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1)[..., None] for x in (q, k))
    state = state * jnp.exp(g)[..., None, None]
    wrong = v - jnp.sum(state * k, axis=2)
    state = state + k * (beta[..., None] * wrong)[:, :, None]
    return state, jnp.sum(state * (q * scale), axis=2)


def _reference(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    scale: float,
    state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    segments = _recurrent.runs(segment_ids)
    operands = _recurrent.without_padding(segments, query, key, value, log_decay, beta)
    *tokens, state = alike(*(x.astype(state.dtype) for x in operands), state)
    starts = None if segments is None else segments.starts

    def step(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        *token, fresh = now
        state = state if fresh is None else jnp.where(fresh[:, None, None, None], 0, state)
        return _token(scale, state, tuple(token))

    after, out = _recurrent.walk(step, state, (*tokens, starts))
    return _masked(out, segments).astype(value.dtype), after


def _masked(out: jax.Array, segments: _recurrent.Runs | None) -> jax.Array:
    return out if segments is None else jnp.where(segments.valid[..., None, None], out, 0)


def _configs(call: Call) -> Iterator[dict[str, int]]:
    time = call.arguments["value"].shape[1]
    yield from ({"chunk": chunk} for chunk in (32, 64, 128) if chunk <= max(32, time))


def _blocked(
    *,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    scale: float,
    state: jax.Array,
    segment_ids: jax.Array | None,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chunks in the second axis, then key heads, heads that share one, and tokens of a chunk: ``[b, n, g, h, i, ...]``.

    With the state S before a chunk, its tokens' corrections u solve ``(I + A) u = beta (v - decay k S)``, where A is
    the strictly lower part of ``beta k k^T`` with the decays in between.
    """
    (batch, time, heads, _), groups = value.shape, query.shape[2]
    chunk = min(time, chunk or _chunk(query.shape[3], value.shape[3]))
    group = heads // groups
    segments = _recurrent.runs(segment_ids)
    operands = _recurrent.without_padding(segments, query, key, value, log_decay, beta)
    q, k, v, g, beta, state = alike(*(x.astype(state.dtype) for x in operands), state)
    q, k = (_recurrent.fold(x, chunk).swapaxes(2, 3) for x in (q * scale, k))
    v = _recurrent.fold(v, chunk).reshape(batch, -1, chunk, groups, group, v.shape[-1]).transpose(0, 1, 3, 4, 2, 5)
    beta = _recurrent.fold(beta, chunk).swapaxes(2, 3).reshape(*v.shape[:-1], 1)
    index = None if segments is None else _recurrent.fold_index(segments.number, chunk)
    decay = jax.tree.map(
        lambda x: x.reshape(*x.shape[:2], groups, group, *x.shape[3:]),
        _recurrent.decays(_recurrent.fold(g, chunk).swapaxes(2, 3), index),
    )
    strict = jnp.tril(jnp.ones((chunk, chunk), bool), -1)
    heard = jnp.einsum("bngik,bngjk->bngij", k, k)[:, :, :, None] * jnp.where(strict, decay.between * beta, 0)
    into, out_of = decay.into[..., None], decay.out[..., None]
    given = jnp.concatenate([v * beta, k[:, :, :, None] * (into * beta)], axis=-1)
    solved = inverse(heard) @ given
    new, read = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]

    def step(state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        new, read, kept, whole = now
        new = new - read @ state
        return state * whole[..., None] + jnp.einsum("bghik,bghiv->bghkv", kept, new), (state, new)

    state = state.reshape(batch, groups, group, *state.shape[2:])
    after, (states, new) = _recurrent.walk(step, state, (new, read, k[:, :, :, None] * out_of, decay.whole))
    scores = jnp.einsum("bngik,bngjk->bngij", q, k)[:, :, :, None] * decay.between
    out = scores @ new + (q[:, :, :, None] * into) @ states
    out = _recurrent.unfold(out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, chunk, heads, v.shape[-1]), time)
    return _masked(out, segments).astype(value.dtype), after.reshape(batch, heads, *after.shape[3:])


def _chunk(key_dim: int, value_dim: int) -> int:
    """Return how many tokens to take at once: work inside a chunk grows with it, work on states with the heads."""
    return 32 if max(key_dim, value_dim) <= 64 else 64


@jax.custom_jvp
def inverse(lower: jax.Array) -> jax.Array:
    """Return the inverses of I + A for strictly lower triangular matrices A, ``[..., n, n]``.

    The diagonal blocks are inverted by forward substitution, then pairs of them are merged by matrix products: several
    times faster on a CPU than a triangular solve of each matrix, and as stable.
    """
    n, width = lower.shape[-1], BLOCK
    while width < n:
        width *= 2
    lower = jnp.pad(lower, [*[(0, 0)] * (lower.ndim - 2), (0, width - n), (0, width - n)])
    found, size = _substituted(_diagonal(lower, BLOCK)), BLOCK
    while size < width:
        below = _diagonal(lower, 2 * size)[..., size:, :size]
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        found = jnp.concatenate([top, jnp.concatenate([-(second @ (below @ first)), second], axis=-1)], axis=-2)
        size *= 2
    return found[..., 0, :n, :n]


@inverse.defjvp
def _inverse_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    found = inverse(*primals)
    return found, -(found @ tangents[0] @ found)


def _diagonal(x: jax.Array, size: int) -> jax.Array:
    """Return the blocks ``[..., blocks, size, size]`` on the diagonal."""
    starts = range(0, x.shape[-1], size)
    return jnp.stack([x[..., start : start + size, start : start + size] for start in starts], axis=-3)


def _substituted(lower: jax.Array) -> jax.Array:
    unit = jnp.eye(lower.shape[-1], dtype=lower.dtype)
    rows = [jnp.broadcast_to(unit[0], lower.shape[:-1])]
    for i in range(1, lower.shape[-1]):
        rows.append(unit[i] - jnp.sum(lower[..., i, :i, None] * jnp.stack(rows, axis=-2), axis=-2))
    return jnp.stack(rows, axis=-2)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    query, value = call.arguments["query"], call.arguments["value"]
    exactly = {
        "dtype": str(value.dtype),
        "key_dim": query.shape[3],
        "value_dim": value.shape[3],
        "group": value.shape[2] // query.shape[2],
        "segments": call.arguments["segment_ids"] is not None,
    }
    return exactly, {"rows": value.shape[0] * value.shape[2], "time": value.shape[1]}


GATED_DELTA_RULE = Operation(
    "gated_delta_rule",
    (Implementation("blocked", _blocked, configs=_configs), Implementation("reference", _reference)),
    accumulation="float32 (float64 for float64)",
    error="1e-4 of the largest value in float32 for keys of length 1, 1e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: (PartitionSpec(*axes["value"][:3]), PartitionSpec(axes["value"][0], axes["value"][2])),
)
