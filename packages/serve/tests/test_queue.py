"""The bound of the queue: what is above is told when to come back, what is inside is answered."""

import json
import threading

import openai
import pytest

from dovetail_serve import ServeOptions
from dovetail_serve.admission import Admission
from dovetail_serve.errors import ApiError


@pytest.fixture
def full(launch, recorder, until):
    """A server with room for 3 replies and 2 of them waiting, and what their clients get."""
    with launch(recorder(), options=ServeOptions(max_queue=3)) as api:
        api.engine.pause()
        answers = []
        body = {"model": "tiny", "prompt": "Hi", "n": 2, "max_tokens": 3}
        thread = threading.Thread(target=lambda: answers.append(api.call("POST", "/v1/completions", body)))
        thread.start()
        until(lambda: api.engine.stats()["waiting"] == 2)
        yield api, answers
        api.engine.resume()
        thread.join(20)
        assert answers[0][0] == 200, "an accepted request was not answered"


@pytest.mark.parametrize("stream", [False, True])
def test_above_the_bound(full, stream):
    """The queue grows without bound, or a client is not told when to come back."""
    api, answers = full
    body = {"model": "tiny", "prompt": "Hi", "n": 2, "stream": stream}
    status, headers, answer = api.call("POST", "/v1/completions", body)
    assert status == 503
    assert 1 <= int(headers["retry-after"]) <= 60
    assert json.loads(answer)["error"]["code"] == "queue_full"
    assert headers["retry-after"] in json.loads(answer)["error"]["message"]
    assert not answers
    assert api.call("GET", "/health")[0] == 200
    text = api.call("GET", "/metrics")[2].decode()
    assert "dovetail_queue_used 2.0" in text
    assert "dovetail_queue_limit 3.0" in text
    assert 'dovetail_http_rejections_total{status="503"} 1.0' in text


def test_room_is_given_back(full, until):
    """A refused or finished request keeps its place."""
    api, _ = full
    for _ in range(5):
        assert api.post("completions", n=2)[0] == 503
    api.engine.resume()
    until(lambda: b"dovetail_queue_used 0.0" in api.call("GET", "/metrics")[2])
    for _ in range(3):
        assert api.post("completions", n=3, max_tokens=1)[0] == 200
        assert api.post("completions", n=3, temperature=9)[0] == 400


def test_the_client_comes_back(full):
    """The openai package's own retry does not get in once there is room."""
    api, _ = full
    threading.Timer(0.3, api.engine.resume).start()
    with openai.OpenAI(base_url=api.server.base_url, api_key="none", max_retries=5) as client:
        assert client.completions.create(model="tiny", prompt="Hi", n=3, max_tokens=2).usage.completion_tokens == 6


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        ("completions", {"n": 4}, "n"),
        ("completions", {"prompt": ["a"] * 4}, "prompt"),
        ("chat/completions", {"n": 4}, "n"),
    ],
)
def test_more_than_ever_fits(full, kind, fields, param):
    """A request that can never be admitted is told to come back."""
    api, _ = full
    status, body = api.post(kind, **fields)
    assert (status, body["error"]["param"]) == (400, param)


def test_times_follow_how_long_replies_take():
    """Retry-After has nothing to do with the load."""
    admission = Admission(4)
    admission.enter(4)
    admission.leave(4, seconds=41.0)  # the average goes from 1 to 9 seconds
    admission.enter(4)
    assert admission.wait(1) == 3  # one of four ends every 9/4 seconds
    assert admission.wait(4) == 9
    assert admission.wait(400) == 60
    with pytest.raises(ApiError) as caught:
        admission.enter(1)
    assert caught.value.retry_after == 3
    assert admission.used == 4
    admission.leave(4)
    admission.enter(4)
