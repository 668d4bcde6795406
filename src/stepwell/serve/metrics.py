"""Prometheus metrics: of HTTP as it happens, of the engine when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from stepwell.engine.api import Kind, StatsReply, Tally

BATCHES = (1, 2, 4, 8, 16, 32, 64)
LABELS = ("model", "stage")


class Metrics:
    """One server's registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "stepwell_http_requests", "HTTP requests answered", ["method", "route", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "stepwell_http_seconds", "From a request's headers to the last byte of its answer", ["route"], registry=self.registry,
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600),
        )  # fmt: skip
        self.aborts = Counter("stepwell_aborts", "Generations given up before their end", registry=self.registry)
        self.failures = Counter("stepwell_failures", "Generations that failed", ["code"], registry=self.registry)
        self._text_tokens = Counter(
            "stepwell_text_tokens", "Tokens of texts that were sent", ["model", "kind"], registry=self.registry
        )
        self._text_forwards = Counter(
            "stepwell_text_forwards", "Forwards that texts took part in", ["model"], registry=self.registry
        )
        self.jobs = Counter("stepwell_jobs", "Jobs that ended", ["status"], registry=self.registry)

    def count_text(self, model: str, usage: Mapping[str, Any]) -> None:
        """Count an answer's tokens and forwards. usage: as the API writes it"""
        tokens = {"prompt": usage["prompt_tokens"], "completion": usage["completion_tokens"]}
        for kind, count in {**tokens, "cached": usage["prompt_tokens_details"]["cached_tokens"]}.items():
            self._text_tokens.labels(model, kind).inc(count)
        self._text_forwards.labels(model).inc(usage["forwards"])

    def observe(self, method: str, route: str, status: int, took_s: float) -> None:
        """Count an HTTP request; status 0 is a client that hung up."""
        self._requests.labels(method if method in ("GET", "POST", "DELETE", "HEAD") else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(took_s)

    def render(self, stats: StatsReply | None, up: bool, name_of: Callable[[str], str]) -> bytes:
        """The text exposition format; `stats` are left out while there is no engine to ask. `name_of` a model's id is how
        it is served."""
        text = generate_latest(self.registry)
        return text + b"".join(generate_latest(_Once(metric)) for metric in _engine_metrics(stats, up, name_of))


class _Once:
    """A registry of a single metric."""

    def __init__(self, metric: Metric):
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def _engine_metrics(stats: StatsReply | None, up: bool, name_of: Callable[[str], str]) -> list[Metric]:
    metrics: list[Metric] = [GaugeMetricFamily("stepwell_engine_up", "1 while the engine takes requests", value=float(up))]
    if stats is None:
        return metrics
    metrics.append(GaugeMetricFamily("stepwell_engine_asleep", "1 while the engine sleeps", value=float(stats.state == "asleep")))
    gauges = {
        "stepwell_queued_samples": ("Samples waiting", stats.queued_samples),
        "stepwell_running_samples": ("Samples under way", stats.running_samples),
        "stepwell_held_samples": ("Samples whose tensors are in memory", stats.held_samples),
        "stepwell_live_requests": ("Requests in the engine", stats.requests),
        "stepwell_engine_memory_bytes": ("Resident memory of the engine's process", stats.memory_bytes),
    }
    metrics += [GaugeMetricFamily(name, text, value=value) for name, (text, value) in gauges.items()]
    counters = {
        "stepwell_steps": ("Steps taken", stats.steps),
        "stepwell_tokens": ("Tokens stepped, samples of a batch together", stats.tokens),
        "stepwell_engine_restarts": ("Times the engine's process was lost and started again", stats.restarts),
    }
    metrics += [CounterMetricFamily(name, text, value=value) for name, (text, value) in counters.items()]
    samples = HistogramMetricFamily("stepwell_batch_samples", "Samples per step", labels=LABELS)
    for (model, stage), sizes in stats.batch_sizes.items():
        buckets = [(str(float(most)), float(sum(n for size, n in sizes.items() if size <= most))) for most in BATCHES]
        total = float(sum(sizes.values()))
        samples.add_metric(
            [name_of(model), stage], [*buckets, ("+Inf", total)], float(sum(size * n for size, n in sizes.items()))
        )
    seconds = _histogram("stepwell_step_seconds", "Seconds per step", stats.step_seconds, name_of)
    return [*metrics, samples, seconds, _histogram("stepwell_step_tokens", "Tokens per step", stats.step_tokens, name_of)]


def _histogram(name: str, text: str, tallies: Mapping[Kind, Tally], name_of: Callable[[str], str]) -> Metric:
    metric = HistogramMetricFamily(name, text, labels=LABELS)
    for (model, stage), tally in tallies.items():
        bounds = [*(str(bound) for bound in tally.bounds), "+Inf"]
        metric.add_metric(
            [name_of(model), stage], list(zip(bounds, accumulate(map(float, tally.counts)), strict=True)), tally.total
        )
    return metric
