"""The engine in use: borrowed parameters, failing steps, cancellation, refusals, streams."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_toys import VOCAB, Letters, check_greedy, tiny
from jax.experimental.layout import Format, Layout

from dovetail_engine import Engine
from dovetail_protocols import Delta, Request, SamplingParams

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=55, temperature=0.0, ignore_eos=True)


def ask(prompt=(1, 2, 3), sampling=GREEDY):
    return Request(prompt=prompt, sampling=sampling)


def settled(engine, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = engine.stats()
        if not stats["running"] and not stats["waiting"] and not stats["cache_pages_used"]:
            return True
        time.sleep(0.01)
    return False


def copies():
    build, params = tiny()
    return build, jax.tree.map(jnp.array, params)


def test_borrowed_parameters_are_refused_once_their_owner_donated_them(make_engine):
    """The engine generates with parameters that no longer exist, or dies of them instead of saying what to do."""
    build, params = copies()
    engine = make_engine(build, params)
    before = engine.generate([ask()])[0]
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1e-30, p), donate_argnums=0)
    newer = step(params)
    with pytest.raises(RuntimeError, match="call update_params"):
        engine.submit(ask())
    engine.update_params(newer, 1, copy=False)
    after = engine.generate([ask()])[0]
    assert after.token_ids == before.token_ids
    assert set(after.versions) == {1}


def test_a_request_that_runs_when_parameters_are_donated_ends_with_the_reason(make_engine):
    """A rollout hangs when the trainer goes on too early."""
    build, params = copies()
    engine = make_engine(build, params)
    engine.pause()
    stream = engine.submit(ask())
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    engine.resume()
    last = list(stream)[-1]
    assert last.finish_reason == "error"
    assert "call update_params" in last.error
    assert settled(engine)


def test_copied_parameters_outlive_their_owner(make_engine):
    """An engine that was given a copy depends on the original."""
    build, params = copies()
    engine = make_engine(build, params)
    engine.update_params(params, 1, copy=True)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert check_greedy((1, 2, 3), engine.generate([ask()])[0]) > 0


def test_new_parameters_change_the_tokens(make_engine):
    """update_params is noted but not applied."""
    build, params = tiny(seed=1)
    engine = make_engine(*tiny())
    engine.update_params(params, 5)
    done = engine.generate([ask()])[0]
    assert check_greedy((1, 2, 3), done, build, params) == 12
    assert set(done.versions) == {5}


def test_parameters_with_another_order_of_axes(make_engine):
    """Weights that are mapped from a file have its layout, for which programs are compiled and others are changed."""
    build, params = copies()
    turned = jax.tree.map(lambda x: jax.device_put(x, transposed(x)), params)
    engine = make_engine(build, turned)
    done = engine.generate([ask()])[0]
    assert check_greedy((1, 2, 3), done, build, params) == 12
    with pytest.raises(ValueError, match=r"order of axes \(0, 1\); expected \(1, 0\).*copy=True changes it"):
        engine.update_params(params, 1, copy=False)
    engine.update_params(params, 1, copy=True)
    assert engine.generate([ask()])[0].token_ids == done.token_ids
    engine.update_params(turned, 2, copy=False)
    assert engine.generate([ask()])[0].token_ids == done.token_ids


def transposed(x):
    return Format(Layout(tuple(reversed(range(x.ndim)))), x.sharding)


def test_other_parameters_are_refused_by_name(make_engine):
    """A wrong tree is found only when a step fails."""
    engine = make_engine()
    _, params = tiny()
    wrong = {**params, "embedding": params["embedding"][:-1]}
    with pytest.raises(ValueError, match=r"embedding.* is float32\[60, 32\]; expected float32\[61, 32\]"):
        engine.update_params(wrong, 1)
    with pytest.raises(ValueError, match="version=0; expected more than the present 0"):
        engine.update_params(params, 0)


class Fails(Exception):
    pass


@pytest.mark.parametrize("donated", [False, True])
def test_a_failing_step_fails_its_requests_and_no_other(make_engine, donated):
    """One bad step takes down the engine, hangs its requests, or poisons the cache of the others."""
    engine = make_engine(max_running=2)
    call, failures = engine._runner._call, []

    def fail(params, key, batch):
        if key[0] == "mixed" and 9 in batch.tokens:
            failures.append(key)
            if donated:
                for leaf in jax.tree.leaves(engine._runner._cache):
                    leaf.delete()
            raise Fails("injected")
        return call(params, key, batch)

    engine._runner._call = fail
    running = engine.submit(ask((1, 2, 3), LONG))
    first = next(running)
    bad, good = engine.generate([ask((9, 9)), ask((4, 5))])
    assert (bad.finish_reason, bad.error) == ("error", "Fails: injected")
    assert check_greedy((4, 5), good) == 12
    rest = [first, *running]
    tokens = [token for delta in rest for token in delta.token_ids]
    assert rest[-1].finish_reason == "length"
    whole = type(good)(token_ids=tuple(tokens), text="", finish_reason="length")
    assert check_greedy((1, 2, 3), whole) > 40
    assert failures
    assert settled(engine)
    assert engine.stats()["errors"] == 1


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(make_engine, caplog):
    """A bug in the scheduler hangs every caller for ever."""
    engine = make_engine()
    engine.pause()
    stream = engine.submit(ask())

    def broken():
        raise Fails("scheduler")

    engine._scheduler.plan = broken
    engine.resume()
    last = list(stream)[-1]
    assert (last.finish_reason, last.error) == ("error", "the engine stopped: Fails: scheduler")
    engine._thread.join(10)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(ask())
    with pytest.raises(RuntimeError, match="closed"):
        engine.resume()
    assert "the engine stops" in caplog.text


def test_logits_that_are_not_finite_are_an_error_not_a_token(make_engine):
    """NaN weights are answered with token 0 for ever."""
    build, params = tiny()
    engine = make_engine(build, params)
    engine.update_params({**params, "head": params["head"] * jnp.nan}, 1)
    done = engine.generate([ask()])[0]
    assert done.finish_reason == "error"
    assert "not finite" in done.error


def test_parameters_that_broke_leave_nothing_behind(make_engine):
    """Pages that a broken model filled with NaN poison the requests that get them next."""
    build, params = tiny()
    engine = make_engine(build, params, cache_tokens=64)
    engine.update_params(jax.tree.map(lambda x: x * jnp.nan, params), 1)
    broken = engine.generate([ask(range(1, 40)) for _ in range(4)])
    assert {done.finish_reason for done in broken} == {"error"}
    engine.update_params(params, 2)
    for prompt in ((1, 2, 3), tuple(range(1, 30))):
        assert check_greedy(prompt, engine.generate([ask(prompt)])[0]) == 12


def test_a_forgotten_stream_frees_what_it_held(make_engine):
    """Leaving a loop early keeps the request running to its end."""
    engine = make_engine(max_length=2000, decode_steps=1)
    for delta in engine.submit(ask(sampling=SamplingParams(max_tokens=1900, temperature=0.0, ignore_eos=True))):
        assert isinstance(delta, Delta)
        break
    del delta
    gc.collect()
    assert settled(engine)
    assert engine.stats()["tokens_out"] < 1800


def test_a_receiver_that_raises_harms_nobody(make_engine, caplog):
    """One broken connection handler stops all replies."""
    engine = make_engine()
    ended = threading.Event()

    def broken(delta):
        if delta.finish_reason:
            ended.set()
        raise OSError("gone")

    engine.submit(ask(), broken)
    assert check_greedy((1, 2, 3), engine.generate([ask()])[0]) > 0
    assert ended.wait(10)
    assert "receiver of a delta raised" in caplog.text


def test_a_receiver_may_call_the_engine(make_engine):
    """A callback that pauses, updates or asks for more hangs the engine on itself."""
    engine, (_, params) = make_engine(), tiny()
    deltas, ended = [], threading.Event()

    def deliver(delta):
        deltas.append(delta)
        if len(deltas) == 1:
            engine.pause()
            engine.update_params(params, 1)
            engine.resume()
        if delta.finish_reason:
            ended.set()

    engine.submit(ask(), deliver)
    assert ended.wait(20)
    assert (deltas[0].version, deltas[-1].version) == (0, 1)


def test_close_frees_the_cache(make_engine):
    """A closed engine keeps the largest thing it has."""
    engine = make_engine()
    pools = jax.tree.leaves(engine._runner._cache)
    references = [weakref.ref(pool) for pool in pools]
    del pools
    engine.close()
    gc.collect()
    assert not any(reference() for reference in references)


SCRIPT = """
import functools
from dovetail_engine import Engine, EngineOptions
from dovetail_protocols import Request, SamplingParams
from jax.experimental.layout import Format, Layout
from engine_toys import tiny
engine = Engine(*tiny(), options=EngineOptions(max_running=1, max_length=2000, chunk_tokens=16, decode_steps=16))
stream = engine.submit(Request(prompt=[1], sampling=SamplingParams(max_tokens=1900)))
print(len(next(stream).token_ids))
"""


def test_a_script_that_ends_without_close_ends_well():
    """The interpreter ends while a program runs, and the process aborts."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_many_threads_submit_and_cancel(make_engine):
    """Races lose requests, pages or deltas."""
    engine, results = make_engine(), []

    def work(seed):
        rng = np.random.default_rng(seed)
        for _ in range(6):
            prompt = rng.integers(1, VOCAB, rng.integers(1, 20)).tolist()
            stream = engine.submit(ask(prompt))
            if rng.random() < 0.4:
                next(stream)
                stream.close()
                results.append(list(stream)[-1:] or [None])
            else:
                results.append(list(stream)[-1].finish_reason == "length")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 36
    assert all(results)
    assert settled(engine)


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ((61,), GREEDY, "token id 61; expected 0 to 60"),
        ((1,) * 60, GREEDY, "prompt of 60 and max_tokens=12 are 72 tokens; expected at most max_length=64"),
        ((1,), SamplingParams(max_tokens=2, logprobs=21), "logprobs=21; expected at most 20"),
        ((1,), SamplingParams(max_tokens=2, stop_token_ids=(61,)), "stop_token_ids has 61; expected 0 to 60"),
    ],
)
def test_requests_that_can_never_run_are_refused(make_engine, prompt, sampling, match):
    """A request waits for ever, or fails somewhere inside."""
    engine = make_engine()
    with pytest.raises(ValueError, match=match):
        engine.submit(ask(prompt, sampling))
    assert settled(engine)


