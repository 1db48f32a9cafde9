"""On the wire: malformed requests, sizes, clients that are slow or leave."""

import asyncio
import json
import socket
import struct
import time

import pytest

from dovetail_serve import ServeOptions

LARGE = 1 << 16


def request(body, path="/v1/completions", extra=""):
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


def read(connection):
    """Status, headers and body of one answer, up to the end of the connection."""
    data = b""
    while piece := connection.recv(1 << 16):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


def body(**fields):
    return json.dumps({"model": "tiny", "prompt": "Hi", **fields}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01 not http\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET /" + b"a" * 200000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_malformed_http(api, data):
    """Garbage brings the server down, or is answered with a success."""
    with api.raw(b"") as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = read(connection)
        except (OSError, IndexError):
            answer = None
    assert answer is None or 400 <= answer[0] < 500
    assert api.call("GET", "/health")[0] == 200


@pytest.mark.parametrize("data", [b"", b"{", b'{"model":', b"\xff\xfe", b"null", b'"x"', b"[1]", b"[" * 50000])
def test_malformed_json(api, data):
    """A body that is no JSON object ends in a 500, or is not the API's error."""
    status, headers, answer = api.call("POST", "/v1/completions", data)
    assert status == 400
    assert headers["content-type"] == "application/json"
    assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    assert json.loads(answer)["error"]["code"] == "invalid_json"


def test_lone_surrogates_cannot_get_in(api):
    """A text that UTF-8 cannot hold reaches the tokenizer and fails there."""
    status, _, answer = api.call("POST", "/v1/completions", b'{"model":"tiny","prompt":"\\ud800"}')
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/models/other", 404),
        ("HEAD", "/health", 200),
        ("GET", "/v1/models?limit=1", 200),
    ],
)
def test_routes(api, method, path, status):
    """An unknown path or method is answered in another form than the API's."""
    found, headers, answer = api.call(method, path)
    assert found == status
    if status >= 400:
        assert json.loads(answer)["error"]["message"]
    if status == 405:
        assert headers["allow"] in ("GET", "POST")


@pytest.fixture(scope="module")
def strict(launch, recorder):
    options = ServeOptions(max_body_bytes=LARGE, read_seconds=0.5, write_seconds=0.5)
    with launch(recorder(max_length=1 << 30), options=options) as api:
        yield api


@pytest.mark.parametrize("chunked", [False, True])
def test_oversized_bodies(strict, chunked):
    """A long body fills the memory, or its refusal is lost while the client still sends."""
    data = b" " * (LARGE * 20)
    if chunked:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        data = head + b"%x\r\n" % len(data) + data + b"\r\n0\r\n\r\n"
        with strict.raw(data) as connection:
            status, _, answer = read_some(connection)
    else:
        status, _, answer = strict.call("POST", "/v1/completions", data)
    assert status == 413
    assert json.loads(answer)["error"]["code"] == "request_too_large"
    assert str(LARGE) in json.loads(answer)["error"]["message"]


def test_a_body_of_the_largest_size(strict):
    """The limit is off by one."""
    data = body(max_tokens=1)
    assert strict.call("POST", "/v1/completions", data + b" " * (LARGE - len(data)))[0] == 200
    assert strict.call("POST", "/v1/completions", data + b" " * (LARGE - len(data) + 1))[0] == 413


def test_keep_alive(api):
    """Every request needs a connection of its own, or an error closes it."""
    with api.raw(request(body(max_tokens=1))) as connection:
        for data in (request(b"{"), request(body(stream=True, max_tokens=2)), request(body(max_tokens=1))):
            found = b""
            while not found.endswith((b"}", b"0\r\n\r\n")):
                found += connection.recv(1 << 16)
            connection.sendall(data)


def test_a_body_that_does_not_come(strict):
    """A client that stops in the middle of its body holds a place for ever."""
    with strict.raw(request(body())[:-3]) as connection:
        status, _, answer = read_some(connection)
    assert (status, json.loads(answer)["error"]["code"]) == (408, "request_timeout")
    assert strict.server._uvicorn._state.admission.used == 0


def read_some(connection):
    data = b""
    while not data.endswith(b"}"):
        data += connection.recv(1 << 16)
    head, _, answer = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, answer


