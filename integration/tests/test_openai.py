"""The real client against the server over the engine with a small random Llama and a trained tokenizer.

What each reply should be comes from the plain forward, or from the same request sent alone.
"""

import asyncio
import contextlib
import functools
import threading
import time
import types
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from flax import nnx
from prometheus_client.parser import text_string_to_metric_families

from dovetail_engine import Engine, EngineOptions
from dovetail_kernels import DenseMixer
from dovetail_models import Llama, LlamaConfig, merge, split
from dovetail_serve import Server
from dovetail_text import CHATML, train_bpe

LENGTH, MARGIN = 96, 1e-3
NAME = "tiny"
ALL = {"ignore_eos": True}
LONG = {"max_tokens": 60, "extra_body": ALL}
TEXTS = ["to be, or not to be, that is the question: whether 'tis nobler in the mind to suffer\n"] * 4 + [
    "the slings and arrows of outrageous fortune, or to take arms against a sea of troubles\n",
    "and by opposing end them: to die, to sleep, no more, and by a sleep to say we end the heart-ache\n",
]
PROMPTS = ["to be", "the slings and arrows of outrageous fortune, or to take", "whether", "sleep é ü"]
CHAT = [{"role": "system", "content": "mind"}, {"role": "user", "content": "to be?"}]


@pytest.fixture(scope="module")
def compiled():
    """What this process compiles, in any thread."""
    found = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def api(compiled):
    """An engine, a server over it, a client that never retries, and the plain forward."""
    tokenizer = train_bpe(TEXTS, 360, chat_template=CHATML)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        features=32,
        hidden=48,
        layers=2,
        heads=4,
        kv_heads=2,
        init_std=0.4,
        max_position=LENGTH,
    )
    definition, params = split(Llama(config, rngs=nnx.Rngs(0)))
    build = functools.partial(merge, definition)
    options = EngineOptions(max_running=4, max_length=LENGTH, chunk_tokens=16, decode_steps=4, page_size=8)
    with Engine(build, params, tokenizer=tokenizer, options=options) as engine:
        plain = forward(build, params)
        with (
            Server(engine, tokenizer, model=NAME) as server,
            openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0) as client,
        ):
            assert compiled
            compiled.clear()
            yield types.SimpleNamespace(
                engine=engine, server=server, client=client, tokenizer=tokenizer, params=params, plain=plain
            )


@pytest.fixture(autouse=True)
def nothing_compiles(api, compiled):
    """Some request stalls everyone while a program is compiled for it, or leaves something behind."""
    yield
    assert not compiled
    until(lambda: idle(api.engine))


def forward(build, params):
    """The plain forward: log-probabilities ``[tokens, vocab]`` of what follows each token."""

    @jax.jit
    def run(tokens):
        model = build(params)
        hidden, _, _ = model.hidden(tokens, jnp.arange(LENGTH), DenseMixer.of(tokens[None], implementation="reference"))
        return jax.nn.log_softmax(model.unembed(hidden))

    run(np.zeros(LENGTH, np.int32))
    return lambda ids: np.asarray(run(np.pad(np.asarray(ids, np.int32), (0, LENGTH - len(ids)))))[: len(ids)]


def until(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def idle(engine):
    stats = engine.stats()
    return stats["running"] == stats["waiting"] == stats["cache_pages_used"] == 0


def complete(api, prompt=PROMPTS[0], **fields):
    return api.client.completions.create(**{"model": NAME, "prompt": prompt, "max_tokens": 24, "seed": 1, **fields})


def chat(api, **fields):
    given = {"model": NAME, "messages": CHAT, "max_tokens": 24, "seed": 1, **fields}
    return api.client.chat.completions.create(**given)


def ids_of(api, choice):
    """The ids of a chat's reply, from the bytes in its log-probabilities."""
    of = {api.tokenizer.token_bytes(i): i for i in range(api.tokenizer.vocab_size)}
    return [of[bytes(entry.bytes)] for entry in choice.logprobs.content]


def chat_ids(api, messages=CHAT):
    return api.tokenizer.chat(messages, add_generation_prompt=True).ids


@contextlib.contextmanager
def wrapped(engine, name, wrap):
    """Replace the programs of one kind: ``wrap(call)`` is what is called instead."""
    table = dict(engine.programs.table)
    for key, entry in table.items():
        if key[0] == name:
            engine.programs.table[key] = entry._replace(call=functools.partial(wrap, entry.call))
    try:
        yield
    finally:
        engine.programs.table.update(table)


def slowly(call, *args):
    time.sleep(0.03)
    return call(*args)


def metrics(api):
    text = urllib.request.urlopen(api.server.url + "/metrics", timeout=20).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name + "".join(sample.labels.values()): sample.value for sample in samples}


