"""Loaders and plans: data order is a pure function of (data fingerprint, seed, step)."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

__all__ = ["Loader", "Plan"]


@runtime_checkable
class Loader(Protocol):
    """A Python iterator over batches that can be saved and put back (the contract of a Grain iterator)."""

    def __iter__(self) -> Iterator[Any]:
        """Return the loader itself."""
        ...

    def __next__(self) -> Any:
        """Return the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return a JSON-serialisable description of the position of the *consumer* (not of a prefetcher)."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `get_state` was called.

        Raises:
            ValueError: the state belongs to other data; the message names the difference.
        """
        ...


@runtime_checkable
class Plan(Protocol):
    """Random access to the global batch of any step."""

    @property
    def fingerprint(self) -> str:
        """What the order depends on: the data's content, the seed, the row and batch sizes."""
        ...

    def at(self, step: int) -> Any:
        """Return the global batch of a step as NumPy arrays.

        Raises:
            IndexError: `step` is negative or past the end of a finite plan.
        """
        ...
