"""What the server measures, and the routes that show it: /metrics for Prometheus, and /health."""

from collections.abc import Callable

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from moonwhale.infer.request import Request
from moonwhale.serve.worker import Worker

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds


class Metrics:
    """The counters, histograms and gauges that /metrics shows. The gauges read the worker's state."""

    def __init__(self, worker: Worker):
        self.registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"moonwhale_{name}", help, labels, registry=self.registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(f"moonwhale_{name}", help, buckets=BUCKETS, registry=self.registry)

        def gauge(name: str, help: str, read: Callable[[], float]) -> None:
            Gauge(f"moonwhale_{name}", help, registry=self.registry).set_function(read)

        self.requests = counter("requests", "HTTP requests answered", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts read")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.drafts_tested = counter("drafts_tested", "MTP drafts that were verified", "depth")
        self.drafts_accepted = counter("drafts_accepted", "MTP drafts that were accepted", "depth")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token")
        self.answer = histogram("answer_seconds", "From the request to its last token")
        gauge("running", "Sequences in the batch", lambda: worker.num_running)
        gauge("waiting", "Prompts that wait for a slot", lambda: worker.num_waiting)
        gauge("cache_bytes", "Bytes of the latent cache", lambda: worker.scheduler.cache.bytes)

    def count_tokens(self, request: Request) -> None:
        """Counts the tokens and the drafts of a request that has ended."""
        self.generated_tokens.inc(len(request.token_ids))
        # The model's thread may be about to lengthen `accepted`, if the request was cancelled.
        for depth, (tested, accepted) in enumerate(zip(request.drafted, request.accepted, strict=False), start=1):
            self.drafts_tested.labels(depth).inc(tested)
            self.drafts_accepted.labels(depth).inc(accepted)


def add_status_routes(app: FastAPI, model_name: str, worker: Worker, metrics: Metrics) -> None:
    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health(response: Response):
        state = {"model": model_name, "running": worker.num_running, "waiting": worker.num_waiting}
        if worker.failure:
            response.status_code = 503
            return {"status": "failed", "reason": f"the model's thread has ended: {worker.failure}"} | state
        return {"status": "ok"} | state

    @app.get("/metrics")
    async def prometheus():
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