# The tokens and their log-probabilities ------------------------------------------------------------------------------


def test_greedy_is_that_of_the_plain_forward(api):
    """Through templates, chunks, cache and texts: the tokens are not the model's."""
    compared = total = 0
    for messages in ([{"role": "user", "content": prompt}] for prompt in PROMPTS):
        choice = chat(api, messages=messages, temperature=0, logprobs=True, max_tokens=40, extra_body=ALL).choices[0]
        prompt, ids = chat_ids(api, messages), ids_of(api, choice)
        assert len(ids) == 40
        assert choice.message.content == api.tokenizer.decode(ids)
        rows = api.plain(prompt + ids)[len(prompt) - 1 : -1]
        values = [entry.logprob for entry in choice.logprobs.content]
        np.testing.assert_allclose(values, rows[np.arange(len(ids)), ids], atol=1e-4)
        best = np.sort(rows)
        close = np.flatnonzero(best[:, -1] - best[:, -2] < MARGIN)
        count = close[0] if len(close) else len(ids)
        assert ids[:count] == rows.argmax(-1)[:count].tolist()
        compared, total = compared + count, total + len(ids)
    print(f"{compared} of {total} tokens compared")
    assert compared >= 0.9 * total


def test_logprobs_are_those_of_the_plain_forward(api):
    """Values are of filtered or tempered logits, or the alternatives are not the likeliest."""
    choice = chat(api, logprobs=True, top_logprobs=20, temperature=1.5, top_p=0.9, max_tokens=30).choices[0]
    prompt, ids = chat_ids(api), ids_of(api, choice)
    rows = api.plain(prompt + ids)[len(prompt) - 1 : -1]
    for entry, token, row in zip(choice.logprobs.content, ids, rows, strict=True):
        np.testing.assert_allclose(entry.logprob, row[token], atol=1e-4)
        likeliest = np.sort(row)[::-1][:20]
        np.testing.assert_allclose([top.logprob for top in entry.top_logprobs], likeliest, atol=1e-4)
    assert any(token != row.argmax() for token, row in zip(ids, rows, strict=True))


def test_logprobs_of_completions(api):
    """The older form of log-probabilities has other values, or its lists do not belong together."""
    prompt = api.tokenizer.encode(PROMPTS[1])
    answer = complete(api, prompt=prompt, logprobs=3, temperature=0, max_tokens=12).choices[0]
    rows = api.plain(prompt + greedy(api, prompt, 12))[len(prompt) - 1 : -1]
    np.testing.assert_allclose(answer.logprobs.token_logprobs, rows.max(-1)[: len(answer.logprobs.tokens)], atol=1e-4)
    assert all(3 <= len(top) <= 4 for top in answer.logprobs.top_logprobs)
    places = answer.logprobs.text_offset
    assert places[0] == 0
    assert places == sorted(places)


