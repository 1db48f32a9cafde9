"""Prometheus metrics of one server, in a registry of its own."""

import re
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from dovetail_protocols import Delta, Engine
from dovetail_serve.admission import Admission

__all__ = ["Metrics", "ReplyClock"]

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counters, latencies and the engine's own numbers; a reply is one choice of one prompt."""

    def __init__(self, engine: Engine, admission: Admission, prefix: str) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(prefix + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(prefix + name, text, registry=registry, buckets=buckets)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, each prompt counted once.")
        self.generation_tokens = counter("generation_tokens", "Tokens of replies.")
        self.success = counter("request_success", "Replies that ended, by the reason.", "finished_reason")
        self.rejections = counter("http_rejections", "Requests answered with an error, by status.", "status")
        self.disconnects = counter("client_disconnects", "Requests whose client left before the end.")
        self.first = histogram("time_to_first_token_seconds", "From a request to a reply's first token.", LONG)
        self.between = histogram("inter_token_latency_seconds", "From one token to the next.", SHORT)
        self.total = histogram("e2e_request_latency_seconds", "From a request to a reply's end.", LONG)
        used = Gauge(f"{prefix}queue_used", "Replies that were admitted and are in flight.", registry=registry)
        used.set_function(lambda: admission.used)
        Gauge(f"{prefix}queue_limit", "How many may be.", registry=registry).set(admission.limit)
        registry.register(_EngineStats(engine, prefix))

    def text(self) -> bytes:
        """Return everything in the Prometheus text format; asks the engine, which may block for a moment."""
        return generate_latest(self.registry)


class ReplyClock:
    """Observes one reply from its deltas; the times are those of the engine, whatever the client's pace."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        self._metrics, self._started, self._last = metrics, started, 0.0

    def push(self, delta: Delta, when: float) -> None:
        """Take a delta that the engine gave at a time."""
        metrics, count = self._metrics, len(delta.token_ids)
        if count:
            metrics.generation_tokens.inc(count)
            if self._last:
                for _ in range(count):
                    metrics.between.observe((when - self._last) / count)
            else:
                metrics.first.observe(when - self._started)
            self._last = when
        if delta.finish_reason is not None:
            metrics.success.labels(delta.finish_reason).inc()
            metrics.total.observe(when - self._started)


class _EngineStats(Collector):
    """What `Engine.stats` says at the moment."""

    def __init__(self, engine: Engine, prefix: str) -> None:
        self._engine, self._prefix = engine, prefix

    def collect(self) -> Iterator[GaugeMetricFamily]:
        try:
            stats = dict(self._engine.stats())
        except Exception:  # noqa: BLE001  a dead engine must not hide the server's own metrics
            stats = None
        up = GaugeMetricFamily(
            f"{self._prefix}engine_up", "Whether the engine answers.", value=float(stats is not None)
        )
        yield up
        for name, value in (stats or {}).items():
            if name in ("running", "waiting"):
                yield GaugeMetricFamily(f"{self._prefix}num_requests_{name}", f"Replies {name}.", value=value)
            else:
                safe = re.sub(r"[^a-zA-Z0-9_]", "_", name)
                yield GaugeMetricFamily(f"{self._prefix}engine_{safe}", f"The engine's {name}.", value=value)
