import contextlib
import http.client
import json
import socket
import time

import openai
import pytest

from dovetail_protocols.testing import FakeEngine
from dovetail_serve import Server
from dovetail_serve.testing import ByteTokenizer


class Recorder(FakeEngine):
    """The fake engine that keeps the requests it was given."""

    def __init__(self, **options):
        super().__init__(**options)
        self.requests = []

    def submit(self, request, deliver=None):
        self.requests.append(request)
        return super().submit(request, deliver)


class Api:
    """A running server, its engine, and a client that never retries."""

    def __init__(self, server, engine):
        self.server, self.engine, self.url = server, engine, server.url
        self.client = openai.OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
        self.port = int(server.url.rsplit(":", 1)[1])

    def call(self, method, path, body=None, headers=None):
        """Return status, headers and body of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, content, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def post(self, kind, **fields):
        """Return status and JSON of a request with the required fields and these."""
        given = {"prompt": "Hi"} if kind == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
        status, _, body = self.call("POST", f"/v1/{kind}", {"model": "tiny", **given, **fields})
        return status, json.loads(body)

    def raw(self, data):
        """Return a socket on which some bytes were sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection


@contextlib.contextmanager
def running(engine=None, tokenizer=None, options=None):
    engine = engine or Recorder()
    with Server(engine, tokenizer or ByteTokenizer(), model="tiny", options=options) as server:
        api = Api(server, engine)
        try:
            yield api
        finally:
            api.client.close()
            engine.close()


@pytest.fixture(scope="session")
def launch():
    """Starts a server for a ``with`` block."""
    return running


@pytest.fixture(scope="module")
def api():
    with running() as found:
        yield found


@pytest.fixture(scope="session")
def until():
    """Waits until something holds."""

    def wait(holds, seconds=20):
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def recorder():
    return Recorder
