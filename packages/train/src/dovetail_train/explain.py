"""What a step holds and costs, before it runs."""

import dataclasses
import math
from typing import Any

import jax

from dovetail_profile import cost, memory
from dovetail_train.step import TrainState

__all__ = ["Explanation", "explain"]


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Size and cost of a training step.

    Attributes:
        parameters: how many numbers are trained.
        parameter_bytes: their memory over all devices.
        optimizer_bytes: memory of the optimizer's state.
        flops: floating-point operations in the matrix products of one step, over all devices, loops counted exactly.
        temporary_bytes: what XLA allocates while the step runs, per device.
    """

    parameters: int
    parameter_bytes: int
    optimizer_bytes: int
    flops: int
    temporary_bytes: int

    def __str__(self) -> str:
        mib = 2.0**20
        return (
            f"{self.parameters:,} parameters ({self.parameter_bytes / mib:.1f} MiB), "
            f"optimizer {self.optimizer_bytes / mib:.1f} MiB, temporary {self.temporary_bytes / mib:.1f} MiB, "
            f"{self.flops / 1e9:.1f} GFLOP of products per step"
        )


def explain(step: Any, state: TrainState, batch: Any) -> Explanation:
    """Explain a jitted ``step(state, batch)``; compiles it, runs nothing."""
    return Explanation(
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        parameter_bytes=_bytes(state.params),
        optimizer_bytes=_bytes(state.opt_state),
        flops=cost(step, state, batch).matmul_flops,
        temporary_bytes=memory(step.lower(state, batch).compile()).temporaries,
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
