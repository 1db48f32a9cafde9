"""From the engine's threads to the event loop: one pending wake-up for all streams, not one for each delta."""

import asyncio
import collections
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from dovetail_protocols import Delta, Stream

__all__ = ["Arrival", "Bridge", "Disconnected", "Inbox", "Streams"]


class Disconnected(Exception):
    """The client is gone."""


class Arrival(NamedTuple):
    """A delta, which reply it belongs to and when the engine gave it (`time.perf_counter`)."""

    reply: int
    delta: Delta
    when: float


class Inbox:
    """What has arrived for one request and was not yet taken; bounded because every reply has a length limit."""

    def __init__(self) -> None:
        self._arrived: list[Arrival] = []
        self._event = asyncio.Event()
        self._end: Exception | None = None

    def put(self, arrival: Arrival) -> None:
        """Add an arrival; on the event loop's thread."""
        self._arrived.append(arrival)
        self._event.set()

    def end(self, error: Exception) -> None:
        """Let `take` raise from now on, because the client is gone or the server stops."""
        self._end = self._end or error
        self._event.set()

    async def take(self) -> list[Arrival]:
        """Wait for arrivals and return all that are there, in order."""
        await self._event.wait()
        self._event.clear()
        if self._end is not None:
            raise self._end
        arrived, self._arrived = self._arrived, []
        return arrived

    def check(self) -> None:
        """Raise what `take` would raise now."""
        if self._end is not None:
            raise self._end


class Bridge:
    """Carries deltas from any thread to the inboxes of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pending: collections.deque[tuple[Inbox, Arrival]] = collections.deque()
        self._woken = False

    def to(self, inbox: Inbox, index: int) -> Callable[[Delta], None]:
        """Return the `deliver` of one reply."""

        def deliver(delta: Delta) -> None:
            self._pending.append((inbox, Arrival(index, delta, time.perf_counter())))
            if not self._woken:
                self._wake()

        return deliver

    def _wake(self) -> None:
        self._woken = True
        try:
            self.loop.call_soon_threadsafe(self._dispatch)
        except RuntimeError:  # the loop is closed: nobody waits for what comes now
            self._pending.clear()

    def _dispatch(self) -> None:
        self._woken = False  # first, so that what is added from here on wakes the loop again
        while self._pending:
            inbox, arrival = self._pending.popleft()
            inbox.put(arrival)


class Streams:
    """The engine's streams of one request; closing cancels those that run and those that would still be added."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: list[Stream] = []
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nobody waits for the replies any more."""
        return self._closed

    def add(self, stream: Stream) -> None:
        """Keep a stream, or close it at once when the request has ended."""
        with self._lock:
            if not self._closed:
                self._streams.append(stream)
                return
        stream.close()

    def close(self) -> None:
        """Close all streams; closing one that has ended does nothing."""
        with self._lock:
            self._closed = True
            streams, self._streams = self._streams, []
        for stream in streams:
            stream.close()
