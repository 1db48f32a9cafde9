"""DenseMixer: the mixer of training and scoring, over whole rows of tokens."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from dovetail_kernels.attention import attention
from dovetail_kernels.context_parallel import ring_attention
from dovetail_kernels.masks import causal, segments
from dovetail_kernels.masks import window as sliding
from dovetail_kernels.operation import Wanted
from dovetail_kernels.seam import einsum
from dovetail_protocols import LayerIndex

__all__ = ["DenseMixer"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseMixer:
    """Causal attention inside each row (and segment) of a ``[batch, time]`` batch; meets `dovetail_protocols.Mixer`.

    Attributes:
        segment_ids: int ``[batch, time]``, or None where every row is one segment.
        batch: rows.
        time: tokens per row.
        implementation: of `dovetail_kernels.attention`.
        ring: a mesh and the axis of it that rows are split over; attention is `dovetail_kernels.ring_attention` then.
        together: int ``[batch, time]``: tokens of a row that have the same number, but 0, see each other in both
            directions, as the places of one image do; None where none are.
        choices: int ``[layers, batch * time, k]``: the experts of tokens that chose before, of every layer (those
            without experts, too), -1 where a token chooses now; None where all do. All tokens of later layers do.
    """

    segment_ids: Any
    batch: int = dataclasses.field(metadata={"static": True})
    time: int = dataclasses.field(metadata={"static": True})
    implementation: Wanted = dataclasses.field(default=None, metadata={"static": True})
    ring: tuple[Mesh, str] | None = dataclasses.field(default=None, metadata={"static": True})
    together: Any = None
    choices: Any = None
    per_layer: ClassVar[bool] = False

    @classmethod
    def of(
        cls,
        tokens: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"] | None = None,
        *,
        together: Int[Array, "batch time"] | None = None,
        choices: Int[Array, "layers batch*time k"] | None = None,
        implementation: Wanted = None,
        ring: tuple[Mesh, str] | None = None,
    ) -> "DenseMixer":
        """Return the mixer for a batch of rows.

        Raises:
            ValueError: `tokens` are not ``[batch, time]``, `segment_ids`, `together` or `choices` do not fit them, or
                rows are not a multiple of the devices of the `ring`.
            TypeError: `choices` are no integers.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens have shape {tokens.shape}; expected [batch, time]")
        for name, x in (("segment_ids", segment_ids), ("together", together)):
            if x is not None and x.shape != tokens.shape:
                raise ValueError(f"{name} have shape {x.shape}; expected that of tokens, {tokens.shape}")
        if choices is not None and (choices.ndim != 3 or choices.shape[1] != tokens.size):
            raise ValueError(f"choices have shape {choices.shape}; expected [layers, {tokens.size}, k]")
        if choices is not None and not jnp.issubdtype(choices.dtype, jnp.integer):
            raise TypeError(f"choices have dtype {choices.dtype}; expected integers, -1 where a token chooses now")
        devices = 1 if ring is None else ring[0].shape[ring[1]]
        if tokens.shape[1] % devices:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens over {devices} devices of the ring; expected a multiple"
            )
        return cls(segment_ids, tokens.shape[0], tokens.shape[1], implementation, ring, together, choices)

    def attend(
        self,
        layer: LayerIndex,
        query: Float[Array, "tokens heads key_dim"],
        key: Float[Array, "tokens kv_heads key_dim"],
        value: Float[Array, "tokens kv_heads value_dim"],
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Float[Array, " heads"] | None = None,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "DenseMixer"]:
        """Attend within rows; `layer` does not matter here. See `dovetail_protocols.Mixer.attend`.

        A window limits how far back tokens see, those that see each other included.

        Raises:
            ValueError: not ``batch * time`` tokens; for the rest see `dovetail_kernels.attention`.
        """
        del layer
        for name, x in (("query", query), ("key", key), ("value", value)):
            if x.ndim != 3 or x.shape[0] != self.batch * self.time:
                raise ValueError(f"{name} has shape {x.shape}; expected [{self.batch * self.time}, heads, dim]")

        def rows(x: jax.Array) -> jax.Array:
            return x.reshape(self.batch, self.time, *x.shape[1:])

        def part(q: jax.Array, k: jax.Array, v: jax.Array, ids: Any, near: Any, sinks: Any) -> jax.Array:
            mask = causal() if near is None else causal() | segments(near)
            if window is not None:
                mask = mask & sliding(window)
            if ids is not None:
                mask = mask & segments(ids)
            attend = attention if self.ring is None else functools.partial(ring_attention, axis=self.ring[1])
            return attend(q, k, v, mask, sinks=sinks, softcap=softcap, scale=scale, implementation=self.implementation)

        if self.ring is not None:
            mesh, axis = self.ring
            split = PartitionSpec(None, axis)
            part = jax.shard_map(
                part,
                mesh=mesh,
                in_specs=(split,) * 5 + (PartitionSpec(),),
                out_specs=split,
                axis_names={axis},
            )
        out = part(rows(query), rows(key), rows(value), self.segment_ids, self.together, sinks)
        return out.reshape(-1, *out.shape[2:]), self

    def attend_latent(
        self,
        layer: LayerIndex,
        query: Float[Array, "tokens heads key_dim"],
        latent: Float[Array, "tokens latent_dim"],
        rope_key: Float[Array, "tokens rope_dim"],
        expand: tuple[Any, Any],
        *,
        scale: float,
    ) -> tuple[Float[Array, "tokens heads value_dim"], "DenseMixer"]:
        """Attend with the expanded keys and values. See `dovetail_protocols.Mixer.attend_latent`.

        Raises:
            ValueError: as `attend`.
        """
        keys, values = (einsum("tl,lhd->thd", latent, weight) for weight in expand)
        shared = jnp.broadcast_to(rope_key[:, None], (*keys.shape[:2], rope_key.shape[1]))
        return self.attend(layer, query, jnp.concatenate([keys, shared], axis=-1), values, scale=scale)

    def totals(self, values: Float[Array, "tokens values"]) -> Float[Array, "sequences values"]:
        """Return the sums over the tokens of each sequence, see `dovetail_protocols.Mixer.totals`.

        The tokens of a segment stand together. With segments there are ``batch * time`` rows, else `batch`.
        """
        rows = values.reshape(self.batch, self.time, -1)
        if self.segment_ids is None:
            return jnp.sum(rows, axis=1)
        ids = self.segment_ids
        changes = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        place = jnp.cumsum(changes, axis=1, dtype=jnp.int32)

        def sums(x: jax.Array, place: jax.Array, ids: jax.Array) -> jax.Array:
            return jnp.zeros_like(x).at[place].add(jnp.where((ids != 0)[:, None], x, jnp.zeros((), x.dtype)))

        return jax.vmap(sums)(rows, place, ids).reshape(values.shape)

    def choose(self, layer: LayerIndex, experts: Int[Array, "tokens k"]) -> tuple[Int[Array, "tokens k"], "DenseMixer"]:
        """Return what tokens chose before, see `dovetail_protocols.Mixer.choose`.

        In layers that `choices` do not reach, as those of heads that look ahead, tokens choose now.
        """
        if self.choices is None:
            return experts, self
        found = jax.lax.dynamic_index_in_dim(self.choices, layer, 0, False)
        return jnp.where(layer < self.choices.shape[0], found, -1), self

    def recur(
        self, layer: LayerIndex, recurrence: Any, inputs: tuple[Float[Array, "tokens ..."], ...]
    ) -> tuple[Float[Array, "tokens ..."], "DenseMixer"]:
        """Run each segment from zeros; `layer` does not matter here. See `dovetail_protocols.Mixer.recur`.

        Raises:
            ValueError: not ``batch * time`` tokens.
        """
        del layer
        for x in inputs:
            if x.shape[0] != self.batch * self.time:
                raise ValueError(f"an input has shape {x.shape}; expected {self.batch * self.time} tokens")
        rows = tuple(x.reshape(self.batch, self.time, *x.shape[1:]) for x in inputs)
        spec = recurrence.cache_spec()
        state = {name: jnp.zeros((self.batch, *shape), jnp.float32) for name, shape in spec.state}
        out, _ = recurrence.chunk(state, rows, self.segment_ids)
        return out.reshape(-1, *out.shape[2:]), self