def idle(api):
    used = api.server._uvicorn._state.admission.used
    return api.engine.stats()["running"] + api.engine.stats()["waiting"] + used == 0


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_disconnects_cancel(launch, recorder, until, stream, reset):
    """A client that left keeps the engine busy."""
    with launch(recorder(delay=0.002, max_length=1 << 30)) as api:
        data = request(body(stream=stream, max_tokens=1 << 20, n=3))
        with api.raw(data) as connection:
            until(lambda: api.engine.stats()["running"] == 3)
            if stream:
                assert connection.recv(10)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: idle(api))
        until(lambda: b"client_disconnects_total 1.0" in api.call("GET", "/metrics")[2])
        assert api.post("completions", max_tokens=1)[0] == 200


def test_a_client_library_that_stops_reading_cancels(launch, recorder, until):
    """Breaking out of a stream of the openai package leaves the request running."""
    with launch(recorder(delay=0.002, max_length=1 << 30)) as api:
        stream = api.client.completions.create(model="tiny", prompt="Hi", max_tokens=1 << 20, stream=True)
        with stream:
            next(iter(stream))
        until(lambda: idle(api))


def test_a_disconnect_in_the_queue(launch, recorder, until):
    """A request that never ran is run although nobody waits for it."""
    with launch(recorder(max_running=1)) as api:
        api.engine.pause()
        with api.raw(request(body(max_tokens=5))):
            until(lambda: api.engine.stats()["waiting"] == 1)
        until(lambda: idle(api))
        api.engine.resume()
        assert api.post("completions", max_tokens=1)[0] == 200


def test_disconnects_again_and_again(api, until, soak):
    """Now and then a disconnect at an unlucky moment leaves something behind."""
    for count in range(1000 if soak else 60):
        with api.raw(request(body(stream=count % 2 == 0, max_tokens=300))[: None if count % 5 else -1]) as connection:
            if count % 3:
                time.sleep(count % 7 / 1000)
            elif count % 2 == 0 and count % 5:
                connection.recv(50)
    until(lambda: idle(api))
    assert api.post("completions", max_tokens=1)[0] == 200


def test_a_slow_reader_is_waited_for_and_others_go_on(launch, recorder, until):
    """A slow reader loses text or holds up the others."""
    with launch(recorder(max_length=1 << 30)) as api:
        data = request(body(stream=True, max_tokens=3000, seed=1), extra="connection: close\r\n")
        api.server._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        with api.raw(b"") as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            connection.sendall(data)
            until(lambda: len(api.engine.requests) == 1)
            began = time.monotonic()
            assert api.post("completions", max_tokens=5)[0] == 200
            assert time.monotonic() - began < 10
            time.sleep(0.3)
            _, _, answer = read(connection)
    events = [line for line in answer.split(b"\n") if line.startswith(b"data: {")]
    assert b"[DONE]" in answer
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events]
    whole = "".join(texts)
    assert len(whole.encode()) >= 3000


def test_a_reader_that_reads_nothing_is_cut_off(strict, until):
    """A client that never reads holds its place for ever."""
    with strict.raw(b"") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request(body(stream=True, max_tokens=1 << 20)))
        until(lambda: strict.engine.stats()["running"] == 1)
        until(lambda: idle(strict))


def test_a_request_that_comes_byte_by_byte(api):
    """A request that arrives in pieces is taken for another one."""
    with api.raw(b"") as connection:
        for byte in request(body(max_tokens=1), extra="connection: close\r\n"):
            connection.sendall(bytes([byte]))
        status, _, answer = read(connection)
    assert status == 200
    assert json.loads(answer)["usage"]["completion_tokens"] == 1


def test_the_application_alone(api):
    """The application needs our server around it: lifespan and websockets of another one fail."""
    from dovetail_serve import create_app
    from dovetail_serve.testing import ByteTokenizer

    app = create_app(api.engine, ByteTokenizer(), model="tiny")

    async def converse(scope, messages):
        sent, given = [], iter(messages)

        async def receive():
            return next(given)

        async def send(message):
            sent.append(message["type"])

        await app(scope, receive, send)
        return sent

    both = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    expected = ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert asyncio.run(converse({"type": "lifespan"}, both)) == expected
    assert asyncio.run(converse({"type": "websocket"}, [])) == ["websocket.close"]
