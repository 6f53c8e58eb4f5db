"""What Prometheus scrapes."""

import os
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from chronomoe.serving.waiting import Job

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Names the folder through which several worker processes add up; read by ``prometheus_client``."""
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one app."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("chronomoe_requests", "Forecast requests.", ["model", "status"], registry=own)
        self.latency = Histogram(
            "chronomoe_request_seconds",
            "From the first byte of a request to its answer.",
            buckets=SECONDS,
            registry=own,
        )
        self.queue = Gauge("chronomoe_queue_rows", "Rows that wait.", multiprocess_mode="livesum", registry=own)
        self.waited = Histogram("chronomoe_queue_seconds", "Wait before a batch.", buckets=SECONDS, registry=own)
        self.batch = Histogram("chronomoe_batch_rows", "Rows of a batch.", ["model"], buckets=ROWS, registry=own)
        self.computed = Histogram(
            "chronomoe_batch_seconds", "Forecast of a batch.", ["model"], buckets=SECONDS, registry=own
        )
        self.experts = Counter(
            "chronomoe_expert_rows", "Rows that an expert forecast, pass by pass.", ["model", "expert"], registry=own
        )

    def observe(self, jobs: Sequence[Job], begin: float, seconds: float) -> None:
        """Note a batch that began at ``begin``."""
        model = jobs[0].task[0]
        self.batch.labels(model).observe(sum(job.rows for job in jobs))
        self.computed.labels(model).observe(seconds)
        for job in jobs:
            self.waited.observe(begin - job.since)

    def count_experts(self, model: str, expert: str, rows: int) -> None:
        """Note that an expert forecast rows."""
        self.experts.labels(model, expert).inc(rows)

    def scrape(self) -> bytes:
        """Return the text format, summed over worker processes."""
        if FOLDER not in os.environ:
            return bytes(generate_latest(self.registry))
        together = CollectorRegistry()
        MultiProcessCollector(together)
        return bytes(generate_latest(together))
