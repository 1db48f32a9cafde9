"""One request for replies, from its body to the last byte of the answer."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable

from dovetail_protocols import Completion, Delta, Request, Tokenizer
from dovetail_serve.bridge import Disconnected, Inbox, Streams
from dovetail_serve.calls import Call, Prompt, encode, read_chat, read_completion
from dovetail_serve.errors import ApiError
from dovetail_serve.formats import ChatFormat, CompletionFormat, event
from dovetail_serve.metrics import ReplyClock
from dovetail_serve.schema import Usage
from dovetail_serve.state import State
from dovetail_serve.tokens import TokenTexts
from dovetail_serve.transport import STREAM, Receive, Scope, Send, Writer, read_body, send_answer, start, watch

__all__ = ["Generation", "generate"]

LOG = logging.getLogger("dovetail_serve")
TOO_LONG = re.compile(r"length|context|too long", re.IGNORECASE)
Make = Callable[[Call, Tokenizer, TokenTexts], ChatFormat | CompletionFormat]


async def generate(state: State, scope: Scope, receive: Receive, send: Send, *, chat: bool) -> None:
    """Answer a request for completions or chat completions.

    Raises:
        ApiError: the answer, as long as none was begun.
        Disconnected: the client left; what it asked for was cancelled.
    """
    started = time.perf_counter()
    state.check_open()
    state.admission.enter(1)
    held = 1
    seconds = None
    try:
        options = state.options
        body = await read_body(scope, receive, limit=options.max_body_bytes, seconds=options.read_seconds)
        call = (read_chat if chat else read_completion)(body)
        _check_model(call.model, state)
        _check_replies(call, options.max_queue)
        state.admission.enter(call.replies - 1)
        held = call.replies
        await Generation(state, call, started, ChatFormat if chat else CompletionFormat).run(receive, send)
        seconds = time.perf_counter() - started
    finally:
        state.admission.leave(held, seconds)


def _check_model(model: str, state: State) -> None:
    if model != state.model:
        message = f"the model {model[:200]!r} does not exist; this server has {state.model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _check_replies(call: Call, limit: int) -> None:
    if call.replies > limit:
        name = "n" if call.n > limit or call.messages else "prompt"
        message = f"{name} asks for {call.replies} replies; expected at most {limit} in one request"
        raise ApiError(400, message, param=name, code="invalid_value")


class Generation:
    """The replies to one call."""

    def __init__(self, state: State, call: Call, started: float, make: Make) -> None:
        self.state, self.call = state, call
        self.format = make(call, state.tokenizer, state.texts)
        self.inbox, self.streams = Inbox(), Streams()
        self.clocks = [ReplyClock(state.metrics, started) for _ in range(call.replies)]
        self.usage = Usage(0, 0, 0)
        self._bridge = state.bridge

    async def run(self, receive: Receive, send: Send) -> None:
        """Submit the requests and answer; whatever happens, nothing goes on in the engine afterwards."""
        watcher = asyncio.ensure_future(watch(receive, self.inbox))
        self.state.open.add(self.inbox)
        ended = False
        try:
            await asyncio.get_running_loop().run_in_executor(self.state.pool, self._submit)
            self.inbox.check()
            self.state.metrics.prompt_tokens.inc(self.usage.prompt_tokens)
            ended = await (self._stream(send) if self.call.stream else self._whole(send))
        finally:
            watcher.cancel()
            self.state.open.discard(self.inbox)
            if not ended:
                self.state.later(self.streams.close)

    def _submit(self) -> None:
        """Encode and submit; in a thread, because tokenizers and engines may block."""
        call, state = self.call, self.state
        prompts = encode(call, state.tokenizer, state.options)
        self.usage.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
        if isinstance(self.format, CompletionFormat):
            self.format.echoes = [prompt.text for prompt in prompts for _ in range(call.n)]
        for index in range(call.replies):
            if self.streams.closed:
                return
            self._submit_one(index, prompts[index // call.n])
        state.engine_closed = False

    def _submit_one(self, index: int, prompt: Prompt) -> None:
        call, state = self.call, self.state
        name = f"{self.format.id}-{index}" + (f" user={call.user}" if call.user else "")
        try:
            params = call.params(len(prompt.ids), index % call.n, state.options)
            request = Request(prompt=prompt.ids, sampling=params, id=name)
            self.streams.add(state.engine.submit(request, self._bridge.to(self.inbox, index)))
        except ValueError as error:
            code = "context_length_exceeded" if TOO_LONG.search(str(error)) else "invalid_value"
            param = "messages" if call.messages else "prompt"
            raise ApiError(400, f"the engine refuses the request: {error}", param=param, code=code) from error
        except RuntimeError as error:
            state.engine_closed = True
            raise ApiError(
                503, f"the engine refuses requests: {error}", code="engine_closed", retry_after=60
            ) from error

    async def _deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """Yield what has arrived, all that is there at once, until every reply has ended."""
        left = self.call.replies
        while left:
            batch: list[tuple[int, Delta]] = []
            for index, delta, when in await self.inbox.take():
                self.clocks[index].push(delta, when)
                self.usage.completion_tokens += len(delta.token_ids)
                left -= delta.finish_reason is not None
                batch.append((index, delta))
            yield batch
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens

    async def _whole(self, send: Send) -> bool:
        found: list[list[Delta]] = [[] for _ in range(self.call.replies)]
        async for batch in self._deltas():
            for index, delta in batch:
                if error := _failure(delta):
                    raise error
                found[index].append(delta)
        body = self.format.whole([Completion.join(deltas) for deltas in found], self.usage)
        await send_answer(send, body, headers=self._headers())
        return True

    async def _stream(self, send: Send) -> bool:
        """Send the events; tell whether all replies came to their end."""
        await start(send, 200, STREAM, [(b"cache-control", b"no-cache"), *self._headers()])
        with Writer(send, self.state.options.write_seconds) as writer:
            try:
                await self._events(writer)
                last, ended = self.format.last(self.usage), True
            except ApiError as error:
                last, ended = event(error.body()), False
            except Disconnected:
                raise
            except Exception:
                LOG.exception("request %s failed", self.format.id)
                last, ended = event(ApiError(500, "internal error", code="internal_error").body()), False
            await writer.write(last, more=False)
        return ended

    async def _events(self, writer: Writer) -> None:
        """Send the events of all deltas; what has arrived together goes out in one piece."""
        async for batch in self._deltas():
            pieces: list[bytes] = []
            for index, delta in batch:
                if error := _failure(delta):
                    await writer.write(b"".join(pieces))
                    raise error
                pieces.append(self.format.chunks(index, delta))
            if data := b"".join(pieces):
                await writer.write(data)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"x-request-id", self.format.id.encode())]


def _failure(delta: Delta) -> ApiError | None:
    if delta.finish_reason == "error":
        return ApiError(500, f"the engine failed: {delta.error}", code="engine_error")
    if delta.finish_reason == "cancelled":
        return ApiError(503, "the engine cancelled the reply", code="cancelled", retry_after=1)
    return None
