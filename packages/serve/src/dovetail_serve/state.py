"""`State`: what the requests of one server share."""

import asyncio
import concurrent.futures
import logging
import math
import time
from collections.abc import Callable

from dovetail_protocols import Engine, Tokenizer
from dovetail_serve.admission import Admission
from dovetail_serve.bridge import Bridge, Inbox
from dovetail_serve.errors import ApiError
from dovetail_serve.metrics import Metrics
from dovetail_serve.options import ServeOptions
from dovetail_serve.tokens import TokenTexts

__all__ = ["State"]

LOG = logging.getLogger("dovetail_serve")
THREADS = 4


class State:
    """The engine, the tokenizer, the limits, and which requests are open.

    What may block (tokenising, the engine's methods) runs in a few threads of `pool`; everything else belongs to the
    event loop.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, model: str, options: ServeOptions) -> None:
        self.engine, self.tokenizer, self.model, self.options = engine, tokenizer, model, options
        self.admission = Admission(options.max_queue)
        self.metrics = Metrics(engine, self.admission, options.metrics_prefix)
        self.texts = TokenTexts(tokenizer)
        self.pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="dovetail-serve")
        self.created = int(time.time())
        self.open: set[Inbox] = set()
        self.engine_closed = False
        self._bridge: Bridge | None = None
        self._deadline: float | None = None

    @property
    def bridge(self) -> Bridge:
        """The bridge to the running event loop."""
        loop = asyncio.get_running_loop()
        if self._bridge is None or self._bridge.loop is not loop:
            self._bridge = Bridge(loop)
        return self._bridge

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server stops."""
        return self._deadline is not None

    def drain(self) -> None:
        """Refuse new requests from now on; what was accepted goes on until the deadline. On the loop's thread."""
        if self._deadline is None:
            seconds = self.options.drain_seconds
            self._deadline = time.monotonic() + seconds
            LOG.info("draining: %d replies in flight, at most %g s", self.admission.used, seconds)
            asyncio.get_running_loop().call_later(seconds, self.abort)

    def abort(self) -> None:
        """Answer every open request with an error now."""
        for inbox in self.open:
            inbox.end(ApiError(503, "the server stopped before the reply was complete", code="draining", retry_after=1))

    def check_open(self) -> None:
        """Raise a 503 when new requests are refused.

        Raises:
            ApiError: the server drains.
        """
        if self._deadline is not None:
            wait = max(1, math.ceil(self._deadline - time.monotonic()))
            raise ApiError(503, "the server is stopping; ask another one", code="draining", retry_after=wait)

    async def health(self) -> None:
        """Raise a 503 unless requests can be served; asks the engine.

        Raises:
            ApiError: the server drains, the engine is not ready (or, where it does not tell, refused the last
                request), or does not answer.
        """
        self.check_open()
        try:
            stats = await asyncio.get_running_loop().run_in_executor(self.pool, self.engine.stats)
        except Exception as error:
            LOG.warning("health: the engine's stats failed: %r", error)
            raise ApiError(503, f"the engine does not answer: {error}", code="engine_closed", retry_after=60) from error
        if not stats.get("ready", not self.engine_closed):
            raise ApiError(503, "the engine refuses requests", code="engine_closed", retry_after=60)

    def later(self, work: Callable[[], None]) -> None:
        """Run something that may block in a thread, or here and now when the threads have ended."""
        try:
            self.pool.submit(work)
        except RuntimeError:
            work()

    def close(self) -> None:
        """End the threads once what they do is done."""
        self.pool.shutdown(wait=False)