def test_a_token_without_text_ends_its_request_alone(make_engine):
    """A vocabulary with padding, or a decoder's fault, fails everybody in the step."""

    class Narrow(Letters):
        def decoder(self):
            return self

        def push(self, ids):
            if max(ids) > 30:
                raise ValueError("unknown id")
            return "x"

        def flush(self):
            return ""

    engine = make_engine(tokenizer=Narrow())
    everything = [Request(prompt=[i, i + 1], sampling=SamplingParams(max_tokens=1, seed=i)) for i in range(1, 12)]
    done = engine.generate(everything)
    assert {each.finish_reason for each in done} >= {"error", "length"}
    assert all(each.error == "ValueError: unknown id" for each in done if each.finish_reason == "error")
    assert settled(engine)


def test_parameters_in_the_wrong_place_are_refused(make_engine):
    """update_params accepts what every later step refuses."""
    build, params = tiny()
    engine = make_engine(build, params)
    away = jax.device_put(params, jax.devices()[1])
    with pytest.raises(ValueError, match=r"devices \[1\]; expected \[0\]"):
        engine.update_params(away, 1, copy=False)
    with pytest.raises(ValueError, match="structure"):
        engine.update_params({**params, "layers": OrderedDict(params["layers"])}, 1)
    with pytest.raises(ValueError, match="ndarray; expected a jax array"):
        engine.update_params(jax.tree.map(np.asarray, params), 1)
    engine.update_params(away, 1)
    assert check_greedy((1, 2, 3), engine.generate([ask()])[0]) == 12


