"""The engine kit accepts `FakeEngine`, read directly or run ahead by a thread, and rejects each named broken one."""

import dataclasses
import queue
import threading
import time

import numpy as np
import pytest

from dovetail_protocols import Completion, Delta, Request, SamplingParams
from dovetail_protocols.testing import ConformanceError, FakeEngine, check_engine


def decode(ids):
    return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class Good(FakeEngine):
    def __init__(self):
        super().__init__({"w": np.zeros(3, np.float32)})

    def submit(self, request, deliver=None):
        return self.begin(request) if deliver is None else self.push(request, deliver)

    def begin(self, request):
        return super().submit(request)

    def push(self, request, deliver):
        return super().submit(request, deliver)


class Wrapped:
    """A stream whose deltas pass through `edit`."""

    def __init__(self, stream, edit):
        self.stream, self.edit = stream, edit

    def __iter__(self):
        return self

    def __next__(self):
        return self.edit(next(self.stream))

    def close(self):
        self.stream.close()


def editing(edit):
    class Edited(Good):
        def begin(self, request):
            return Wrapped(super().begin(request), lambda delta: edit(request, delta))

    return Edited


class CloseDoesNotCancel(Good):
    def begin(self, request):
        stream = Wrapped(super().begin(request), lambda delta: delta)
        stream.close = lambda: None
        return stream


class CloseDoesNotStopTheWork(Good):
    def begin(self, request):
        stream = super().begin(request)
        wrapped = Wrapped(stream, lambda delta: delta)
        wrapped.close = lambda: (list(stream), stream.close())
        return wrapped


class TextContainsTheStopString(Good):
    def begin(self, request):
        stream = super().begin(request)
        stops = request.sampling.stop
        return Wrapped(
            stream,
            lambda d: dataclasses.replace(d, text=d.text + stops[-1]) if d.finish_reason == "stop" and stops else d,
        )


class StopStringBeginsInTheText(Good):
    """Ends at a stop string but has already sent its first characters."""

    def begin(self, request):
        stops = request.sampling.stop
        plain = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, stop=()))
        stream, text = super().begin(plain), ""

        def edit(delta):
            nonlocal text
            text += delta.text
            if any(stop in text for stop in stops):
                stream.close()
                return dataclasses.replace(delta, text="", finish_reason="stop")
            return delta

        return Wrapped(stream, edit)


class IgnoresStopTokens(Good):
    def begin(self, request):
        sampling = dataclasses.replace(request.sampling, stop_token_ids=())
        return super().begin(dataclasses.replace(request, sampling=sampling))


class LogprobsAlways(Good):
    def begin(self, request):
        sampling = dataclasses.replace(request.sampling, logprobs=request.sampling.logprobs or 0)
        return super().begin(dataclasses.replace(request, sampling=sampling))


class VersionsGoBackwards(Good):
    def begin(self, request):
        count = iter(range(10**6))
        edit = lambda d: dataclasses.replace(d, version=max(0, d.version - (next(count) % 3 == 2)))  # noqa: E731
        return Wrapped(super().begin(request), edit)


class OldVersionsAreTaken(Good):
    def update_params(self, params, version, *, copy=True):
        super().update_params(params, max(version, self.version + 1), copy=copy)
        self.version = version


class OtherTreesAreTaken(Good):
    def update_params(self, params, version, *, copy=True):
        if version <= self.version:
            raise ValueError("old")
        self.version = version


class UpdateIsIgnored(Good):
    def update_params(self, params, version, *, copy=True):
        before = self.version
        super().update_params(params, version, copy=copy)
        self.version = before


class NeighboursChangeTheTokens(Good):
    def begin(self, request):
        seed = (request.sampling.seed or 0) + len(self.active)
        return super().begin(dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed)))


class GenerateInOrderOfLength(Good):
    def generate(self, requests):
        return sorted(super().generate(requests), key=lambda done: len(done.token_ids))


class SubmitAfterClose(Good):
    def begin(self, request):
        self.closed = False
        return super().begin(request)


class UnknownIdsAreClamped(Good):
    def begin(self, request):
        return super().begin(dataclasses.replace(request, prompt=[min(max(i, 0), 256) for i in request.prompt]))


class PauseIsIgnored(Good):
    def pause(self):
        self.thread = threading.Thread(target=self.work, daemon=True)
        self.thread.start()

    def work(self):
        time.sleep(0.02)
        self.tokens_out += 1


