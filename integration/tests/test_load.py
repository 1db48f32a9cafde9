"""The load client against a small server that streams as OpenAI's does: what it times, and what it refuses."""

import asyncio
import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import load
import pytest
from workload import Job

WORK = [Job([1, 2, 3], 4), Job([4], 1), Job([5, 6], 3), Job([7], 2)]

SERVER = """
import http.server, sys, time
time.sleep(float(sys.argv[2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Handler(BaseHTTPRequestHandler):
    """Answers with ``w<prompt[0]>`` per token, in pieces that do not end where events end."""

    protocol_version = "HTTP/1.1"
    first, step, status, mode = 0.05, 0.02, 200, "good"
    running = most = 0
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def do_GET(self):
        content = json.dumps({"data": [{"id": "fake-model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self):
        cls = type(self)
        with cls.lock:
            cls.running += 1
            cls.most = max(cls.most, cls.running)
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls.seen.append(request)
        self.send_response(self.status)
        chunked = self.mode != "plain"
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            for pause, text in self.pieces(request):
                time.sleep(pause)
                data = text.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)
        with cls.lock:
            cls.running -= 1  # before the client knows that this is all: then it sends the next one
        with contextlib.suppress(BrokenPipeError):
            if self.mode != "cut" and chunked:
                self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    def pieces(self, request):
        if self.status != 200:
            yield 0, '{"error": {"message": "the queue is full"}}'
            return
        count = request["max_tokens"] - (self.mode == "short")
        for index in range(count):
            event = {"choices": [{"index": 0, "text": f" w{request['prompt'][0]}"}]}
            line = f": comment\n\ndata: {json.dumps(event)}\n\n"
            yield (self.step if index else self.first), line[:15]
            yield 0, line[15:]
        if self.mode == "cut":
            return
        if self.mode == "error":
            yield 0, 'data: {"error": {"message": "the step failed"}}\n\n'
        yield 0, "data: " + json.dumps({"choices": [], "usage": {"completion_tokens": count}}) + "\r\n\r\n"
        if self.mode != "endless":
            yield 0, "data: [DONE]\n\n"


@pytest.fixture
def serve():
    """Start the fake with some of its attributes changed; gives its URL and class."""
    with contextlib.ExitStack() as stack:

        def start(**changed):
            handler = type("Changed", (Handler,), {"seen": [], "lock": threading.Lock(), **changed})
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}", handler

        yield start


@pytest.mark.parametrize("mode", ["good", "plain"])
def test_replies_come_in_order_and_whole(serve, mode):
    """An event cut into pieces, or a body without chunks, must not lose a token."""
    url, handler = serve(mode=mode)
    replies = asyncio.run(load.send(url, WORK, 2))
    assert [reply.tokens for reply in replies] == [4, 1, 3, 2]
    assert [reply.text for reply in replies] == [" w1" * 4, " w4", " w5" * 3, " w7" * 2]
    (sent,) = [request for request in handler.seen if request["prompt"] == [1, 2, 3]]
    expected = {"model": "fake-model", "max_tokens": 4, "temperature": 0.0, "stream": True}
    assert expected.items() <= sent.items()


def test_times_are_those_of_the_stream(serve):
    """TTFT is the wait for the first token; TPOT leaves it out and divides by the tokens after it."""
    url, _ = serve(first=0.3, step=0.05)
    (reply,) = asyncio.run(load.send(url, [Job([1], 5)], 1))
    figures = load.summary([reply])
    assert 300 <= figures["ttft_p50_ms"] == figures["ttft_p99_ms"] < 600
    assert 50 <= figures["tpot_p50_ms"] < 120


@pytest.mark.parametrize("at_once", [1, 3, 9])
def test_no_more_than_asked_at_a_time(serve, at_once):
    """More would measure another load than the case says."""
    url, handler = serve(first=0.3)
    replies = asyncio.run(load.send(url, WORK * 2, at_once))
    assert len(replies) == 8
    assert min(at_once, 3) <= handler.most <= at_once


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"status": 503}, "503.*the queue is full"),
        ({"mode": "short"}, r"3 tokens came for max_tokens=4"),
        ({"mode": "error"}, "the step failed"),
        ({"mode": "endless"}, r"without \[DONE\]"),
        ({"mode": "cut"}, "the connection broke"),
    ],
)
def test_a_reply_that_is_not_whole_is_an_error(serve, changed, message):
    """A server that drops tokens must not look fast."""
    url, _ = serve(**changed)
    with pytest.raises(load.LoadError, match=message):
        asyncio.run(load.send(url, WORK[:1], 1))


def test_percentiles():
    assert load.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3.0
    assert load.percentile([0.0, 1.0], 99) == pytest.approx(0.99)
    assert load.percentile([7.0], 99) == 7.0
    assert math.isnan(load.percentile([], 50))
    single = load.Reply(sent=1.0, first=1.5, last=1.5, tokens=1)
    assert load.summary([single])["ttft_p50_ms"] == 500
    assert math.isnan(load.summary([single])["tpot_p50_ms"])


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return [sys.executable, str(path), "{port}"]


def test_ready_is_when_health_answers(program):
    """The start is timed from the command, and the server ends with the block."""
    with load.server([*program, "1.0"], 30.0) as (url, seconds):
        assert 1.0 < seconds < 20
        assert load.healthy(url)
    assert not load.healthy(url)


@pytest.mark.parametrize(
    ("words", "message"), [(["100"], "not ready after 1 s"), (["not a number"], "ended with exit code 1")]
)
def test_a_server_that_does_not_start(program, words, message):
    with pytest.raises(load.LoadError, match=message), load.server([*program, *words], 1.0 if "100" in words else 30.0):
        pass


def test_the_command_line(serve):
    """One JSON line, and an error without a traceback."""
    command = [sys.executable, str(Path(load.__file__)), "--requests", "3", "--prompt", "16", "--output", "4", "--url"]
    url, handler = serve()
    shown = subprocess.run([*command, url], capture_output=True, text=True, timeout=60, check=True)
    assert {"tokens_per_second", "ttft_p50_ms", "tpot_p99_ms"} <= json.loads(shown.stdout).keys()
    assert len(handler.seen) == 3
    url, _ = serve(status=500)
    failed = subprocess.run([*command, url], capture_output=True, text=True, timeout=60, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("load: the server answered")
