"""Server-sent events, byte for byte, and what happens when the engine fails or cancels in the middle."""

import json
import re
import threading

import openai
import pytest

CHAT = [{"role": "user", "content": "Hi"}]
HEAD = '"id":"ID","object":"{}","created":0,"model":"tiny","system_fingerprint":"FP"'
COMPLETION = "data: {" + HEAD.format("text_completion") + ',"choices":[{}]}}\n\n'
CHUNK = "data: {" + HEAD.format("chat.completion.chunk") + ',"choices":[{}]}}\n\n'
DONE = "data: [DONE]\n\n"


def transcript(api, kind, **fields):
    """The body of a stream with the parts that differ from run to run replaced."""
    given = {"prompt": "Hi"} if kind == "completions" else {"messages": CHAT}
    status, headers, body = api.call("POST", f"/v1/{kind}", {"model": "tiny", "stream": True, **given, **fields})
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    text = re.sub(r'"created":\d+', '"created":0', body.decode())
    text = re.sub(r"fp_[0-9a-f]{10}_v0", "FP", text)
    return re.sub(r"(cmpl|chatcmpl)-[0-9a-f]{32}", "ID", text)


def chunks(template, choices, tail=""):
    """One event for each choice, written as the server must write it."""
    return "".join(template.replace("{}", choice).replace("]}}\n\n", f"]{tail}}}\n\n") for choice in choices)


def piece(text, reason="null", index=0):
    return f'{{"index":{index},"text":{json.dumps(text, ensure_ascii=False)},"logprobs":null,"finish_reason":{reason}}}'


def delta(fields, reason="null", index=0):
    content = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return f'{{"index":{index},"delta":{content},"logprobs":null,"finish_reason":{reason}}}'


@pytest.fixture(scope="module")
def spelling(launch, recorder):
    with launch(recorder(reply=lambda request: "a é".encode())) as api:
        yield api


def test_golden_completion(spelling):
    """The events of a completion changed: a client may not understand them any more."""
    expected = chunks(COMPLETION, [piece("a"), piece(" "), piece("é"), piece("", '"stop"')])
    assert transcript(spelling, "completions") == expected + DONE


def test_golden_chat(spelling):
    """The events of a chat changed: role first, text, an empty one with the reason, the end."""
    deltas = [delta({"role": "assistant", "content": ""}), *(delta({"content": text}) for text in ("a", " ", "é"))]
    expected = chunks(CHUNK, [*deltas, delta({}, '"stop"')])
    assert transcript(spelling, "chat/completions") == expected + DONE


def test_golden_usage(spelling):
    """Usage is not null in the chunks before the last, or the last has choices."""
    for kind, template in (("completions", COMPLETION), ("chat/completions", CHUNK)):
        found = transcript(spelling, kind, max_tokens=1, stream_options={"include_usage": True})
        prompt = 2 if kind == "completions" else 20
        usage = f'"usage":{{"prompt_tokens":{prompt},"completion_tokens":1,"total_tokens":{prompt + 1}}}'
        if kind == "completions":
            first = chunks(template, [piece("a", '"length"')], ',"usage":null')
        else:
            deltas = [delta({"role": "assistant", "content": ""}), delta({"content": "a"}), delta({}, '"length"')]
            first = chunks(template, deltas, ',"usage":null')
        assert found == first + template.replace("[{}]}}", f"[],{usage}}}") + DONE
        without = transcript(spelling, kind, max_tokens=1, stream_options={"include_usage": False})
        assert "usage" not in without


@pytest.mark.parametrize("chat", [False, True])
def test_streams_of_the_client(api, chat):
    """The text of a stream, put together, is not that of the whole answer."""
    if chat:
        create, fields = api.client.chat.completions.create, {"messages": CHAT}
    else:
        create, fields = api.client.completions.create, {"prompt": "Hi"}
    fields |= {"model": "tiny", "n": 3, "seed": 4, "max_tokens": 25, "stop": ["zz"]}
    whole = [choice.message.content if chat else choice.text for choice in create(**fields).choices]
    texts, reasons, last = ["", "", ""], {}, None
    for last in create(**fields, stream=True, stream_options={"include_usage": True}):
        for choice in last.choices:
            texts[choice.index] += (choice.delta.content or "") if chat else choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == whole
    assert reasons == dict.fromkeys(range(3), "length")
    assert last.choices == []
    assert last.usage.completion_tokens == 75


