"""Streams: how deltas leave the engine's thread."""

import queue
import weakref
from collections.abc import Callable, Iterator

from dovetail_protocols import Delta

__all__ = ["QueueStream"]


class QueueStream:
    """The stream of one request; meets `dovetail_protocols.Stream`.

    A context manager, and closed when it is forgotten: leaving a ``for`` loop early frees what the request held.

    Args:
        cancel: cancels the request; does nothing once it has ended.
        deliver: where deltas go instead, so that nobody iterates and forgetting the stream means nothing.
    """

    def __init__(self, cancel: Callable[[], object], deliver: Callable[[Delta], None] | None) -> None:
        self.deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._ended = deliver is not None
        self._cancel = cancel
        if deliver is None:
            weakref.finalize(self, cancel).atexit = False

    def __iter__(self) -> Iterator[Delta]:
        """Return the stream itself."""
        return self

    def __next__(self) -> Delta:
        """Block until the next delta."""
        if self._ended:
            raise StopIteration
        delta = self.deltas.get()
        self._ended = delta.finish_reason is not None
        return delta

    def close(self) -> None:
        """Cancel the request if it still runs."""
        self._cancel()

    def __enter__(self) -> "QueueStream":
        """Return the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
