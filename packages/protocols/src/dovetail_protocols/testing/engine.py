"""Kit of `Engine`: streams that end once, replies that depend on the request alone, cancellation that frees."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dovetail_protocols.engine import Completion, Delta, Engine, Request, SamplingParams, Stream
from dovetail_protocols.testing._rules import require, require_raises, within

__all__ = ["check_engine"]

_GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
_STEP = 16  # tokens of one request that a step which runs already may still make


def check_engine(
    make_engine: Callable[[], Engine],
    *,
    prompts: Sequence[Sequence[int]] = ((1, 2, 3), (4,), (5, 6, 7, 8, 9)),
    params: Callable[[], Any] | None = None,
    decode: Callable[[Sequence[int]], str] | None = None,
    long_tokens: int = 400,
    timeout: float = 60.0,
) -> None:
    """Check an engine; two are made, and closed.

    Args:
        make_engine: returns a running engine; greedy replies to `prompts` must have text.
        prompts: at least two different prompts of known ids.
        params: returns parameters that `update_params` takes; None leaves that rule out.
        decode: the text of ids, to compare the stream's text with; None leaves that rule out.
        long_tokens: the length of a reply that is still running when its first delta has been read.
        timeout: seconds after which a call counts as hanging.

    Raises:
        ConformanceError: a rule is broken.
    """
    run = _Run(make_engine(), [tuple(prompt) for prompt in prompts], timeout, long_tokens)
    try:
        _check_stream(run, decode)
        _check_deliver(run)
        _check_generate(run)
        _check_seeds(run)
        _check_logprobs(run)
        _check_stops(run)
        _check_refusals(run)
        _check_cancel(run)
        _check_pause(run)
        if params is not None:
            _check_versions(run, params)
    finally:
        run.engine.close()
    _check_close(dataclasses.replace(run, engine=make_engine()))


@dataclasses.dataclass(frozen=True)
class _Run:
    engine: Engine
    prompts: list[tuple[int, ...]]
    timeout: float
    long_tokens: int

    def request(self, prompt: int = 0, **sampling: Any) -> Request:
        return Request(prompt=self.prompts[prompt], sampling=dataclasses.replace(_GREEDY, **sampling))

    def drain(self, stream: Stream) -> list[Delta]:
        return within(self.timeout, "Engine: a stream ends", lambda: list(_bounded(stream, self.long_tokens)))

    def complete(self, request: Request) -> Completion:
        return Completion.join(self.drain(self.engine.submit(request)))

    def settled(self, rule: str, **expected: float) -> None:
        """Wait until `stats` shows the expected values."""
        end = time.monotonic() + min(self.timeout, 5.0)
        while True:
            stats = self.engine.stats()
            if all(stats[name] == value for name, value in expected.items()):
                return
            require(time.monotonic() < end, rule, stats=dict(stats), expected=expected)
            time.sleep(0.01)


def _bounded(stream: Stream, limit: int) -> Iterator[Delta]:
    for count, delta in enumerate(stream):
        require(count <= 4 * limit, "Engine: a stream ends", deltas=count)
        yield delta


def _check_stream(run: _Run, decode: Callable[[Sequence[int]], str] | None) -> None:
    stream = run.engine.submit(run.request())
    require(iter(stream) is stream, "Stream: iter(stream) is the stream itself")
    deltas = run.drain(stream)
    reasons = [delta.finish_reason for delta in deltas]
    once = reasons and reasons[-1] is not None and not any(reasons[:-1])
    require(once, "Stream: the last delta, and no other, has a finish_reason", reasons=reasons)
    require_raises(
        StopIteration,
        "Stream: after its last delta it stays at its end",
        lambda: within(run.timeout, "", lambda: next(iter(stream))),
    )
    done = Completion.join(deltas)
    good = len(done.token_ids) == _GREEDY.max_tokens and done.finish_reason == "length"
    rule = "Engine: with ignore_eos a reply has max_tokens tokens and the reason 'length'"
    require(good, rule, tokens=len(done.token_ids), max_tokens=_GREEDY.max_tokens, reason=done.finish_reason)
    broken = [delta.text for delta in deltas[:-1] if "\ufffd" in delta.text]
    require(not broken, "Engine: text is never half a character", texts=broken)
    if decode is not None:
        wanted = decode(done.token_ids)
        require(done.text == wanted, "Engine: the text is that of the tokens", text=done.text, expected=wanted)
    names = {"waiting", "running", "tokens_out", "version"}
    stats = run.engine.stats()
    require(names <= set(stats), "Engine: stats has waiting, running, tokens_out and version", stats=dict(stats))


def _check_deliver(run: _Run) -> None:
    wanted = run.complete(run.request(logprobs=1))
    deltas, ended = _deliveries(run, run.request(logprobs=1))
    within(run.timeout, "Engine: deliver gets the last delta", lambda: _until(ended, run.timeout))
    reasons = [delta.finish_reason for delta in deltas]
    once = reasons[-1] is not None and not any(reasons[:-1])
    require(once, "Engine: deliver gets one last delta, with a finish_reason", reasons=reasons)
    got = Completion.join(deltas)
    same = (got.token_ids, got.text, got.finish_reason) == (wanted.token_ids, wanted.text, wanted.finish_reason)
    require(same, "Engine: deliver gets the deltas of the stream, in order", got=got, expected=wanted)
    deltas, ended = _deliveries(run, run.request(max_tokens=run.long_tokens), close=True)
    within(run.timeout, "Engine: after close deliver gets the last delta", lambda: _until(ended, run.timeout))
    rule = "Engine: after close the last delivered delta has the reason 'cancelled', and nothing follows it"
    time.sleep(0.05)
    reasons = [delta.finish_reason for delta in deltas]
    require(reasons[-1] == "cancelled" and not any(reasons[:-1]), rule, reasons=reasons)


def _until(event: threading.Event, timeout: float) -> None:
    require(event.wait(timeout), "Engine: deliver gets the last delta")


def _deliveries(run: _Run, request: Request, *, close: bool = False) -> tuple[list[Delta], threading.Event]:
    deltas: list[Delta] = []
    first, ended, going = threading.Event(), threading.Event(), threading.Event()

    def deliver(delta: Delta) -> None:
        deltas.append(delta)
        first.set()
        going.wait(0.5)  # a fast engine must not finish before it is told to stop
        if delta.finish_reason is not None:
            ended.set()

    stream = run.engine.submit(request, deliver)
    within(run.timeout, "Engine: deliver gets the first delta", lambda: _until(first, run.timeout))
    if close:
        stream.close()
    going.set()
    return deltas, ended


def _check_generate(run: _Run) -> None:
    requests = [run.request(i % len(run.prompts), max_tokens=6 - i % 4) for i in range(2 * len(run.prompts))]
    alone = [run.complete(request) for request in requests]
    rule = "Engine: generate gives the completions in the order of the requests, as each would be alone"
    together = within(run.timeout, rule, lambda: run.engine.generate(requests))
    got, expected = ([(c.token_ids, c.text, c.finish_reason) for c in part] for part in (together, alone))
    require(got == expected, rule, got=got, expected=expected)
    require(within(run.timeout, rule, lambda: run.engine.generate([])) == [], "Engine: generate of nothing is []")


def _check_seeds(run: _Run) -> None:
    request = run.request(temperature=1.0, seed=7)
    first = run.complete(request).token_ids
    other = run.request(1, temperature=1.0, seed=8)
    again = within(run.timeout, "Engine: generate ends", lambda: run.engine.generate([other, request]))[1].token_ids
    rule = "Engine: with a seed the tokens are a function of the request alone, whatever else runs"
    require(first == again, rule, alone=first, among_others=again)


def _check_logprobs(run: _Run) -> None:
    plain = run.complete(run.request())
    require(plain.logprobs is None, "Engine: no log-probabilities unless asked for", logprobs=plain.logprobs)
    for count in (0, 2):
        deltas = run.drain(run.engine.submit(run.request(logprobs=count)))
        for delta in deltas:
            good = len(delta.logprobs or ()) == len(delta.token_ids)
            rule = "Engine: when asked for, every delta has one log-probability per new token"
            require(good, rule, tokens=delta.token_ids, logprobs=delta.logprobs)
            for token, entry in zip(delta.token_ids, delta.logprobs or (), strict=True):
                others = {other: value for other, value in entry.top.items() if other != token}
                rule = "Engine: logprobs=n gives n alternatives besides the chosen token"
                require(len(others) == count, rule, asked=count, top=dict(entry.top), chosen=token)
                best = entry.value <= 1e-6 and all(value <= entry.value + 1e-6 for value in others.values())
                rule = "Engine: log-probabilities are at most 0, and a greedy token is the likeliest"
                require(best, rule, chosen=entry.value, others=others)
        same = Completion.join(deltas).token_ids == plain.token_ids
        require(same, "Engine: asking for log-probabilities does not change the tokens")


def _check_stops(run: _Run) -> None:
    plain = run.complete(run.request())
    require(len(plain.text) >= 4, "Engine: the greedy reply to the first prompt has text", text=plain.text)
    start = len(plain.text) // 2
    stop = plain.text[start : start + 2]
    deltas = run.drain(run.engine.submit(run.request(stop=("\x00no", stop))))
    done = Completion.join(deltas)
    wanted = plain.text[: plain.text.index(stop)]
    rule = "Engine: a stop string ends the reply with the reason 'stop' and neither it nor its beginning is in the text"
    good = done.text == wanted and done.finish_reason == "stop"
    require(good, rule, stop=stop, text=done.text, expected=wanted, reason=done.finish_reason)
    token = plain.token_ids[5]
    done = run.complete(run.request(stop_token_ids=(token,)))
    first = plain.token_ids.index(token)
    good = done.finish_reason == "stop" and done.token_ids in (plain.token_ids[:first], plain.token_ids[: first + 1])
    rule = "Engine: a stop token ends the reply with the reason 'stop'"
    require(good, rule, stop=token, tokens=done.token_ids, without=plain.token_ids, reason=done.finish_reason)


def _check_refusals(run: _Run) -> None:
    for prompt in ((10**9,), (*run.prompts[0], -1)):
        rule = "Engine: an unknown token id is a ValueError of submit"
        request = Request(prompt=prompt, sampling=_GREEDY)
        require_raises(ValueError, rule, lambda request=request: run.engine.submit(request))
    run.settled("Engine: a refused request leaves nothing behind", waiting=0, running=0)


def _check_cancel(run: _Run) -> None:
    rule = "Stream: close cancels the request and the engine frees what it held"
    start = run.engine.stats()["tokens_out"]
    stream = run.engine.submit(run.request(max_tokens=run.long_tokens))
    within(run.timeout, "Engine: a stream gives its first delta", lambda: next(iter(stream)))
    before = run.engine.stats()["tokens_out"]
    within(run.timeout, "Stream: close returns", stream.close)
    waiting = run.engine.stats()["tokens_out"] - start
    run.settled(rule, waiting=0, running=0)
    made = run.engine.stats()["tokens_out"] - before
    require(made < run.long_tokens - 2, rule, tokens_after_close=made)
    rest = run.drain(stream)
    late = sum(len(delta.token_ids) for delta in rest if delta.finish_reason != "cancelled")
    rule = "Stream: after close comes what was waiting, and at most what one step still makes"
    require(late <= waiting + _STEP, rule, tokens=late, waiting=waiting)
    stream.close()
    same = run.complete(run.request()) == run.complete(run.request())
    require(same, "Engine: a cancelled request does not disturb later ones")


def _check_pause(run: _Run) -> None:
    within(run.timeout, "Engine: pause returns", run.engine.pause)
    stream = run.engine.submit(run.request())
    before = run.engine.stats()["tokens_out"]
    time.sleep(0.05)
    after = run.engine.stats()
    held = after["tokens_out"] == before and after["waiting"] + after["running"] == 1
    require(held, "Engine: while paused nothing is generated and requests stay queued", stats=dict(after))
    run.engine.resume()
    tokens = len(Completion.join(run.drain(stream)).token_ids)
    require(tokens == _GREEDY.max_tokens, "Engine: after resume the queued requests go on", tokens=tokens)


def _check_versions(run: _Run, params: Callable[[], Any]) -> None:
    version, newer = int(run.engine.stats()["version"]), params()
    stream = run.engine.submit(run.request(max_tokens=run.long_tokens))
    deltas = [within(run.timeout, "Engine: a stream gives its first delta", lambda: next(iter(stream)))]
    run.engine.update_params(newer, version + 1)
    deltas += run.drain(stream)
    versions = Completion.join(deltas).versions
    rule = "Engine: the versions of a stream never go back, and follow update_params"
    ordered = list(versions) == sorted(versions)
    require(ordered and versions[0] == version and versions[-1] == version + 1, rule, versions=versions)
    stats = run.engine.stats()["version"]
    require(stats == version + 1, "Engine: stats tells the version of the parameters", version=stats)
    for old in (version, version + 1):
        rule = "Engine: update_params refuses a version that is not larger"
        require_raises(ValueError, rule, lambda old=old: run.engine.update_params(params(), old))
    rule = "Engine: update_params refuses another tree"
    require_raises(ValueError, rule, lambda: run.engine.update_params({"no": {"such": params()}}, version + 9))


def _check_close(run: _Run) -> None:
    stream = run.engine.submit(run.request(max_tokens=run.long_tokens))
    within(run.timeout, "Engine: a stream gives its first delta", lambda: next(iter(stream)))
    within(run.timeout, "Engine: close returns", run.engine.close)
    deltas = run.drain(stream)
    made = sum(len(delta.token_ids) for delta in deltas)
    require(made < run.long_tokens - 2, "Engine: close cancels what runs", tokens_after_close=made)
    reason = deltas[-1].finish_reason if deltas else None
    require(
        reason == "cancelled", "Engine: a stream that close cancels ends with the reason 'cancelled'", reason=reason
    )
    within(run.timeout, "Engine: a second close returns", run.engine.close)
    rule = "Engine: submit after close is a RuntimeError"
    require_raises(RuntimeError, rule, lambda: run.engine.submit(run.request()))
