"""What a model tells Prometheus through Triton's metrics endpoint: its cache, its stages, its errors by code.

Triton itself counts a returned error as a success, and has no metrics of the cache. The numbers gather in
plain Python and are published before the last reply leaves, so a reader of both sees them agree once all is answered.
Only the thread that serves may publish: the metrics of tritonserver 2.51 are not made for several threads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvcast.protocol.errors import ErrorKind, KvcastError
from kvcast.serving.user_kv_cache import Counts, UserKVCache

BUCKETS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
ERRORS = ("kvcast_errors_total", "COUNTER", "Requests answered with an error, by its code")
WAITING = ("kvcast_waiting_requests", "GAUGE", "Requests that wait for a run")
SECONDS = {
    "wait": ("kvcast_wait_seconds", "HISTOGRAM", "Waiting of requests before their run"),
    "encode": ("kvcast_encode_seconds", "HISTOGRAM", "Runs that encoded users (and, in ranker_resident, scored too)"),
    "fuse": ("kvcast_fuse_seconds", "HISTOGRAM", "Runs that scored candidates against user KV, and did only that"),
}
CACHE_GAUGES = {
    "bytes_held": ("kvcast_user_kv_bytes", "GAUGE", "Bytes held by the user KV cache"),
    "budget_bytes": ("kvcast_user_kv_budget_bytes", "GAUGE", "Bytes that the user KV cache may hold; 0: it is off"),
    "entries": ("kvcast_user_kv_entries", "GAUGE", "Users in the user KV cache"),
}
CACHE_COUNTERS = {
    "hits": ("kvcast_user_kv_hits_total", "COUNTER", "Users whose KV was there"),
    "misses": ("kvcast_user_kv_misses_total", "COUNTER", "Users that had to be encoded"),
    "waits": ("kvcast_user_kv_waits_total", "COUNTER", "Users that waited for another request to encode them"),
    "refused": ("kvcast_user_kv_refused_total", "COUNTER", "Users encoded and not cached: larger than the budget"),
    "failed": ("kvcast_user_kv_failed_total", "COUNTER", "Users whose encoding failed"),
    "evictions": ("kvcast_user_kv_evictions_total", "COUNTER", "Users that gave way to others"),
    "expirations": ("kvcast_user_kv_expirations_total", "COUNTER", "Users that reached their time to live"),
}
Description = tuple[str, str, str]


@dataclass
class Stopwatch:
    """Seconds since they were last published, by stage: waiting of requests, and runs."""

    wait: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    fuse: list[float] = field(default_factory=list)


class Metrics:
    """One instance's metrics. Families are made when first written to, and stay."""

    def __init__(self, pb_utils: Any, labels: dict[str, str]) -> None:
        """Take Triton's module, and the labels of this instance."""
        self._triton = pb_utils
        self._labels = labels
        self._families: dict[str, Any] = {}  # Triton drops a family's metrics when nobody holds the family
        self._metrics: dict[tuple[str, str], Any] = {}
        self._published = Counts()
        self._held: dict[Description, float] = {}

    def start(self, cache: UserKVCache | None) -> None:
        """Write what should be there before anything has happened."""
        self._set(WAITING, 0)
        # Prometheus sees no increase in what begins with 1.
        for kind in ErrorKind:
            self._find(ERRORS, code=kind.grpc_status).increment(0)
        if cache is not None:
            for description in CACHE_COUNTERS.values():
                self._find(description).increment(0)
            self._publish_cache(cache)

    def publish(
        self, stopwatch: Stopwatch, cache: UserKVCache | None, waiting: int, errors: Sequence[KvcastError] = ()
    ) -> None:
        """Write what has happened since the last time, and nothing that has not: a write takes 20 µs."""
        self._set(WAITING, waiting)
        for error in errors:
            self._find(ERRORS, code=error.kind.grpc_status).increment(1)
        for stage, description in SECONDS.items():
            seconds: list[float] = getattr(stopwatch, stage)
            while seconds:  # what fails is not written again, or it would be counted twice
                self._find(description).observe(seconds.pop(0))
        if cache is not None:
            self._publish_cache(cache)

    def _publish_cache(self, cache: UserKVCache) -> None:
        for name, description in CACHE_COUNTERS.items():
            value = getattr(cache.counts, name)
            added = value - getattr(self._published, name)
            if added:
                setattr(self._published, name, value)
                self._find(description).increment(added)
        for name, description in CACHE_GAUGES.items():
            self._set(description, getattr(cache, name))

    def _set(self, description: Description, value: float) -> None:
        if self._held.get(description) != value:
            self._find(description).set(value)
            self._held[description] = value

    def _find(self, description: Description, code: str = "") -> Any:
        """Return the metric, making family and metric if need be."""
        name, kind, text = description
        if (name, code) not in self._metrics:
            if name not in self._families:
                family = self._triton.MetricFamily
                self._families[name] = family(name=name, description=text, kind=getattr(family, kind))
            labels = self._labels | ({"code": code} if code else {})
            buckets = {"buckets": BUCKETS} if kind == "HISTOGRAM" else {}
            self._metrics[name, code] = self._families[name].Metric(labels=labels, **buckets)
        return self._metrics[name, code]