def greedy(api, prompt, count):
    """The plain forward's own choice, token after token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(api.plain(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("extra", [{"top_k": 1}, {"min_p": 1.0}])
def test_filters_beside_those_of_openai(api, extra):
    """`top_k` or `min_p` are accepted and have no effect: with only the best token left a reply is the greedy one."""
    assert complete(api, extra_body=extra).choices[0].text == complete(api, temperature=0).choices[0].text
    assert complete(api).choices[0].text != complete(api, temperature=0).choices[0].text


def test_choices_have_seeds_of_their_own(api):
    """Choice i is not the reply to seed + i, or depends on the others."""
    answer = complete(api, prompt=PROMPTS[:2], n=3, seed=10)
    alone = [complete(api, prompt=prompt, seed=10 + i).choices[0].text for prompt in PROMPTS[:2] for i in range(3)]
    assert [choice.text for choice in answer.choices] == alone
    assert len(set(alone)) == 6
    chats = chat(api, n=3, seed=10).choices
    assert [c.message.content for c in chats] == [chat(api, seed=10 + i).choices[0].message.content for i in range(3)]


# Where a reply ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_over_the_borders_of_tokens(api, stream):
    """A stop string of two tokens' parts is not found, is found late, or its beginning is sent."""
    whole = chat(api, logprobs=True, max_tokens=40, extra_body=ALL).choices[0]
    ids, text = ids_of(api, whole), whole.message.content
    pieces = [api.tokenizer.token_bytes(i) for i in ids]
    at = next(i for i in range(4, 40) if all(p.isascii() and p.strip() == p for p in pieces[i - 1 : i + 1]))
    stop = (pieces[at - 1][-1:] + pieces[at][:1]).decode()
    count = next(i for i in range(1, 41) if stop in api.tokenizer.decode(ids[:i]))
    fields = {"stop": ["never", stop], "max_tokens": 40, "extra_body": ALL}
    if stream:
        text_found, reason, usage = joined(chat(api, stream=True, stream_options={"include_usage": True}, **fields))
    else:
        answer = chat(api, **fields)
        text_found, reason, usage = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage
    assert (text_found, reason) == (text.split(stop)[0], "stop")
    assert usage.completion_tokens == count


