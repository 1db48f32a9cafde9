"""States of recurrent layers: a slot of a pool for every running sequence, and how several sequences share a step.

The pool of a layer is ``{name: [slots, *shape]}`` in float32; a sequence has the same slot in all layers. Slot 0
belongs to nobody: padding goes there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dovetail_protocols import Recurrence

__all__ = ["PIECE", "Pieces", "States", "advance", "run_pieces"]

PIECE = 64
"""Tokens that run at once: with more, the last piece of a chunk has more padding; with fewer, there are more turns."""

States: TypeAlias = dict[str, Any]
"""Names and arrays, the first axis for slots or rows."""


class Pieces(NamedTuple):
    """Chunks of sequences, cut into pieces that run one after the other, and the slots of single tokens beside them.

    Attributes:
        starts: int ``[pieces]``: where the first token of each stands; they ascend.
        lengths: int ``[pieces]``: tokens, at most `size`.
        slots: int ``[pieces]``.
        fresh: bool ``[pieces]``: the sequence begins here.
        used: int: how many there are.
        newest: int ``[rows]``: the slots of single tokens, 0 where there is none.
    """

    starts: Any
    lengths: Any
    slots: Any
    fresh: Any
    used: Any
    newest: Any

    @staticmethod
    def size(tokens: int) -> int:
        """Return the tokens of a piece in a step of some tokens."""
        return min(tokens, PIECE)

    @classmethod
    def blank(cls, tokens: int, chunks: int, rows: int) -> "Pieces":
        """Return room for the pieces of a step of `tokens` tokens, of at most `chunks` chunks."""
        most = tokens // cls.size(tokens) + chunks
        starts, lengths, slots, newest = (np.zeros(n, np.int32) for n in (most, most, most, rows))
        return cls(starts, lengths, slots, np.zeros(most, np.bool_), np.int32(0), newest)

    def cut(self, tokens: int, chunks: Sequence[tuple[int, int, int, bool]]) -> "Pieces":
        """Return the pieces of chunks ``(start, length, slot, fresh)`` in a step of `tokens` tokens."""
        size, at = self.size(tokens), 0
        for start, length, slot, fresh in chunks:
            for done in range(0, length, size):
                values = start + done, min(size, length - done), slot, fresh and not done
                for array, value in zip(self, values, strict=False):
                    array[at] = value
                at += 1
        return self._replace(used=np.int32(at))


def run_pieces(
    recurrence: Recurrence, pool: States, inputs: tuple[Float[Array, "tokens ..."], ...], pieces: Pieces
) -> tuple[Float[Array, "tokens ..."], States]:
    """Run a layer's recurrence over pieces, each from the state in its slot, which it replaces.

    A piece always reads `Pieces.size` tokens, those beyond its own as padding, and writes as many outputs; the next
    piece replaces those that are not its own.
    """
    tokens = inputs[0].shape[0]
    size = pieces.size(tokens)
    padded = [jnp.pad(x, ((0, size), *[(0, 0)] * (x.ndim - 1))) for x in inputs]

    def turn(i: jax.Array, state: States) -> tuple[jax.Array, States]:
        now = tuple(jax.lax.dynamic_slice_in_dim(x, pieces.starts[i], size)[None] for x in padded)
        own = jnp.arange(size, dtype=jnp.int32) < pieces.lengths[i]
        out, after = recurrence.chunk(state, now, own.astype(jnp.int32)[None])
        return out[0], {name: x[0] for name, x in after.items()}

    def body(i: jax.Array, carry: tuple[jax.Array, States]) -> tuple[jax.Array, States]:
        outs, pool = carry
        slot = pieces.slots[i]
        before = {name: jnp.where(pieces.fresh[i], 0.0, held[slot])[None] for name, held in pool.items()}
        out, after = turn(i, before)
        pool = {name: held.at[slot].set(after[name].astype(held.dtype)) for name, held in pool.items()}
        return jax.lax.dynamic_update_slice_in_dim(outs, out, pieces.starts[i], 0), pool

    one = {name: held[:1] for name, held in pool.items()}
    like = jax.eval_shape(turn, jnp.int32(0), one)[0]
    empty = jnp.zeros((tokens + size, *like.shape[1:]), like.dtype)
    outs, pool = jax.lax.fori_loop(0, pieces.used, body, (empty, pool))
    return outs[:tokens], pool


def advance(
    recurrence: Recurrence, state: States, inputs: tuple[Float[Array, "rows ..."], ...]
) -> tuple[Float[Array, "rows ..."], States]:
    """Run a layer's recurrence for one token per row; the state keeps its dtypes."""
    out, after = recurrence.step(state, inputs)
    return out, {name: after[name].astype(old.dtype) for name, old in state.items()}
