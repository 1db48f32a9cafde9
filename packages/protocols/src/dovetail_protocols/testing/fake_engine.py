"""`FakeEngine`: a deterministic engine without a model, for tests of servers, tuning loops and data recipes."""

import codecs
import itertools
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from dovetail_protocols.engine import Completion, Delta, FinishReason, Request, TokenLogprob

__all__ = ["FakeEngine"]

_UNITS = [unit.encode() for unit in ("a", "e", "n", "o", "r", "s", "t", " ", " ", ".\n", "é", "🙂")]


class FakeEngine:
    """Meets `Engine` with bytes as tokens (0-255) and one end token (256).

    The reply is a pure function of the prompt and, at a temperature above 0, the seed. A step happens when a stream is
    read; a request with `deliver` has a thread that reads it.

    Args:
        params: the initial parameters, only looked at by `update_params`.
        reply: ``reply(request)`` gives the ids of an answer, which ends where they end; by default an endless pseudo
            text with characters of several bytes.
        max_length: how many tokens prompt and answer may have together.
        max_running: how many requests run at once; the rest waits.
        delay: seconds that a step takes.
        fail_at: the number of tokens after which every request ends with the reason ``error``.

    >>> FakeEngine(reply=lambda request: b"Hello").generate([Request(prompt=[1])])[0].text
    'Hello'
    """

    vocab_size = 257
    eos_id = 256

    def __init__(
        self,
        params: Any = None,
        *,
        reply: Callable[[Request], Iterable[int]] | None = None,
        max_length: int = 4096,
        max_running: int = 8,
        delay: float = 0.0,
        fail_at: int | None = None,
    ) -> None:
        self.turn = threading.Condition()
        self.active: list[_FakeStream] = []
        self.reply, self.max_length, self.max_running = reply or _pseudo_text, max_length, max_running
        self.delay, self.fail_at = delay, fail_at
        self.version, self.tokens_out, self.paused, self.closed = 0, 0, False, False
        self._params, self._seeds = params, itertools.count()

    def submit(self, request: Request, deliver: Callable[[Delta], None] | None = None) -> "_FakeStream":
        """Queue a request, see `Engine.submit`."""
        unknown = [i for i in request.prompt if not 0 <= i < self.vocab_size]
        if unknown:
            raise ValueError(f"prompt has the token id {unknown[0]}; expected 0 to {self.vocab_size - 1}")
        total = len(request.prompt) + request.sampling.max_tokens
        if total > self.max_length:
            raise ValueError(f"prompt and max_tokens are {total} tokens; expected at most max_length={self.max_length}")
        with self.turn:
            if self.closed:
                raise RuntimeError("the engine is closed; make a new one")
            stream = _FakeStream(self, request)
            self.active.append(stream)
        if deliver is not None:
            threading.Thread(target=_pump, args=(stream, deliver), daemon=True).start()
        return stream

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their end, see `Engine.generate`."""
        return [Completion.join(list(stream)) for stream in [self.submit(request) for request in requests]]

    def update_params(self, params: Any, version: int, *, copy: bool = True) -> None:
        """Replace the parameters, see `Engine.update_params`; borrowed ones are never read, so never refused."""
        del copy
        with self.turn:
            if version <= self.version:
                raise ValueError(f"version={version}; expected more than the present {self.version}")
            if _form(params) != _form(self._params):
                raise ValueError(f"the parameters are {_form(params)}; expected {_form(self._params)}")
            self._params, self.version = params, version

    def stats(self) -> Mapping[str, float]:
        """Return counters and gauges, see `Engine.stats`."""
        with self.turn:
            running = 0 if self.paused else min(len(self.active), self.max_running)
            waiting = len(self.active) - running
            counts = {"waiting": waiting, "running": running, "tokens_out": self.tokens_out, "version": self.version}
            return {name: float(value) for name, value in counts.items()}

    def pause(self) -> None:
        """Stop between two steps."""
        with self.turn:
            self.paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        with self.turn:
            self.paused = False
            self.turn.notify_all()

    def close(self) -> None:
        """Cancel what runs; a second call does nothing."""
        with self.turn:
            self.closed = True
            self.active.clear()
            self.turn.notify_all()

    def next_seed(self) -> int:
        """Draw the seed of a request that has none."""
        return next(self._seeds)


def _pump(stream: Iterator[Delta], deliver: Callable[[Delta], None]) -> None:
    delta = Delta()
    for delta in stream:
        deliver(delta)
    if delta.finish_reason is None:
        deliver(Delta(finish_reason="cancelled"))


def _form(params: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", params))


def _pseudo_text(request: Request) -> Iterator[int]:
    state = zlib.crc32(repr(list(request.prompt)).encode())
    for place in itertools.count():
        state = zlib.crc32(f"{state} {request.sampling.seed} {place}".encode())
        yield from _UNITS[state % len(_UNITS)]


class _FakeStream:
    """The stream of one request."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        sampling = request.sampling
        greedy = sampling.temperature == 0
        seed = None if greedy else engine.next_seed() if sampling.seed is None else sampling.seed
        seeded = Request(prompt=request.prompt, sampling=_with_seed(sampling, seed), id=request.id)
        self._ids = iter(engine.reply(seeded))
        self._text = _Text(sampling.stop)
        self._count = 0

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        engine = self.engine
        with engine.turn:
            if self not in engine.active and self._count < 0:
                raise StopIteration
            engine.turn.wait_for(self._may_run)
            if self not in engine.active:
                self._count = -1
                return Delta(finish_reason="cancelled", version=engine.version)
            if engine.delay:
                time.sleep(engine.delay)
            return self._step()

    def close(self) -> None:
        """Cancel the request, see `Stream.close`."""
        with self.engine.turn:
            self._leave()

    def _may_run(self) -> bool:
        engine = self.engine
        if self not in engine.active:
            return True
        return not engine.paused and engine.active.index(self) < engine.max_running

    def _leave(self) -> None:
        if self in self.engine.active:
            self.engine.active.remove(self)
        self._count = -1
        self.engine.turn.notify_all()

    def _step(self) -> Delta:
        engine, sampling = self.engine, self.request.sampling
        if engine.fail_at is not None and self._count >= engine.fail_at:
            self._leave()
            return Delta(finish_reason="error", error="injected failure", version=engine.version)
        token = next(self._ids, engine.eos_id)
        self._count += 1
        engine.tokens_out += 1
        ended = token in sampling.stop_token_ids or (token == engine.eos_id and not sampling.ignore_eos)
        last = ended or self._count == sampling.max_tokens
        text, stopped = self._text.push(b"" if ended or token == engine.eos_id else bytes([token]), last=last)
        reason: FinishReason | None = "stop" if ended or stopped else "length" if last else None
        if reason is not None:
            self._leave()
        logprobs = None if sampling.logprobs is None else (_logprob(token, sampling.logprobs, engine.vocab_size),)
        return Delta(token_ids=(token,), text=text, logprobs=logprobs, version=engine.version, finish_reason=reason)


def _with_seed(sampling: Any, seed: int | None) -> Any:
    return type(sampling)(**{**vars(sampling), "seed": seed})


def _logprob(token: int, alternatives: int, vocab_size: int) -> TokenLogprob:
    value = -0.125 * (1 + token % 4)
    others = {(token + 1 + rank) % vocab_size: value - 0.5 * (1 + rank) for rank in range(alternatives)}
    return TokenLogprob(value, others)


class _Text:
    """Bytes to text: whole characters only, ended before a stop string, whose possible beginning is held back."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, data: bytes, *, last: bool) -> tuple[str, bool]:
        self._held += self._utf8.decode(data, last)
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            return self._held[: min(found)], True
        keep = 0 if last else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False


def _overlap(text: str, stop: str) -> int:
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
