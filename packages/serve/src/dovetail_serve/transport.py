"""Raw ASGI: reading a body, sending an answer, and whether the client is still there."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from dovetail_serve.bridge import Disconnected, Inbox
from dovetail_serve.errors import ApiError, error_body

__all__ = [
    "JSON",
    "STREAM",
    "Receive",
    "Scope",
    "Send",
    "Writer",
    "read_body",
    "send_answer",
    "send_error",
    "start",
    "watch",
]

Scope: TypeAlias = dict[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[dict[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

JSON = b"application/json"
STREAM = b"text/event-stream; charset=utf-8"


async def read_body(scope: Scope, receive: Receive, *, limit: int, seconds: float) -> bytes:
    """Read a request's body.

    Raises:
        ApiError: 413, it is longer than `limit`, whatever its header says; 408, it takes longer than `seconds`.
        Disconnected: the client left.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"")
    if announced.isdigit() and len(announced) < 20 and int(announced) > limit:
        raise _too_large(int(announced), limit)
    try:
        async with asyncio.timeout(seconds):
            return await _read(receive, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} s", code="request_timeout") from None


async def _read(receive: Receive, limit: int) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_large(len(body), limit)
        if not message.get("more_body", False):
            return body


def _too_large(size: int, limit: int) -> ApiError:
    return ApiError(413, f"the body has at least {size} bytes; expected at most {limit}", code="request_too_large")


async def watch(receive: Receive, inbox: Inbox) -> None:
    """Wait until the client leaves and say so to the inbox."""
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.end(Disconnected())


async def start(send: Send, status: int, content_type: bytes, headers: Headers = ()) -> None:
    """Send the status and the headers."""
    found = [(b"content-type", content_type), *headers]
    await send({"type": "http.response.start", "status": status, "headers": found})


async def send_answer(
    send: Send, body: bytes, *, status: int = 200, content_type: bytes = JSON, headers: Headers = ()
) -> None:
    """Send a whole answer."""
    await start(send, status, content_type, [(b"content-length", b"%d" % len(body)), *headers])
    await send({"type": "http.response.body", "body": body})


async def send_error(send: Send, error: ApiError, headers: Headers = ()) -> None:
    """Send an error as JSON, with its ``Retry-After``."""
    if error.retry_after is not None:
        headers = [*headers, (b"retry-after", b"%d" % error.retry_after)]
    await send_answer(send, error_body(error), status=error.status, headers=headers)


class Writer:
    """Sends the pieces of a streamed body; a client that reads nothing for too long counts as one that left.

    One timer watches the whole stream: a timeout for each piece would cost as much as writing it.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self._seconds = send, seconds
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        self._began: float | None = None
        self._stalled = False
        self._timer = self._loop.call_later(seconds, self._look)

    async def write(self, data: bytes, *, more: bool = True) -> None:
        """Send a piece, waiting while the client is slow.

        Raises:
            Disconnected: nothing was read for too long.
        """
        self._began = self._loop.time()
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except asyncio.CancelledError:
            if not self._stalled or self._task is None:
                raise
            self._task.uncancel()
            raise Disconnected from None
        finally:
            self._began = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._seconds if self._began is None else self._began + self._seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        elif self._task is not None:
            self._stalled = True
            self._task.cancel()
