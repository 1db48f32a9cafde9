"""Signals and closing: new requests are refused, accepted ones answered, and there is an end to it."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dovetail_protocols.testing import FakeEngine
from dovetail_serve import ServeOptions, Server, serve
from dovetail_serve.testing import ByteTokenizer

PROGRAM = Path(__file__).parent / "program.py"


@contextlib.contextmanager
def process(port=0, drain=30.0):
    command = [sys.executable, str(PROGRAM), str(port), str(drain)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate(timeout=20)


def ask(port, **fields):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        body = json.dumps({"model": "tiny", "prompt": "Hi", "seed": 1, **fields})
        connection.request("POST", "/v1/completions", body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def refused(port):
    """Whether a new request finds nobody, or is told that the server stops."""
    try:
        status, body = ask(port)
    except (OSError, http.client.HTTPException):
        return True
    return status == 503 and b"draining" in body


def accepted(port, count):
    """Wait until so many replies are in flight."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            if f"dovetail_queue_used {count}.0" in connection.getresponse().read().decode():
                return
        time.sleep(0.02)
    raise AssertionError(f"there were never {count} replies in flight")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load(number):
    """What was accepted before the signal is lost, new requests are accepted, or the process does not end."""
    with process() as child, concurrent.futures.ThreadPoolExecutor(8) as pool:
        port = int(child.stdout.readline().rsplit(":", 1)[1])
        alone = json.loads(ask(port, max_tokens=30)[1])["choices"][0]["text"]
        asked = [pool.submit(ask, port, max_tokens=30, stream=i % 2 == 0) for i in range(8)]
        accepted(port, 8)
        child.send_signal(number)
        time.sleep(0.3)
        assert refused(port)
        for future in asked:
            status, body = future.result(60)
            assert status == 200
            if body.startswith(b"data: "):
                events = [line[6:] for line in body.decode().split("\n\n") if line]
                assert events.pop() == "[DONE]"
                assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == alone
            else:
                assert json.loads(body)["choices"][0]["text"] == alone
        assert child.wait(20) == 0
        assert child.stdout.read() == "closed\n", "serve did not return to its caller"
        assert child.stderr.read() == ""


def test_the_drain_has_an_end():
    """A long reply keeps a server from stopping."""
    with process(drain=0.5) as child, concurrent.futures.ThreadPoolExecutor(2) as pool:
        port = int(child.stdout.readline().rsplit(":", 1)[1])
        asked = [pool.submit(ask, port, max_tokens=4000, stream=stream) for stream in (False, True)]
        accepted(port, 2)
        child.send_signal(signal.SIGTERM)
        status, body = asked[0].result(30)
        assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
        status, body = asked[1].result(30)
        assert status == 200
        assert json.loads(body.decode().split("\n\n")[-2][6:])["error"]["code"] == "draining"
        assert child.wait(20) == 0


def test_a_second_interrupt_ends_at_once():
    """An impatient user has to kill the process."""
    with process() as child, concurrent.futures.ThreadPoolExecutor(1) as pool:
        port = int(child.stdout.readline().rsplit(":", 1)[1])
        asked = pool.submit(ask, port, max_tokens=4000)
        accepted(port, 1)
        child.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert asked.result(10)[0] == 503
        assert child.wait(10) == 0


def test_a_port_in_use():
    """The error does not say which port, or comes as an exit of the process."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port}: .*in use; choose another"):
            serve(FakeEngine(), ByteTokenizer(), model="tiny", port=port)
        with pytest.raises(OSError, match=str(port)):
            Server(FakeEngine(), ByteTokenizer(), model="tiny", port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_ports_that_are_none(port):
    """A wrong port is an overflow deep inside."""
    with pytest.raises(ValueError, match="expected 0"):
        serve(FakeEngine(), ByteTokenizer(), model="tiny", port=port)


def test_hosts_that_are_none():
    """The error does not say which host."""
    with pytest.raises(OSError, match=r"cannot listen on no\.such\.host\.invalid"):
        serve(FakeEngine(), ByteTokenizer(), model="tiny", host="no.such.host.invalid")


@pytest.mark.skipif(not socket.has_ipv6 or not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")
def test_ipv6(launch):
    """An IPv6 address cannot be used, or its URL has no brackets."""
    import urllib.request

    try:
        server = Server(FakeEngine(), ByteTokenizer(), model="tiny", host="::1")
    except OSError:
        pytest.skip("no IPv6 address here")
    with server:
        assert server.url.startswith("http://[::1]:")
        assert urllib.request.urlopen(server.url + "/health").status == 200


def test_closing_answers_what_was_accepted(launch, recorder, until):
    """Leaving the block cuts off a reply, or new requests get in meanwhile."""
    engine = recorder()
    engine.pause()
    with Server(engine, ByteTokenizer(), model="tiny") as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        port = int(server.url.rsplit(":", 1)[1])
        kept = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        asked = pool.submit(ask, port, max_tokens=5)
        until(lambda: engine.stats()["waiting"] == 1)
        kept.request("GET", "/health")
        assert kept.getresponse().read()
        closing = pool.submit(server.close)
        until(lambda: server._uvicorn._state.draining)
        assert refused(port)
        engine.resume()
        assert asked.result(20)[0] == 200
        closing.result(20)
        server.close()
        kept.close()
    assert not [t for t in threading.enumerate() if t.name == "dovetail-serve-loop" and t.is_alive()]
    assert refused(port)


def test_requests_while_draining_are_refused(launch, recorder, until):
    """Between the signal and the end of listening a request is accepted that nobody answers."""
    with launch(recorder(), options=ServeOptions(drain_seconds=20)) as api:
        state, loop = api.server._uvicorn._state, api.server._uvicorn._loop
        loop.call_soon_threadsafe(state.drain)
        until(lambda: state.draining)
        status, headers, body = api.call("POST", "/v1/completions", {"model": "tiny", "prompt": "Hi"})
        assert status == 503
        assert 1 <= int(headers["retry-after"]) <= 20
        assert json.loads(body)["error"]["code"] == "draining"
        status, _, body = api.call("GET", "/health")
        assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
        assert api.call("GET", "/metrics")[0] == 200


def test_a_server_that_cannot_start():
    """An exception in the server's thread is lost and the caller waits for ever."""
    server = Server(FakeEngine(), ByteTokenizer(), model="tiny")
    server._listening.close()
    with pytest.raises(OSError), server:  # noqa: PT011
        pass


@pytest.mark.parametrize(
    ("engine", "tokenizer", "model", "error"),
    [
        (object(), ByteTokenizer(), "tiny", TypeError),
        (FakeEngine(), object(), "tiny", TypeError),
        (FakeEngine(), ByteTokenizer(), "", ValueError),
    ],
)
def test_wrong_arguments(engine, tokenizer, model, error):
    """What is no engine is found out by the first request."""
    with pytest.raises(error, match=r"dovetail_protocols|expected"):
        Server(engine, tokenizer, model=model)
