"""What Prometheus reads: durations counted in this process, jobs and claims counted in the database when asked."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from app.domain.jobs import Status
from app.store import counts
from app.store.session import transaction


class Exposition:
    """One registry per application, so that two in one process do not meet."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._durations = Histogram(
            "tuneyard_http_request_seconds", "Time from the first byte of a request to the last of its answer.",
            ("method", "route", "status"), registry=self._registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )  # fmt: skip
        self._streams = Gauge("tuneyard_open_streams", "Open event streams and long polls.", registry=self._registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is the template, so that ids make no new series."""
        self._durations.labels(method, route, str(status)).observe(seconds)

    def watch(self, engine: Engine) -> None:
        """Also count what is in this database."""
        self._registry.register(_Database(engine))

    def render(self, open_streams: int) -> tuple[bytes, str]:
        """Give the text and its content type."""
        self._streams.set(open_streams)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Database(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterator[Metric]:
        """Say nothing at registration: the database is asked only when Prometheus asks."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Ask the database."""
        with transaction(self._engine, read_only=True) as session:
            by_status, by_source = counts.jobs(session), counts.claims(session)
        jobs = GaugeMetricFamily("tuneyard_jobs", "Jobs by status.", labels=["status"])
        for status in Status:
            jobs.add_metric([str(status)], by_status.get(status, 0))
        yield jobs
        claims = CounterMetricFamily(
            "tuneyard_claims", "Claims by how the worker found the job.", labels=["source"]
        )  # fmt: skip
        for source in ("message", "poll"):
            claims.add_metric([source], by_source.get(source, 0))
        yield claims