class PauseDropsTheQueue(Good):
    def pause(self):
        pass

    def begin(self, request):
        return super().begin(request)

    def stats(self):
        return {**super().stats(), "waiting": 0.0, "running": 0.0}


class NoVersionInStats(Good):
    def stats(self):
        return {name: value for name, value in super().stats().items() if name != "version"}


class CloseLeavesStreamsHanging(Good):
    def close(self):
        self.closed = True


class CloseEndsStreamsSilently(Good):
    def begin(self, request):
        def edit(delta):
            if delta.finish_reason == "cancelled":
                raise StopIteration
            return delta

        return Wrapped(super().begin(request), edit)


class SecondCloseRaises(Good):
    def close(self):
        if self.closed:
            raise ConformanceError("Engine: the second close raised")
        super().close()


class OneTokenTooMany(Good):
    def begin(self, request):
        sampling = dataclasses.replace(request.sampling, max_tokens=request.sampling.max_tokens + 1)
        return super().begin(dataclasses.replace(request, sampling=sampling))


class StartsAgainAfterItsEnd(Good):
    def begin(self, request):
        outer, stream = self, super().begin(request)

        class Again(Wrapped):
            def __next__(self):
                try:
                    return next(self.stream)
                except StopIteration:
                    return Good.begin(outer, request).__next__()

        return Again(stream, None)


class NewIteratorPerLoop(Good):
    def begin(self, request):
        stream = super().begin(request)

        class Loop(Wrapped):
            def __iter__(self):
                return iter(list(stream))

        return Loop(stream, None)


def chosen_last(request, delta):
    """Log-probabilities in which an alternative is likelier than the greedy token."""
    worse = tuple(dataclasses.replace(x, top=dict.fromkeys(x.top, 0.0)) for x in delta.logprobs or ())
    return dataclasses.replace(delta, logprobs=worse if delta.logprobs is not None else None)


def one_alternative(request, delta):
    cut = tuple(dataclasses.replace(x, top=dict(list(x.top.items())[:1])) for x in delta.logprobs or ())
    return dataclasses.replace(delta, logprobs=cut if delta.logprobs is not None else None)


class DeliversNothing(Good):
    def push(self, request, deliver):
        return self.begin(request)


class DeliversTheLastTwice(Good):
    def push(self, request, deliver):
        return super().push(request, lambda delta: [deliver(delta) for _ in range(2 if delta.finish_reason else 1)])


class DeliversWithoutText(Good):
    def push(self, request, deliver):
        return super().push(request, lambda delta: deliver(dataclasses.replace(delta, text="")))


class DeliversNoEndAfterClose(Good):
    def push(self, request, deliver):
        return super().push(request, lambda delta: delta.finish_reason == "cancelled" or deliver(delta))


class DeliversAfterClose(Good):
    def push(self, request, deliver):
        return super().push(
            request,
            lambda delta: [deliver(d) for d in ((delta, Delta()) if delta.finish_reason == "cancelled" else (delta,))],
        )


EDITS = {
    "LogprobsMissing": lambda request, delta: dataclasses.replace(delta, logprobs=None),
    "LogprobsOnlyOnTheLast": lambda request, delta: (
        delta if delta.finish_reason else dataclasses.replace(delta, logprobs=None)
    ),
    "AlternativeLikelierThanGreedy": chosen_last,
    "TooFewAlternatives": one_alternative,
    "NoFinishReason": lambda request, delta: dataclasses.replace(delta, finish_reason=None),
    "FinishReasonOnEveryDelta": lambda request, delta: dataclasses.replace(delta, finish_reason="length"),
    "LengthReportedAsStop": lambda request, delta: dataclasses.replace(
        delta, finish_reason=delta.finish_reason and "stop"
    ),
    "EmitsHalfACharacter": lambda request, delta: dataclasses.replace(
        delta, text=bytes(i for i in delta.token_ids if i < 256).decode("utf-8", "replace")
    ),
    "TextLost": lambda request, delta: dataclasses.replace(delta, text=delta.text if delta.version else "x"),
}
MUTANTS = [
    CloseDoesNotCancel,
    CloseDoesNotStopTheWork,
    TextContainsTheStopString,
    StopStringBeginsInTheText,
    IgnoresStopTokens,
    LogprobsAlways,
    VersionsGoBackwards,
    OldVersionsAreTaken,
    OtherTreesAreTaken,
    UpdateIsIgnored,
    NeighboursChangeTheTokens,
    GenerateInOrderOfLength,
    SubmitAfterClose,
    UnknownIdsAreClamped,
    PauseIsIgnored,
    PauseDropsTheQueue,
    NoVersionInStats,
    CloseLeavesStreamsHanging,
    CloseEndsStreamsSilently,
    SecondCloseRaises,
    OneTokenTooMany,
    StartsAgainAfterItsEnd,
    NewIteratorPerLoop,
    DeliversNothing,
    DeliversTheLastTwice,
    DeliversWithoutText,
    DeliversNoEndAfterClose,
    DeliversAfterClose,
]