def test_stop_tokens(api):
    """A stop id of the request is ignored, shows in the text, or is not counted."""
    ids = ids_of(api, chat(api, logprobs=True, extra_body=ALL).choices[0])
    at = next(i for i in range(8, 24) if ids[i] not in ids[:i])
    answer = chat(api, extra_body={**ALL, "stop_token_ids": [ids[at]]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == api.tokenizer.decode(ids[:at])
    assert answer.usage.completion_tokens == at + 1


def test_end_tokens(api):
    """The tokenizer's end tokens do not end a reply, or end it although the request says otherwise."""
    fields = {"n": 16, "seed": 0, "max_tokens": 60, "temperature": 2}
    ended = {c.index: c.text for c in complete(api, **fields).choices if c.finish_reason == "stop"}
    assert ended
    whole = complete(api, extra_body=ALL, **fields)
    assert whole.usage.completion_tokens == 16 * 60
    for choice in whole.choices:
        assert choice.finish_reason == "length"
        assert choice.text.startswith(ended.get(choice.index, ""))


# Streams --------------------------------------------------------------------------------------------------------------


def joined(stream):
    """Text, reason and usage of a stream with one choice."""
    text, reason, usage = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            assert reason is None
            text += (choice.text if hasattr(choice, "text") else choice.delta.content) or ""
            reason = choice.finish_reason
    return text, reason, usage


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 3}, {"seed": 4, "top_p": 0.8, "temperature": 1.3}])
def test_streams_are_the_whole_answers(api, fields):
    """Text or usage differ between an answer and its stream."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 40, **fields}
    whole = complete(api, **{**fields, "max_tokens": 40})
    assert joined(complete(api, **options)) == (whole.choices[0].text, whole.choices[0].finish_reason, whole.usage)
    whole = chat(api, **{**fields, "max_tokens": 40})
    choice = whole.choices[0]
    assert joined(chat(api, **options)) == (choice.message.content, choice.finish_reason, whole.usage)


def test_logprobs_of_streams(api):
    """The pieces of the log-probabilities are not those of the whole answer."""
    fields = {"logprobs": True, "top_logprobs": 2}
    found = [chunk.choices[0].logprobs for chunk in chat(api, stream=True, **fields)]
    pieces = [entry for part in found if part is not None for entry in part.content]
    whole = chat(api, **fields).choices[0].logprobs.content
    assert [p.bytes for p in pieces] == [p.bytes for p in whole]
    np.testing.assert_allclose([p.logprob for p in pieces], [p.logprob for p in whole], atol=1e-5)


def test_new_parameters_while_streaming(api):
    """An update breaks a stream that runs, is not used for its further tokens, or the version is not told."""
    before = int(api.engine.stats()["version"])
    changed = jax.tree.map(lambda x: jax.device_put(np.asarray(x) * np.float32(1.5)), api.params)
    with wrapped(api.engine, "decode", slowly):
        stream = complete(api, stream=True, temperature=0, **LONG)
        chunks = [next(stream)]
        api.engine.update_params(changed, before + 1, copy=False)
        chunks += stream
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    versions = [int(c.system_fingerprint.split("_v")[1]) for c in chunks]
    assert versions == sorted(versions)
    assert set(versions) == {before, before + 1}
    text = "".join(chunk.choices[0].text for chunk in chunks)
    api.engine.update_params(api.params, before + 2, copy=False)
    old = complete(api, temperature=0, **LONG).choices[0].text
    assert text.startswith(chunks[0].choices[0].text)
    assert old.startswith(chunks[0].choices[0].text)
    assert text != old


# Others, errors, leaving ----------------------------------------------------------------------------------------------


def jobs():
    """Sixteen different requests, half of them chats, every third greedy."""
    for i in range(16):
        sampling = {"seed": i, "max_tokens": 8 + 2 * i, "temperature": 0 if i % 3 == 0 else 1}
        prompt = PROMPTS[i % 4]
        asked = {"messages": [{"role": "user", "content": prompt}]} if i % 2 else {"prompt": prompt}
        yield sampling | asked


async def ask(client, fields, stream):
    resource = client.chat.completions if "messages" in fields else client.completions
    answer = await resource.create(model=NAME, stream=stream, **fields)
    chunks = [chunk async for chunk in answer] if stream else [answer]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    parts = [getattr(c, "delta", None) or getattr(c, "message", None) for c in choices]
    text = "".join((c.text if part is None else part.content) or "" for c, part in zip(choices, parts, strict=True))
    return text, choices[-1].finish_reason


def test_sixteen_clients_get_what_each_gets_alone(api):
    """A reply depends on what else runs: batches, waiting, chunks of other prompts."""

    async def everything():
        async with contextlib.AsyncExitStack() as stack:
            make = functools.partial(openai.AsyncOpenAI, base_url=api.server.base_url, api_key="none", max_retries=0)
            clients = [await stack.enter_async_context(make()) for _ in range(16)]
            alone = [await ask(clients[0], fields, False) for fields in jobs()]
            together = [ask(c, fields, i % 4 < 2) for i, (c, fields) in enumerate(zip(clients, jobs(), strict=True))]
            return alone, await asyncio.gather(*together)

    alone, together = asyncio.run(everything())
    assert together == alone
    assert len(set(alone)) > 12


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"max_tokens": 95}, 400, "prompt", f"at most {LENGTH} together"),
        ({"prompt": [100_000]}, 400, "prompt", "token id 100000"),
        ({"model": "large"}, 404, "model", NAME),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "frequency_penalty=0.5 is not supported"),
        ({"logprobs": 21}, 400, "logprobs", "0 to 20"),
        ({"temperature": 3}, 400, "temperature", "0 to 2"),
        ({"extra_body": {"top_kk": 1}}, 400, "top_kk", "did you mean top_k"),
    ],
)
def test_refusals(api, fields, status, param, words):
    """What cannot be done is done otherwise, or the error does not say what is wrong."""
    with pytest.raises(openai.APIStatusError) as caught:
        complete(api, **fields)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert words in caught.value.message


def test_metrics_count_what_was_served(api):
    """Requests, tokens, errors or clients that left do not show where a dashboard looks."""
    before = metrics(api)
    usage = complete(api, n=2, extra_body=ALL).usage
    with pytest.raises(openai.NotFoundError):
        complete(api, model="large")
    until(lambda: metrics(api)["dovetail_queue_used"] == 0)
    after = metrics(api)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert usage.completion_tokens == 48
    assert moved["dovetail_generation_tokens_total"] == moved["dovetail_engine_tokens_out"] == 48
    assert moved["dovetail_prompt_tokens_total"] == usage.prompt_tokens
    assert moved["dovetail_request_success_totallength"] == 2
    assert moved["dovetail_e2e_request_latency_seconds_count"] == 2
    assert moved["dovetail_http_rejections_total404"] == 1
    assert after["dovetail_engine_up"] == 1


@pytest.mark.parametrize("how", ["stream", "whole", "waiting"])
def test_a_client_that_leaves(api, how):
    """Its tokens are computed on for nobody, its pages stay taken, or another's reply suffers."""
    expected = complete(api, **LONG).choices[0].text
    left = metrics(api)["dovetail_client_disconnects_total"]
    with wrapped(api.engine, "decode", slowly):
        stream = complete(api, stream=True, **LONG)
        leave = read_and_leave if how == "stream" else give_up
        leave(api, 8 if how == "waiting" else 1)
        try:
            until(lambda: [api.engine.stats()[name] for name in ("running", "waiting")] == [1, 0])
            produced = api.engine.stats()["tokens_out"]
        finally:
            api.engine.resume()
        assert joined(stream)[0] == expected
    assert api.engine.stats()["tokens_out"] - produced < 60
    until(lambda: metrics(api)["dovetail_client_disconnects_total"] == left + 1)