@pytest.mark.parametrize("kind", ["completions", "chat/completions"])
def test_engine_failures(launch, recorder, until, kind):
    """A failed step ends the server, hangs the client, or looks like a good end."""
    with launch(recorder(fail_at=3)) as api:
        status, body = api.post(kind, max_tokens=9)
        assert status == 500
        assert body["error"]["type"] == "server_error"
        assert body["error"]["code"] == "engine_error"
        assert "injected failure" in body["error"]["message"]
        events = transcript(api, kind, max_tokens=9, n=2).split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert DONE.strip() not in events
        until(lambda: api.engine.stats()["running"] == 0)
        api.engine.fail_at = None
        assert api.post(kind, max_tokens=2)[0] == 200


def test_the_client_raises_on_a_failed_stream(launch, recorder):
    """The openai package takes a failed stream for a finished one."""
    with launch(recorder(fail_at=2)) as api:
        stream = api.client.completions.create(model="tiny", prompt="Hi", stream=True, max_tokens=9)
        with pytest.raises(openai.APIError, match="injected failure"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_closes_in_the_middle(launch, recorder, stream):
    """Requests hang when the engine is closed under them, and later ones are not refused."""
    with launch(recorder(delay=0.01)) as api:
        api.engine.pause()
        answer = []
        body = {"model": "tiny", "prompt": "Hi", "stream": stream, "max_tokens": 9}
        thread = threading.Thread(target=lambda: answer.append(api.call("POST", "/v1/completions", body)))
        thread.start()
        while not api.engine.active:
            pass
        api.engine.close()
        thread.join(20)
        status, _, text = answer[0]
        assert status == (200 if stream else 503)
        assert json.loads(text.decode().strip().removeprefix("data: "))["error"]["code"] == "cancelled"
        status, headers, text = api.call("POST", "/v1/completions", body)
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert json.loads(text)["error"]["code"] == "engine_closed"
        assert api.call("GET", "/health")[0] == 503


def test_an_engine_that_refuses_for_a_while(launch, recorder):
    """An engine whose parameters are with the trainer for a moment is given up for ever."""
    with launch(recorder()) as api:
        api.engine.closed = True
        assert api.post("completions")[0] == 503
        assert api.call("GET", "/health")[0] == 503
        api.engine.closed = False
        assert api.post("completions")[0] == 200
        assert api.call("GET", "/health")[0] == 200


def test_a_bug_in_the_middle_is_an_error_event(launch, recorder, caplog):
    """An unexpected exception cuts the stream without a word, or leaves the engine running."""

    class Odd(type(recorder())):
        def submit(self, request, deliver=None):
            return super().submit(request, lambda delta: deliver(delta if len(self.requests) % 2 else None))

    with launch(Odd()) as api:
        assert api.post("completions", max_tokens=1)[0] == 200
        assert "internal error" in transcript(api, "completions", max_tokens=1)
        assert api.post("completions", max_tokens=1)[0] == 200
        status, body = api.post("completions", max_tokens=1)
        assert (status, body["error"]["code"]) == (500, "internal_error")
    assert "failed" in caplog.text


def test_an_engine_that_tells_its_state_is_believed(launch, recorder):
    """Health stays bad after an engine has recovered, or a chat without a length asks for more than the engine has."""
    engine = recorder(max_length=60)
    gauges = {"ready": 1.0, "max_length": 60.0}
    stats = engine.stats
    engine.stats = lambda: {**stats(), **gauges}
    with launch(engine) as api:
        assert api.call("GET", "/health")[0] == 200
        gauges["ready"] = 0.0
        assert api.call("GET", "/health")[0] == 503
        gauges["ready"] = 1.0
        assert api.call("GET", "/health")[0] == 200
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
        status, _, text = api.call("POST", "/v1/chat/completions", body)
        assert status == 200
        assert json.loads(text)["usage"]["total_tokens"] <= 60
