"""The recurrence kit accepts a good recurrence and rejects each named broken one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dovetail_protocols import Recurrence
from dovetail_protocols.testing import ConformanceError, check_recurrence
from dovetail_protocols.testing.recurrence import Fading

PARAMETERS = jnp.array([1.0, -0.5, 2.0]), jnp.array([0.3, 1.0, -1.0])


def inputs():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 9, 3)).astype(np.float32), rng.uniform(0.5, 1, (2, 9)).astype(np.float32)


class ForgetsTheState(Fading):
    def chunk(self, state, inputs, segment_ids):
        return super().chunk(jax.tree.map(jnp.zeros_like, state), inputs, segment_ids)


class IgnoresSegments(Fading):
    def chunk(self, state, inputs, segment_ids):
        ids = None if segment_ids is None else jnp.where(segment_ids != 0, 1, 0)
        return super().chunk(state, inputs, ids)


class ClearsTheStateFirst(Fading):
    def chunk(self, state, inputs, segment_ids):
        state = state if segment_ids is None else jax.tree.map(jnp.zeros_like, state)
        return super().chunk(state, inputs, segment_ids)


class PaddingIsAToken(Fading):
    def chunk(self, state, inputs, segment_ids):
        ids = None if segment_ids is None else jnp.where(segment_ids == 0, jnp.roll(segment_ids, 1, 1), segment_ids)
        return super().chunk(state, tuple(map(jnp.nan_to_num, inputs)), ids)


class PaddingIsNaN(Fading):
    def chunk(self, state, inputs, segment_ids):
        out, state = super().chunk(state, inputs, segment_ids)
        return out + 0 * inputs[0], state


class MultipliesPaddingByZero(Fading):
    def chunk(self, state, inputs, segment_ids):
        x, gate = inputs
        if segment_ids is not None:
            x = x * (segment_ids != 0)[..., None].astype(x.dtype)
        out, after = super().chunk(state, (x, gate), segment_ids)
        return jnp.nan_to_num(out), {**after, "total": after["total"] + 0 * jnp.sum(x, 1)}


class StepsAnotherWay(Fading):
    def chunk(self, state, inputs, segment_ids):
        return Fading(self.mix, self.shift + 0.1).chunk(state, inputs, segment_ids)


class ReturnsTheStateBefore(Fading):
    def chunk(self, state, inputs, segment_ids):
        return super().chunk(state, inputs, segment_ids)[0], state


class MixesRows(Fading):
    def step(self, state, inputs):
        out, state = super().step(state, inputs)
        return out + 0.1 * jnp.mean(out, 0), state


class AnotherShape(Fading):
    def step(self, state, inputs):
        out, state = super().step(state, inputs)
        return out, {**state, "before": state["before"][:, 0]}


class AnotherName(Fading):
    def chunk(self, state, inputs, segment_ids):
        out, state = super().chunk(state, inputs, segment_ids)
        return out, {"sum": state["total"], "before": state["before"]}


class OneOutput(Fading):
    def chunk(self, state, inputs, segment_ids):
        out, state = super().chunk(state, inputs, segment_ids)
        return out[:, -1], state


class NoPytree(Fading):
    pass


MUTANTS = [
    ForgetsTheState,
    IgnoresSegments,
    ClearsTheStateFirst,
    PaddingIsAToken,
    PaddingIsNaN,
    MultipliesPaddingByZero,
    StepsAnotherWay,
    ReturnsTheStateBefore,
    MixesRows,
    AnotherShape,
    AnotherName,
    OneOutput,
]
for kind in MUTANTS:
    jax.tree_util.register_dataclass(kind)


def test_a_good_recurrence_passes():
    assert isinstance(Fading(*PARAMETERS), Recurrence)
    check_recurrence(Fading(*PARAMETERS), inputs())


@pytest.mark.parametrize("mutant", [*MUTANTS, NoPytree], ids=lambda kind: kind.__name__)
def test_broken_recurrences_are_rejected(mutant):
    with pytest.raises(ConformanceError, match="Recurrence: "):
        check_recurrence(mutant(*PARAMETERS), inputs())