def test_stats_tell_whether_requests_are_taken(make_engine):
    """A health check takes an engine for good that refuses everything."""
    build, params = copies()
    engine = make_engine(build, params)
    assert (engine.stats()["ready"], engine.stats()["max_length"]) == (1.0, 64.0)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert engine.stats()["ready"] == 0.0
    engine.update_params(tiny()[1], 1)
    assert engine.stats()["ready"] == 1.0
    engine.close()
    assert engine.stats()["ready"] == 0.0


def test_stop_strings_need_a_tokenizer():
    """Stop strings are silently ignored where there is no text."""
    from dovetail_engine import EngineOptions

    build, params = tiny()
    options = EngineOptions(max_running=1, max_length=16, chunk_tokens=16)
    with Engine(build, params, options=options) as engine:
        with pytest.raises(ValueError, match="needs text; give the engine a tokenizer"):
            engine.submit(ask((1,), SamplingParams(max_tokens=2, stop=("a",))))
        assert engine.generate([ask((1,), SamplingParams(max_tokens=2))])[0].text == ""
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit(ask((1,), SamplingParams(max_tokens=2)))
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.pause()


@pytest.mark.usefixtures("untyped")
def test_a_model_with_another_cache_is_refused():
    """A model that cannot be served fails inside a compilation."""

    class Other:
        vocab_size = 5

        def cache_specs(self):
            return (frozenset(),)

    with pytest.raises(ValueError, match="a layer with frozenset; expected FullCache, WindowCache, LatentCache or"):
        Engine(lambda params: Other(), {"w": jnp.zeros(2)})


def test_sampling_parameters_do_what_they_say(make_engine):
    """A filter is accepted and ignored somewhere between the request and the device."""
    engine = make_engine(tokenizer=Letters())
    base = {"max_tokens": 1, "temperature": 3.0, "logprobs": 20, "ignore_eos": True}

    def drawn(**change):
        requests = [ask((1, 2, 3), SamplingParams(**base | change, seed=seed)) for seed in range(60)]
        return engine.generate(requests)

    free = drawn()
    values = {**free[0].logprobs[0].top, free[0].token_ids[0]: free[0].logprobs[0].value}
    ranked = [(token,) for token in sorted(values, key=values.__getitem__, reverse=True)]
    assert len({done.token_ids for done in free}) > 10
    assert {done.token_ids for done in drawn(top_k=3)} == set(ranked[:3])
    for one in ({"temperature": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert {done.token_ids for done in drawn(**one)} == set(ranked[:1]), one
    assert [d.token_ids for d in drawn()] == [d.token_ids for d in free]
