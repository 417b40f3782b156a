"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        """Start from zero, in a registry of its own."""
        self.registry = CollectorRegistry()
        self.answers = self._counter(
            "answers", "Answers sent, by route and status.", "route status"
        )
        self.refused = self._counter("refused", "Requests refused because the queue was full.")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self.reused_tokens = self._counter("reused_tokens", "Of these, tokens found in a cache.")
        self.drawn_tokens = self._counter("drawn_tokens", "Tokens generated.")
        self.waiting = Gauge("cvxq_waiting", "Requests that wait.", registry=self.registry)
        self.running = Gauge("cvxq_running", "Requests that are answered.", registry=self.registry)
        self.waiting_seconds = self._histogram("waiting_seconds", "Time in the queue.")
        self.first_token_seconds = self._histogram(
            "first_token_seconds", "Time from the request to the first token."
        )
        self.running_seconds = self._histogram("running_seconds", "Time at the decoder.")

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, labels: str = "") -> Counter:
        return Counter(f"cvxq_{name}", what, labels.split(), registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"cvxq_{name}", what, buckets=_SECONDS, registry=self.registry)
