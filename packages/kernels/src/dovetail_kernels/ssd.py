"""State-space duality, the recurrence of Mamba-2: a whole sequence, or one token.

``reference`` is the recurrence, token after token. ``blocked`` computes chunks of tokens by matrix products and walks
over the chunks' states only (Dao and Gu, arXiv:2405.21060).
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

__all__ = ["SSD", "ssd", "ssd_step"]

CHUNK = 64


def ssd(
    x: Float[Array, "batch time heads dim"],
    dt: Float[Array, "batch time heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "batch time groups size"],
    c: Float[Array, "batch time groups size"],
    *,
    d: Float[Array, " heads"] | None = None,
    state: Float[Array, "batch heads dim size"] | None = None,
    segment_ids: Int[Array, "batch time"] | None = None,
    implementation: Wanted = None,
) -> tuple[Float[Array, "batch time heads dim"], Float[Array, "batch heads dim size"]]:
    r"""Run the selective state-space recurrence of Mamba-2 over a sequence (Dao and Gu, arXiv:2405.21060).

    .. math:: S_t = e^{dt_t a} S_{t-1} + dt_t \, x_t b_t^T, \qquad y_t = S_t c_t + d \, x_t

    The result has the dtype of `x`; sums and the state are float32 (float64 for float64). Decays are products of
    exponentials of sums, so that none overflows. A sequence may be split anywhere: the state that one call returns is
    the next call's `state`, and `ssd_step` continues it token by token.

    Args:
        x: inputs.
        dt: step sizes, at least 0: after bias and softplus.
        a: rates, at most 0: ``-exp(A_log)``.
        b: input directions; head h reads group ``h // (heads // groups)``.
        c: output directions, likewise.
        d: weight of the input itself in the output; None is 0.
        state: what came before; None is zeros. It belongs to the first segment.
        segment_ids: packed segments: the state is reset where the id changes. Tokens of segment 0 are padding: they
            leave the state as it is and give 0.
        implementation: a name, an own implementation, or several in order; None chooses.

    Returns:
        The outputs, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, or an implementation that does not exist or cannot run this.
        TypeError: operands that are not floats, segment ids that are not integers.

    >>> x, dt = jnp.ones((1, 6, 4, 8)), jnp.ones((1, 6, 4))
    >>> b = jnp.ones((1, 6, 2, 16))
    >>> y, state = ssd(x, dt, -jnp.ones(4), b, b)
    >>> y.shape, state.shape
    ((1, 6, 4, 8), (1, 4, 8, 16))
    """
    _check(x, b, dt=dt, a=a, c=c, d=d, state=state)
    (batch, time, heads, dim), size = x.shape, b.shape[3]
    _recurrent.check_segments(segment_ids, (batch, time))
    before = _recurrent.initial(state, (batch, heads, dim, size), exact(x.dtype))
    if 0 in (batch, time, heads, dim):
        return jnp.zeros_like(x), before
    if size == 0:
        b, c, before = (jnp.pad(array, [(0, 0)] * 3 + [(0, 1)]) for array in (b, c, before))
    out, after = SSD(implementation, x=x, dt=dt, a=a, b=b, c=c, d=d, state=before, segment_ids=segment_ids)
    return out, after[..., :size]


def ssd_step(
    x: Float[Array, "batch heads dim"],
    dt: Float[Array, "batch heads"],
    a: Float[Array, " heads"],
    b: Float[Array, "batch groups size"],
    c: Float[Array, "batch groups size"],
    *,
    state: Float[Array, "batch heads dim size"],
    d: Float[Array, " heads"] | None = None,
) -> tuple[Float[Array, "batch heads dim"], Float[Array, "batch heads dim size"]]:
    """Run `ssd` for one token per row: the output and the new state.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: operands that are not floats.

    >>> y, state = ssd_step(
    ...     jnp.ones((1, 4, 8)),
    ...     jnp.ones((1, 4)),
    ...     -jnp.ones(4),
    ...     jnp.ones((1, 2, 16)),
    ...     jnp.ones((1, 2, 16)),
    ...     state=jnp.zeros((1, 4, 8, 16)),
    ... )
    >>> float(y[0, 0, 0])
    16.0
    """
    _check(x[:, None], b[:, None], dt=dt[:, None], a=a, c=c[:, None], d=d, state=state)
    wide = exact(x.dtype)
    state, out = _token(a.astype(wide), state.astype(wide), tuple(part.astype(wide) for part in (x, dt, b, c)))
    if d is not None:
        out = out + x.astype(wide) * d.astype(wide)[:, None]
    return out.astype(x.dtype), state


def _check(x: jax.Array, b: jax.Array, **others: jax.Array | None) -> None:
    _recurrent.check_floats(x=x, b=b, **others)
    if x.ndim != 4 or b.ndim != 4:
        raise ValueError(f"x {x.shape}, b {b.shape}; expected [batch, time, heads, dim], [batch, time, groups, size]")
    sizes = dict(zip(("batch", "time", "heads", "dim"), x.shape, strict=True)) | {
        "groups": b.shape[2],
        "size": b.shape[3],
    }
    if sizes["groups"] == 0 or sizes["heads"] % sizes["groups"]:
        raise ValueError(f"x {x.shape}, b {b.shape}; heads {sizes['heads']} must be a multiple of groups {b.shape[2]}")
    axes = {
        "dt": ("batch", "time", "heads"),
        "a": ("heads",),
        "c": ("batch", "time", "groups", "size"),
        "d": ("heads",),
        "state": ("batch", "heads", "dim", "size"),
    }
    _recurrent.check_shapes(sizes, b=(b, axes["c"]), **{name: (array, axes[name]) for name, array in others.items()})


def _token(a: jax.Array, state: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    x, dt, b, c = now
    group = x.shape[1] // b.shape[1]
    b, c = (jnp.repeat(part, group, axis=1)[:, :, None, :] for part in (b, c))
    state = state * jnp.exp(dt * a)[..., None, None] + (x * dt[..., None])[..., None] * b
    return state, jnp.sum(state * c, axis=-1)


def _reference(
    *,
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None,
    state: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    wide = state.dtype
    segments = _recurrent.runs(segment_ids)
    operands = _recurrent.without_padding(segments, x, dt, b, c)
    x, dt, b, c, a, state = alike(*(part.astype(wide) for part in operands), a.astype(wide), state)
    starts = None if segments is None else segments.starts

    def step(state: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        *token, fresh = now
        state = state if fresh is None else jnp.where(fresh[:, None, None, None], 0, state)
        return _token(a, state, tuple(token))

    after, out = _recurrent.walk(step, state, (x, dt, b, c, starts))
    return _finish(out, x, d, segments).astype(operands[0].dtype), after


def _finish(out: jax.Array, x: jax.Array, d: jax.Array | None, segments: _recurrent.Runs | None) -> jax.Array:
    """Add the skip connection; padding has x = 0 and a state, so its output is masked."""
    if d is not None:
        out = out + x * d.astype(x.dtype)[:, None]
    return out if segments is None else jnp.where(segments.valid[..., None, None], out, 0)


def _configs(call: Call) -> Iterator[dict[str, int]]:
    time = call.arguments["x"].shape[1]
    yield from ({"chunk": chunk} for chunk in (32, 64, 128, 256) if chunk <= max(32, time))


def _blocked(
    *,
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None,
    state: jax.Array,
    segment_ids: jax.Array | None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Chunks in the second axis, then groups, heads of a group, and tokens of a chunk: ``[b, n, g, h, i, ...]``."""
    wide, (batch, time, heads, dim), (groups, size) = state.dtype, x.shape, b.shape[2:]
    chunk, group = min(chunk, time), heads // groups
    segments = _recurrent.runs(segment_ids)
    operands = _recurrent.without_padding(segments, x, dt, b, c)
    x, dt, b, c, a, state = alike(*(part.astype(wide) for part in operands), a.astype(wide), state)
    steps = _recurrent.fold(dt, chunk).swapaxes(2, 3)
    index = None if segments is None else _recurrent.fold_index(segments.number, chunk)
    decay = jax.tree.map(
        lambda part: part.reshape(*part.shape[:2], groups, group, *part.shape[3:]),
        _recurrent.decays(steps * a[:, None], index),
    )
    steps = steps.reshape(batch, -1, groups, group, chunk, 1)
    inputs = _recurrent.fold(x, chunk).reshape(batch, -1, chunk, groups, group, dim).transpose(0, 1, 3, 4, 2, 5)
    inputs = inputs * steps
    keys, queries = (_recurrent.fold(part, chunk).swapaxes(2, 3) for part in (b, c))
    scores = jnp.einsum("bngis,bngjs->bngij", queries, keys)[:, :, :, None] * decay.between
    out = jnp.einsum("bnghij,bnghjp->bnghip", scores, inputs)
    added = jnp.einsum("bnghjp,bngjs->bnghps", inputs * decay.out[..., None], keys)

    def step(state: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state * now[0][..., None] + now[1], state

    after, states = _recurrent.walk(step, state.reshape(batch, groups, group, dim, size), (decay.whole, added))
    out = out + jnp.einsum("bngis,bnghps->bnghip", queries, states) * decay.into[..., None]
    out = _recurrent.unfold(out.transpose(0, 1, 4, 2, 3, 5).reshape(batch, -1, chunk, heads, dim), time)
    return _finish(out, x, d, segments).astype(operands[0].dtype), after.reshape(state.shape)


def _key(call: Call) -> tuple[dict[str, Any], dict[str, int]]:
    x, b = call.arguments["x"], call.arguments["b"]
    exactly = {
        "dtype": str(x.dtype),
        "dim": x.shape[3],
        "size": b.shape[3],
        "group": x.shape[2] // b.shape[2],
        "segments": call.arguments["segment_ids"] is not None,
    }
    return exactly, {"rows": x.shape[0] * x.shape[2], "time": x.shape[1]}


SSD = Operation(
    "ssd",
    (Implementation("blocked", _blocked, configs=_configs), Implementation("reference", _reference)),
    accumulation="float32 (float64 for float64)",
    error="1e-5 of the largest value in float32, 1e-2 in bfloat16",
    key=_key,
    outcome=lambda _, axes: (PartitionSpec(*axes["x"][:3]), PartitionSpec(axes["x"][0], axes["x"][2])),
)
