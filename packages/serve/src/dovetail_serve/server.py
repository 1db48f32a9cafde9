"""`serve` and `Server`: the application on uvicorn, in the main thread until a signal or beside it for a while."""

import asyncio
import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator
from types import FrameType, TracebackType

import uvicorn

from dovetail_protocols import Engine, Tokenizer
from dovetail_serve.app import App, create_app
from dovetail_serve.options import ServeOptions

__all__ = ["Server", "serve"]

BACKLOG = 2048
KEEP_ALIVE = 75
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    engine: Engine,
    tokenizer: Tokenizer,
    *,
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: ServeOptions | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the OpenAI API until SIGTERM or Ctrl-C, then answer what was accepted and return.

    From the signal on new requests are refused. What was accepted has ``options.drain_seconds``; a second signal ends
    it at once with an error. The engine stays open: it is the caller's.

    Args:
        engine: any engine.
        tokenizer: the tokenizer of its model.
        model: the name that requests must have in `model`.
        host: the address to listen on.
        port: the port to listen on; 0 for any free one.
        options: limits and defaults.
        ready: called with the server's URL once it answers.

    Raises:
        OSError: the address cannot be had, for example because the port is in use.
        ValueError: the port is no port.
        TypeError: the engine or the tokenizer lacks something that its contract has.
    """
    app = create_app(engine, tokenizer, model=model, options=options)
    with _listen(host, port) as listening:
        asyncio.run(_Uvicorn(app, ready, _url(host, listening)).serve([listening]))


class Server:
    """The server in a thread of its own, for as long as a ``with`` block lasts.

    Leaving the block drains as `serve` does. It takes the arguments of `serve`; the port is a free one by default.

    Raises:
        OSError: the address cannot be had.

    >>> from dovetail_protocols.testing import FakeEngine
    >>> from dovetail_serve.testing import ByteTokenizer
    >>> import urllib.request
    >>> with Server(FakeEngine(), ByteTokenizer(), model="fake") as server:
    ...     urllib.request.urlopen(server.url + "/health").status
    200
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        *,
        model: str,
        host: str = "127.0.0.1",
        port: int = 0,
        options: ServeOptions | None = None,
    ) -> None:
        app = create_app(engine, tokenizer, model=model, options=options)
        self._listening = _listen(host, port)
        self.url = _url(host, self._listening)
        self._begun = threading.Event()
        self._uvicorn = _Uvicorn(app, lambda _: self._begun.set(), self.url)
        self._thread = threading.Thread(target=self._run, name="dovetail-serve-loop", daemon=True)
        self._failure: BaseException | None = None

    @property
    def base_url(self) -> str:
        """The `base_url` of an OpenAI client."""
        return f"{self.url}/v1"

    def __enter__(self) -> "Server":
        self._thread.start()
        self._begun.wait()
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer what was accepted, then stop; a second call does nothing."""
        if self._thread.is_alive():
            self._uvicorn.stop()
            self._thread.join()
        self._listening.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._uvicorn.serve([self._listening]))
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits for the start
            self._failure = error
        finally:
            self._begun.set()


class _Uvicorn(uvicorn.Server):
    """uvicorn's server that drains the application, and after a signal returns instead of dying of it."""

    def __init__(self, app: App, ready: Callable[[str], None] | None, url: str) -> None:
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]  plain dictionaries instead of uvicorn's typed ones
            lifespan="on",
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=math.ceil(app.state.options.drain_seconds) + 2,
        )
        super().__init__(config)
        self._state, self._ready, self._url = app.state, ready, url
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._ready is not None:
            self._ready(self._url)

    def stop(self) -> None:
        """Drain and stop; from any thread."""
        self.should_exit = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._state.drain)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        if self.should_exit and self._loop is not None:
            self._loop.call_soon_threadsafe(self._state.abort)
        else:
            self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port={port}; expected 0 (any free one) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        message = f"cannot listen on {host} port {port}: {reason}; choose another, or port 0 for any free one"
        raise OSError(error.errno, message) from error


def _url(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