def read_and_leave(api, _):
    """Go away after the first piece; the engine pauses, so that it cannot come to the end by itself."""
    leaving = complete(api, stream=True, **LONG)
    next(leaving)
    api.engine.pause()
    leaving.close()


def give_up(api, n):
    """Run out of patience with `n` replies, at most three of which run beside the other client's."""

    def ask():
        with pytest.raises(openai.APITimeoutError):
            complete(api, n=n, timeout=1, **LONG)
        done.set()

    done = threading.Event()
    threading.Thread(target=ask).start()
    until(lambda: api.engine.stats()["running"] == min(1 + n, 4))
    api.engine.pause()
    assert done.wait(20)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_fails(api, when):
    """A bad step ends requests that were not in it, hangs its own, or takes the engine down."""
    expected = complete(api, **LONG).choices[0].text
    preempted = api.engine.stats()["preemptions"]
    failures = ["the device is on fire"]

    def fail(call, *args):
        result = call(*args) if when == "after" or not failures else None  # which takes the cache
        if failures:
            raise OSError(failures.pop())
        return result

    with wrapped(api.engine, "decode", slowly):
        stream = complete(api, stream=True, **LONG)
        text = next(stream).choices[0].text
        with wrapped(api.engine, "mixed", fail), pytest.raises(openai.InternalServerError) as caught:
            complete(api, prompt=PROMPTS[1])
        text += joined(stream)[0]
    assert caught.value.status_code == 500
    assert "OSError: the device is on fire" in caught.value.message
    assert text == expected
    assert api.engine.stats()["preemptions"] - preempted == (when == "after")
    assert complete(api, **LONG).choices[0].text == expected


def test_a_step_that_fails_in_the_middle_of_streams(api):
    """A stream just ends, as if the reply were complete, or only one of those in the step is told."""
    expected = chat(api, **LONG).choices[0].message.content
    failing, errors = threading.Event(), []

    def read(seed):
        stream = chat(api, stream=True, seed=seed, **LONG)
        next(stream)
        with pytest.raises(openai.APIError) as caught:
            joined(stream)
        errors.append(caught.value.message)

    def fail(call, *args):
        if failing.is_set():
            raise OSError("the device is on fire")
        return slowly(call, *args)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in (1, 2)]
    with wrapped(api.engine, "decode", fail):
        for reader in readers:
            reader.start()
        until(lambda: api.engine.stats()["running"] == 2)
        failing.set()
        for reader in readers:
            reader.join(20)
    assert [("the device is on fire" in error) for error in errors] == [True, True]
    assert chat(api, **LONG).choices[0].message.content == expected
