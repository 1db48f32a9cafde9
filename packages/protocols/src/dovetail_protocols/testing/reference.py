"""Plain implementations that the kits compare with: attention in float64 NumPy, and a dense mixer in JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dovetail_protocols.model import LayerIndex, Recurrence
from dovetail_protocols.weight import as_array

__all__ = ["ReferenceMixer", "attention", "walk"]


def attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    segment_ids: np.ndarray,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Return causal attention within segments in float64, one query at a time.

    Args:
        query: ``[tokens, heads, key_dim]``, rows flattened with the batch outermost.
        key: ``[tokens, kv_heads, key_dim]``; head h of `query` reads head ``h // (heads // kv_heads)``.
        value: ``[tokens, kv_heads, value_dim]``.
        segment_ids: ``[batch, time]``; a token sees earlier ones of its row and segment, and itself.
        scale: factor of the logits.
        window: how many last positions of the row a token sees, itself included; None for all.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: a logit per head that takes part in the softmax only.

    Returns:
        ``[tokens, heads, value_dim]``; 0 for padding (segment 0).
    """
    batch, time = segment_ids.shape
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    queries, keys, values = (np.asarray(x, np.float64).reshape(batch, time, *x.shape[1:]) for x in (query, key, value))
    out = np.zeros((batch, time, heads, value.shape[2]))
    for row, place, head in np.ndindex(batch, time, heads):
        segment = segment_ids[row, place]
        first = 0 if window is None else max(0, place + 1 - window)
        seen = [other for other in range(first, place + 1) if segment_ids[row, other] == segment != 0]
        if seen:
            logits = scale * keys[row, seen, head // group] @ queries[row, place, head]
            logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
            others = [] if sinks is None else [float(sinks[head])]
            weights = np.exp(np.append(logits, others) - max(logits.max(), *others, -np.inf))
            out[row, place, head] = weights[: len(seen)] @ values[row, seen, head // group] / weights.sum()
    return out.reshape(batch * time, heads, -1)


def walk(
    recurrence: Recurrence, state: Mapping[str, jax.Array], inputs: tuple[jax.Array, ...], segment_ids: jax.Array
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """Return what `Recurrence.chunk` must return, by `Recurrence.step` alone, token after token; padding gives 0."""

    def token(carry: Any, now: Any) -> Any:
        (state, last), (segment, *inputs) = carry, now
        real = segment != 0
        fresh = real & (last != 0) & (segment != last)
        out, after = recurrence.step(_where(fresh, jax.tree.map(jnp.zeros_like, state), state), tuple(inputs))
        after = {name: after[name].astype(old.dtype) for name, old in state.items()}
        return (_where(real, after, state), jnp.where(real, segment, last)), _where(real, out, jnp.zeros_like(out))

    columns = [jnp.moveaxis(x, 1, 0) for x in (segment_ids, *inputs)]
    (after, _), out = jax.lax.scan(token, (dict(state), jnp.zeros_like(segment_ids[:, 0])), columns)
    return jnp.moveaxis(out, 0, 1), after


def _where(rows: jax.Array, chosen: Any, other: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y), chosen, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReferenceMixer:
    """The dense mixer in its plainest form, in float32; quadratic in memory, for tests only.

    Attributes:
        segment_ids: int32 ``[batch, time]``, 0 for padding, whose output is 0.
    """

    segment_ids: Int[Array, "batch time"]
    per_layer: ClassVar[bool] = False

    def attend(
        self,
        layer: LayerIndex,  # noqa: ARG002 - the contract's; a dense mixer treats all layers alike
        query: Float[Array, "tokens heads key_dim"],
        key: Float[Array, "tokens kv_heads key_dim"],
        value: Float[Array, "tokens kv_heads value_dim"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "ReferenceMixer"]:
        """Return causal attention within each segment, see `Mixer.attend`."""
        batch, time = self.segment_ids.shape
        group = query.shape[1] // key.shape[1]
        q, k, v = (x.astype(jnp.float32).reshape(batch, time, *x.shape[1:]) for x in (query, key, value))
        k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * jnp.float32(scale)
        if softcap is not None:
            logits = jnp.float32(softcap) * jnp.tanh(logits / jnp.float32(softcap))
        age = jnp.arange(time)[:, None] - jnp.arange(time)[None, :]
        seen = (age >= 0) & (age < (time if window is None else window))
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        logits = jnp.where((seen & same)[:, None], logits, jnp.float32(-1e30))
        if sinks is not None:
            column = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (*logits.shape[:3], 1))
            logits = jnp.concatenate([logits, column], axis=-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., :time]
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest")
        out = jnp.where((self.segment_ids != 0)[:, :, None, None], out, jnp.float32(0))
        return out.astype(value.dtype).reshape(batch * time, *out.shape[2:]), self

    def attend_latent(
        self,
        layer: LayerIndex,
        query: Float[Array, "tokens heads key_dim"],
        latent: Float[Array, "tokens latent_dim"],
        rope_key: Float[Array, "tokens rope_dim"],
        expand: tuple[Any, Any],
        *,
        scale: float,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "ReferenceMixer"]:
        """Return attention with the expanded keys and values, see `Mixer.attend_latent`."""
        weights = map(as_array, expand)
        keys, values = (jnp.einsum("tl,lhd->thd", latent, w.astype(latent.dtype), precision="highest") for w in weights)
        shared = jnp.broadcast_to(rope_key[:, None], (*keys.shape[:2], rope_key.shape[1]))
        return self.attend(layer, query, jnp.concatenate([keys, shared], -1), values, scale=scale)

    def totals(self, values: Float[Array, "tokens values"]) -> Float[Array, "sequences values"]:
        """Return the sums over each segment, see `Mixer.totals`; a row for every token that might begin one."""
        batch, time = self.segment_ids.shape
        first = jnp.argmax(self.segment_ids[:, :, None] == self.segment_ids[:, None, :], axis=2)
        mine = (first[:, None, :] == jnp.arange(time)[None, :, None]) & (self.segment_ids != 0)[:, None, :]
        sums = jnp.einsum(
            "bst,btv->bsv", mine.astype(values.dtype), values.reshape(batch, time, -1), precision="highest"
        )
        return sums.reshape(batch * time, -1)

    def choose(
        self,
        layer: LayerIndex,  # noqa: ARG002 - as above
        experts: Int[Array, "tokens k"],
    ) -> tuple[Int[Array, "tokens k"], "ReferenceMixer"]:
        """Return the router's choice, see `Mixer.choose`."""
        return experts, self

    def recur(
        self,
        layer: LayerIndex,  # noqa: ARG002 - as above
        recurrence: Recurrence,
        inputs: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, "ReferenceMixer"]:
        """Run a recurrence token after token, each segment from zeros, see `Mixer.recur`."""
        batch, time = self.segment_ids.shape
        state = {name: jnp.zeros((batch, *shape), jnp.float32) for name, shape in recurrence.cache_spec().state}
        rows = tuple(x.reshape(batch, time, *x.shape[1:]) for x in inputs)
        out, _ = walk(recurrence, state, rows, self.segment_ids)
        return out.reshape(batch * time, *out.shape[2:]), self
