"""Prometheus metrics: they parse, and move by what happened."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dovetail_serve import ServeOptions


def read(api):
    status, headers, text = api.call("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(text.decode())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_everything_moves(launch):
    """A dashboard shows nothing, or something else than what happened."""
    with launch() as api:
        assert read(api)["dovetail_prompt_tokens_total",] == 0
        assert api.post("completions", n=2, max_tokens=5, prompt="Hi!")[0] == 200
        assert api.post("completions", max_tokens=5, stop="\n", seed=1, prompt="Hi!")[0] == 200
        assert api.post("completions", n=0)[0] == 400
        assert api.call("GET", "/nowhere")[0] == 404
        found = read(api)
    tokens = found["dovetail_generation_tokens_total",]
    ended = {name[1]: value for name, value in found.items() if name[0] == "dovetail_request_success_total"}
    assert found["dovetail_prompt_tokens_total",] == 6
    assert tokens == found["dovetail_engine_tokens_out",] <= 15
    assert sum(ended.values()) == 3
    assert ended["length"] >= 2
    assert found["dovetail_time_to_first_token_seconds_count",] == 3
    assert found["dovetail_inter_token_latency_seconds_count",] == tokens - 3
    assert found["dovetail_e2e_request_latency_seconds_count",] == 3
    first, total = (found[f"dovetail_{n}_seconds_sum",] for n in ("time_to_first_token", "e2e_request_latency"))
    assert 0 < first <= total
    assert total == pytest.approx(first + found["dovetail_inter_token_latency_seconds_sum",], rel=0.5)
    assert found["dovetail_http_rejections_total", "400"] == 1
    assert found["dovetail_http_rejections_total", "404"] == 1
    assert found["dovetail_num_requests_running",] == found["dovetail_num_requests_waiting",] == 0
    assert found["dovetail_engine_up",] == 1
    assert found["dovetail_engine_version",] == 0


def test_running_and_waiting(launch, recorder, until):
    """Autoscalers see no load."""
    import threading

    with launch(recorder(max_running=2, delay=0.01)) as api:
        thread = threading.Thread(target=api.post, args=("completions",), kwargs={"n": 5, "max_tokens": 50})
        thread.start()
        until(lambda: read(api)["dovetail_num_requests_running",] == 2)
        assert read(api)["dovetail_queue_used",] == 5
        thread.join(30)


def test_each_server_has_its_own(launch):
    """Two servers in a process share counters, or the second one fails."""
    with launch() as one, launch(options=ServeOptions(metrics_prefix="vllm:")) as two:
        assert one.post("completions")[0] == 200
        assert read(one)["dovetail_request_success_total", "length"] == 1
        found = read(two)
        assert found["vllm:num_requests_running",] == 0
        assert ("vllm:request_success_total", "length") not in found


def test_an_engine_whose_stats_fail(launch, recorder, caplog):
    """A dead engine hides the server's own metrics, or counts as healthy."""

    class Dead(type(recorder())):
        def stats(self):
            raise RuntimeError("the device is gone")

    with launch(Dead()) as api:
        assert read(api)["dovetail_engine_up",] == 0
        status, headers, body = api.call("GET", "/health")
        assert status == 503
        assert b"the device is gone" in body
        assert "retry-after" in headers
    assert "device is gone" in caplog.text


def test_several_tokens_at_a_time(launch, recorder):
    """An engine that gives several tokens in a step gets one latency for all of them."""
    from dovetail_protocols import Delta

    class Jumps(type(recorder())):
        def submit(self, request, deliver=None):
            deliver(Delta(token_ids=(65,), text="A"))
            deliver(Delta(token_ids=(66, 67, 68), text="BCD"))
            deliver(Delta(finish_reason="stop"))
            return super().submit(request)

    with launch(Jumps()) as api:
        status, body = api.post("completions")
        assert (status, body["choices"][0]["text"]) == (200, "ABCD")
        found = read(api)
    assert found["dovetail_inter_token_latency_seconds_count",] == 3
    assert found["dovetail_generation_tokens_total",] == 4
