"""Checkpointer: one atomic step for model, optimizer, data position and random keys."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

__all__ = ["Checkpointer", "Restored"]


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns.

    Attributes:
        step: the step that was restored.
        state: a pytree like the one that was asked for.
        meta: the JSON value given to `save`.
    """

    step: int
    state: Any
    meta: dict[str, Any]


@runtime_checkable
class Checkpointer(Protocol):
    """Saves and restores steps. A step is visible in whole or not at all."""

    def save(
        self,
        step: int,
        state: Any,
        *,
        data: Any = None,
        meta: dict[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begin to save a step; the values are those at the time of the call, whatever happens to them after.

        Args:
            step: a step that has not been saved.
            state: a pytree of arrays (typed random keys included), numbers and None.
            data: a loader, whose `get_state` goes into the same step.
            meta: a JSON value.
            metrics: numbers by name, for a policy that keeps the best steps; NaN is allowed.

        Raises:
            ValueError: the step exists.
            Exception: the previous asynchronous save failed.
        """
        ...

    def restore(self, like: Any = None, *, data: Any = None, step: int | None = None) -> Restored:
        """Restore a step, by default the latest; `data` is set to the saved position.

        Args:
            like: a pytree of arrays or ``jax.ShapeDtypeStruct`` with shardings; None restores NumPy arrays.
            data: a loader.
            step: which step.

        Raises:
            FileNotFoundError: there is no such step.
            ValueError: the saved tree differs from `like`; the message names the leaf and both values.
        """
        ...

    def steps(self) -> list[int]:
        """Return the committed steps, ascending, read from the storage."""
        ...

    def wait(self) -> None:
        """Return when every save is committed; raise what one of them raised."""
        ...

    def close(self) -> None:
        """Wait, then release threads and files."""
        ...
