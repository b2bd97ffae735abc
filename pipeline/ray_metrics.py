"""What Prometheus is told of a run on a cluster, through Ray's own exporter; only in `cluster=ray`.

    ray_pagemill_tokens_total{host,run}          tokens put through the model
    ray_pagemill_shards_done_total{host,run}
    ray_pagemill_shards_retried_total{run}
    ray_pagemill_shard_seconds{host,run}         histogram: a shard's wall time in its worker
    ray_pagemill_workers_ready{}                 workers that can work now

The driver records them, from events (pipeline/events.py), so the exporter of the driver's node serves them
all. Exporters listen without authentication: no more than names of hosts and run keys is told there. Tables
are the record; these are for watching.
"""

from __future__ import annotations

from typing import Any

from pipeline import events

BOUNDARIES_S = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class ClusterMetrics:
    """A listener of events.

    Args:
        metrics: the module `ray.util.metrics`.
    """

    def __init__(self, metrics: Any) -> None:
        by_host = ("host", "run")
        self._tokens = metrics.Counter("pagemill_tokens_total", "Tokens put through the model", by_host)
        self._done = metrics.Counter("pagemill_shards_done_total", "Shards finished", by_host)
        self._retried = metrics.Counter("pagemill_shards_retried_total", "Shards whose worker died", ("run",))
        self._seconds = metrics.Histogram(
            "pagemill_shard_seconds", "Wall time of a shard, seconds", BOUNDARIES_S, by_host
        )
        self._ready = metrics.Gauge("pagemill_workers_ready", "Workers that can work")
        self._workers: set[str] = set()

    def __call__(self, event: events.Event) -> None:
        """Count an event."""
        known, name = event.fields, event.name
        worker, run = str(known.get("worker", "")), str(known.get("run", ""))
        if name == events.SHARD_DONE:
            tags = {"host": events.host_of(worker), "run": run}
            self._done.inc(1, tags)
            if tokens := known.get("tokens"):
                self._tokens.inc(tokens, tags)
            if (seconds := known.get("wall_s")) is not None:
                self._seconds.observe(seconds, tags)
        elif name == events.SHARD_RETRIED:
            self._retried.inc(1, {"run": run})
        elif name in (events.WORKER_READY, events.WORKER_LOST):
            (self._workers.add if name == events.WORKER_READY else self._workers.discard)(worker)
            self._ready.set(len(self._workers))
