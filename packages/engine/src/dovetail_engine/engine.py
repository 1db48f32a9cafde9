"""Engine: requests in, deltas out; one thread plans, computes and delivers.

Everything that touches the scheduler or the runner happens on that thread, between two steps; other threads leave
commands in a queue.
"""

import atexit
import collections
import dataclasses
import functools
import logging
import math
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from dovetail_engine.options import EngineOptions
from dovetail_engine.pages import PagePool
from dovetail_engine.parameters import Borrowed, Parameters
from dovetail_engine.reply import Reply
from dovetail_engine.runner import Produced, RowSampling, Runner
from dovetail_engine.scheduler import Plan, Scheduler
from dovetail_engine.scheduler import Sequence as Row
from dovetail_engine.steps import TOP, Build
from dovetail_engine.streams import QueueStream
from dovetail_protocols import Completion, Delta, Request, SamplingParams, Tokenizer

__all__ = ["Engine"]

_LOG = logging.getLogger("dovetail_engine")


class Engine:
    """Generates tokens with one model; meets `dovetail_protocols.Engine`.

    Args:
        build: parameters to model, for example ``functools.partial(dovetail_models.merge, definition)``.
        params: the parameters, version 0; borrowed as by ``update_params(copy=False)``.
        tokenizer: makes the text of replies and knows which ids end one; without it replies are tokens only.
        options: sizes and limits.

    Every program is compiled before the constructor returns. Use it as a context manager, or call `close`.

    Raises:
        ValueError: the model has a layer whose cache is not offered, or no experts where they are to be kept.
    """

    def __init__(
        self,
        build: Build,
        params: Any,
        *,
        tokenizer: Tokenizer | None = None,
        options: EngineOptions | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        sizes = self.options.sizes()
        self._params = Parameters(params)
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(params) if jax.numpy.issubdtype(leaf.dtype, np.floating)]
        dtype = self.options.cache_dtype or (dtypes or [np.float32])[0]
        self._runner = Runner(build, params, sizes, dtype, keep_experts=self.options.keep_experts)
        self._scheduler = Scheduler(
            PagePool(sizes.pages),
            page_size=sizes.page,
            max_running=sizes.rows,
            chunk_tokens=sizes.chunk,
            chunks=sizes.chunks,
            decode_steps=sizes.steps,
        )
        self._tokenizer = tokenizer
        self._jobs: dict[Row, _Job] = {}
        self._counts = {"tokens_out": 0, "tokens_in": 0, "requests": 0, "steps": 0, "errors": 0}
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake = threading.Condition()
        self._paused = self._closing = False
        self._thread = threading.Thread(target=self._loop, name="dovetail-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread inside a program when the interpreter ends would abort the process

    @property
    def programs(self) -> Any:
        """What was compiled; ``programs.report()`` prints it."""
        return self._runner.programs

    def submit(self, request: Request, deliver: Callable[[Delta], None] | None = None) -> QueueStream:
        """Queue a request, see `dovetail_protocols.Engine.submit`."""
        return self._submit([request], deliver)[0]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run requests to their end, see `dovetail_protocols.Engine.generate`.

        They are queued together, so that on an idle engine the same requests make the same batches.
        """
        return [Completion.join(list(stream)) for stream in self._submit(requests, None)]

    def update_params(self, params: Any, version: int, *, copy: bool = True) -> None:
        """Replace the parameters between two steps, see `dovetail_protocols.Engine.update_params`."""
        self._call(lambda: self._params.update(params, version, copy=copy))

    def stats(self) -> Mapping[str, float]:
        """Return counters and gauges: those of the contract, and pages, preemptions, steps, errors and limits.

        ``ready`` is 0 while `submit` would raise: the engine is closed, or borrowed parameters were donated.
        """
        scheduler, pool = self._scheduler, self._scheduler.pool
        with self._wake:
            running = len(scheduler.running)
            gauges = {
                "running": running,
                "waiting": self._counts["requests"] - running,
                "version": self._params.version,
                "preemptions": scheduler.preemptions,
                "cache_pages_used": pool.count - 1 - pool.free,
                "cache_pages": pool.count - 1,
                "max_length": self.options.max_length,
                "ready": not self._closing and not self._params.donated,
            }
            return {name: float(value) for name, value in (self._counts | gauges).items()}

    def pause(self) -> None:
        """Stop between two steps; requests stay queued."""
        self._call(lambda: setattr(self, "_paused", True))

    def resume(self) -> None:
        """Go on after `pause`."""
        self._call(lambda: setattr(self, "_paused", False))

    def close(self) -> None:
        """Cancel what runs, end the thread and release the cache; a second call does nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> "Engine":
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    # On the caller's thread ---------------------------------------------------------------------------------------

    def _submit(self, requests: Sequence[Request], deliver: Callable[[Delta], None] | None) -> list[QueueStream]:
        for request in requests:
            self._check(request)
        jobs: dict[Row, _Job] = {}
        streams: list[QueueStream] = []
        for request in requests:
            row = Row(list(request.prompt), len(request.prompt) + request.sampling.max_tokens)
            streams.append(QueueStream(functools.partial(self._post, lambda row=row: self._cancel(row)), deliver))
            jobs[row] = self._job(request, deliver or streams[-1].deltas.put)
        if not self._post(lambda: self._begin(jobs)):
            raise RuntimeError("the engine is closed; make a new one")
        return streams

    def _job(self, request: Request, deliver: Callable[[Delta], None]) -> "_Job":
        sampling = request.sampling
        ends = () if sampling.ignore_eos or self._tokenizer is None else tuple(self._tokenizer.eos_ids)
        stops = tuple(dict.fromkeys((*sampling.stop_token_ids, *ends)))
        reply = Reply(request, frozenset(stops), self._tokenizer)
        return _Job(reply, RowSampling(sampling, _seed(sampling), stops), deliver)

    def _check(self, request: Request) -> None:
        vocab = self._runner.vocab_size
        unknown = [token for token in request.prompt if not 0 <= token < vocab]
        if unknown:
            raise ValueError(f"prompt has the token id {unknown[0]}; expected 0 to {vocab - 1}")
        total, most = len(request.prompt) + request.sampling.max_tokens, self.options.max_length
        if total > most:
            raise ValueError(
                f"prompt of {len(request.prompt)} and max_tokens={request.sampling.max_tokens} are {total} tokens; "
                f"expected at most max_length={most}"
            )
        stops = [token for token in request.sampling.stop_token_ids if token >= vocab]
        if stops:
            raise ValueError(f"stop_token_ids has {stops[0]}; expected 0 to {vocab - 1}")
        if request.sampling.stop and self._tokenizer is None:
            raise ValueError(f"stop={request.sampling.stop!r} needs text; give the engine a tokenizer")
        if (request.sampling.logprobs or 0) > min(TOP, vocab) - 1:
            raise ValueError(f"logprobs={request.sampling.logprobs}; expected at most {min(TOP, vocab) - 1}")
        self._params.check()

    def _post(self, command: Callable[[], None]) -> bool:
        """Leave a command for the thread; return whether it will be run."""
        with self._wake:
            if self._closing:
                return False
            self._commands.append(command)
            self._wake.notify()
            return True

    def _call(self, command: Callable[[], Any]) -> None:
        """Have the thread run a command, wait for it and raise what it raises."""
        if threading.current_thread() is self._thread:  # a receiver of deltas calls back
            command()
            return
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except BaseException as error:  # noqa: BLE001  (raised by the caller)
                done.set_exception(error)
            else:
                done.set_result(None)

        if not self._post(run):
            raise RuntimeError("the engine is closed; make a new one")
        done.result()

    # On the engine's thread ---------------------------------------------------------------------------------------

    def _loop(self) -> None:
        last = Delta(finish_reason="cancelled")
        try:
            while self._serve_commands():
                plan = self._scheduler.plan()
                if plan.sequences:
                    self._step(plan)
        except BaseException as error:  # noqa: BLE001  a fault of the engine's own: nobody may wait for it
            _LOG.critical("the engine stops", exc_info=True)
            last = Delta(finish_reason="error", error=f"the engine stopped: {type(error).__name__}: {error}")
        with self._wake:
            self._closing = True
        while self._commands:
            self._commands.popleft()()
        for row in list(self._jobs):
            self._end(row, dataclasses.replace(last, version=self.version))
        self._runner.release()

    def _serve_commands(self) -> bool:
        """Run all commands, waiting for one while there is nothing to do; return whether to go on."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._commands or (self._jobs and not self._paused))
                closing = self._closing
            while self._commands:  # the garbage collector may add a cancellation on this very thread
                self._commands.popleft()()
            if closing:
                return False
            if self._jobs and not self._paused:
                return True

    def _begin(self, jobs: "dict[Row, _Job]") -> None:
        with self._wake:
            self._jobs |= jobs
            self._counts["requests"] += len(jobs)
            for row in jobs:
                self._counts["tokens_in"] += len(row.tokens)
                self._scheduler.add(row)

    def _cancel(self, row: Row) -> None:
        if row in self._jobs:
            self._end(row, Delta(finish_reason="cancelled", version=self._params.version))

    def _step(self, plan: Plan) -> None:
        rows = plan.sequences
        try:
            params = self._params.borrow()
            produced = self._runner.run(params, plan, {row: self._jobs[row].sampling for row in rows})
            deltas = [self._read(row, part) for row, part in zip(rows, produced, strict=True)]
        except Exception as error:  # noqa: BLE001  (the requests fail, the engine goes on)
            # rows that only decode are tried again without the chunks
            self._fail([chunk.sequence for chunk in plan.prefill] or rows, error)
            return
        with self._wake:
            self._counts["steps"] += 1
        for chunk in plan.prefill:
            if not chunk.last:
                self._scheduler.advance(chunk)
        for row, delta in zip(rows, deltas, strict=True):
            if delta is not None:
                self._deliver(row, delta)

    def _read(self, row: Row, produced: Produced) -> Delta | None:
        """Return what a request's receiver is told; a fault of its own ends this request alone."""
        if any(math.isnan(entry.value) for entry in produced.logprobs):
            return self._error(f"the logits of token {len(row.tokens)} are not finite")
        try:
            return self._jobs[row].reply.push(produced, self.version) if produced.tokens else None
        except Exception as error:  # noqa: BLE001
            _LOG.exception("a reply could not be turned into text")
            return self._error(f"{type(error).__name__}: {error}")

    def _error(self, reason: str) -> Delta:
        return Delta(finish_reason="error", error=reason, version=self.version)

    @property
    def version(self) -> int:
        """Version of the parameters."""
        return self._params.version

    def _deliver(self, row: Row, delta: Delta) -> None:
        with self._wake:
            self._counts["tokens_out"] += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._end(row, self._with_experts(row, delta))
            return
        self._scheduler.accept(row, delta.token_ids)
        self._jobs[row].send(delta)

    def _with_experts(self, row: Row, delta: Delta) -> Delta:
        """Add what experts the prompt and the reply went to, where that is kept, before the pages are another's.

        A fault ends this request alone.
        """
        if not self.options.keep_experts or delta.finish_reason not in ("stop", "length"):
            return delta
        count = len(row.tokens) + len(delta.token_ids) - 1
        try:
            return dataclasses.replace(delta, experts=self._runner.experts(row.pages, count))
        except Exception as error:  # noqa: BLE001
            _LOG.exception("the experts of a reply could not be read")
            return dataclasses.replace(delta, finish_reason="error", error=f"{type(error).__name__}: {error}")

    def _end(self, row: Row, delta: Delta) -> None:
        """Forget a request before its last delta is seen, so that whoever sees it finds the engine without it."""
        with self._wake:
            job = self._jobs.pop(row)
            self._scheduler.remove(row)
            self._counts["requests"] -= 1
            self._counts["errors"] += delta.finish_reason == "error"
        job.send(delta)

    def _fail(self, rows: Sequence[Row], error: Exception) -> None:
        """End the requests of a step that failed; what it may have spoilt of others is computed again."""
        if not isinstance(error, Borrowed):
            _LOG.error("a step of %d requests failed", len(rows), exc_info=error)
        for row in rows:
            self._end(row, self._error(f"{type(error).__name__}: {error}"))
        broken = self._runner.broken
        if broken:
            self._runner.reset()
        if broken or self._runner.recurs:  # states may be a token ahead
            for row in list(reversed(self._scheduler.running)):
                self._scheduler.preempt(row)


@dataclasses.dataclass
class _Job:
    """What the engine keeps of a request besides its place in the scheduler."""

    reply: Reply
    sampling: RowSampling
    deliver: Callable[[Delta], None]

    def send(self, delta: Delta) -> None:
        try:
            self.deliver(delta)
        except Exception:  # noqa: BLE001  (one receiver's fault is not another's)
            _LOG.exception("the receiver of a delta raised")


def _seed(sampling: SamplingParams) -> int:
    """Return 32 bits that depend on all of a seed; drawn where there is none."""
    if sampling.seed is None:
        return secrets.randbits(32)
    seed = int(sampling.seed)
    return int(np.random.SeedSequence(2 * abs(seed) + (seed < 0)).generate_state(1)[0])
