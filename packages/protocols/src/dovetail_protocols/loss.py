"""Loss: sums with weights, so that one rule makes accumulation, data parallelism and packing exact."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import jax

__all__ = ["Loss", "LossOutput", "Term"]


class Term(NamedTuple):
    """One additive quantity: its mean is ``sum / weight``, and both add up over rows.

    Attributes:
        sum: scalar.
        weight: scalar; a function of the batch alone, never of the parameters.
    """

    sum: "jax.Array"
    weight: "jax.Array"


class LossOutput(NamedTuple):
    """What a loss returns.

    Attributes:
        sum: scalar, the main loss summed over the rows of the batch.
        weight: scalar, by which the sum of a whole step is divided.
        aux: ``{name: Term}``. A name that starts with ``loss/`` is added to the objective, each divided by its own
            step-wide weight (multiply its coefficient into the sum); every other is only reported.
    """

    sum: "jax.Array"
    weight: "jax.Array"
    aux: Mapping[str, Term]


@runtime_checkable
class Loss(Protocol):
    """A pure function ``loss(params, batch) -> LossOutput``.

    Every sum and weight is additive over rows: ``loss(params, a ++ b) == loss(params, a) + loss(params, b)``. The
    step adds the weights of all micro-batches first and scales each sum once.
    """

    def __call__(self, params: Any, batch: Any) -> LossOutput:
        """Evaluate the loss on the rows of `batch`."""
        ...