def check(make, timeout=20.0):
    check_engine(
        make, params=lambda: {"w": np.ones(3, np.float32)}, decode=decode, prompts=[(1, 2), (3,)], timeout=timeout
    )


def test_the_fake_engine_passes():
    check(Good)


class Threaded(Good):
    """The same engine run ahead of its readers by a thread per request, as a real engine's loop does."""

    def begin(self, request):
        return _Ahead(super().begin(request))


class _Ahead:
    def __init__(self, stream):
        self.stream, self.ready, self.ended = stream, queue.Queue(4), False
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        for delta in self.stream:
            self.ready.put(delta)

    def __iter__(self):
        return self

    def __next__(self):
        if self.ended:
            raise StopIteration
        delta = self.ready.get(timeout=10)
        self.ended = delta.finish_reason is not None
        return delta

    def close(self):
        self.stream.close()
        self.ended = True


def test_an_engine_that_runs_ahead_passes():
    check(Threaded)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda kind: kind.__name__)
def test_broken_engines_are_rejected(mutant):
    with pytest.raises(ConformanceError, match=r"Engine: |Stream: "):
        check(mutant, timeout=1.0)


@pytest.mark.parametrize("name", EDITS)
def test_broken_deltas_are_rejected(name):
    with pytest.raises(ConformanceError, match=r"Engine: |Stream: "):
        check(editing(EDITS[name]), timeout=1.0)


def test_a_hanging_stream_is_reported_not_waited_for():
    class Hangs(Good):
        def begin(self, request):
            return Wrapped(super().begin(request), lambda delta: time.sleep(60))

    start = time.monotonic()
    with pytest.raises(ConformanceError, match="waited"):
        check(Hangs, timeout=0.3)
    assert time.monotonic() - start < 20


def test_fake_engine_replies_as_told():
    engine = FakeEngine(reply=lambda request: "grüß".encode(), max_length=50)
    done = engine.generate([Request(prompt=[1], sampling=SamplingParams(max_tokens=20, logprobs=1))])[0]
    assert (done.text, done.finish_reason) == ("grüß", "stop")
    assert done.token_ids[-1] == engine.eos_id
    with pytest.raises(ValueError, match="max_length=50"):
        engine.submit(Request(prompt=[1], sampling=SamplingParams(max_tokens=50)))


def test_fake_engine_fails_when_told():
    done = FakeEngine(fail_at=2).generate([Request(prompt=[1])])[0]
    assert (len(done.token_ids), done.finish_reason, done.error) == (2, "error", "injected failure")


def test_fake_engine_queues_beyond_its_slots():
    engine = FakeEngine(max_running=1)
    first, second = (engine.submit(Request(prompt=[i])) for i in (1, 2))
    assert engine.stats()["waiting"] == 1
    reader = threading.Thread(target=lambda: list(second), daemon=True)
    reader.start()
    reader.join(0.1)
    assert reader.is_alive()
    first.close()
    reader.join(10)
    assert not reader.is_alive()
    assert engine.stats()["running"] == 0


def test_unseeded_requests_differ_and_seeded_agree():
    engine = FakeEngine()
    free = [engine.generate([Request(prompt=[1])])[0].token_ids for _ in range(2)]
    fixed = [engine.generate([Request(prompt=[1], sampling=SamplingParams(seed=3))])[0].token_ids for _ in range(2)]
    assert free[0] != free[1]
    assert fixed[0] == fixed[1]
    assert Completion.join([Delta(finish_reason="stop")]).token_ids == ()
