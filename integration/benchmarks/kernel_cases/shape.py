"""What the modules of this folder declare, and a function with its gradients. Standard library only at import."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MODULES = (
    "attention",
    "cross_entropy",
    "delta_rule",
    "embedding",
    "glu",
    "norm",
    "paged_attention",
    "quantized_matmul",
    "ragged_dot",
    "sampling",
    "ssd",
    "triangle",
)


class Shape(NamedTuple):
    """One case of an operation.

    Attributes:
        name: what the results call it, next to the sizes.
        config: sizes and flags.
        vary: sizes to draw neighbours of, with the number that they stay a multiple of.
        peer: "jax" or "tokamax".
        inner: calls per turn, so that a turn takes about 0.2 s.
        starts: pairs of processes to pool.
        tolerance: of the results, relative to the largest projection.
    """

    name: str
    config: Mapping[str, Any]
    vary: Mapping[str, int]
    peer: str = "jax"
    inner: int = 1
    starts: int = 1
    tolerance: float = 1e-3


def gradients(function: Callable[..., Any], arguments: tuple[int, ...]) -> Callable[..., Any]:
    """Return a function that also returns the gradients of half the sum of squares of the result."""

    def both(*operands: Any) -> Any:
        import jax

        chosen = [operands[i] for i in arguments]

        def call(*values: Any) -> Any:
            given = list(operands)
            for place, value in zip(arguments, values, strict=True):
                given[place] = value
            return function(*given)

        out, pull = jax.vjp(call, *chosen)
        return out, pull(out)

    return both
