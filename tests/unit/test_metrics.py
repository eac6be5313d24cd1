"""What is told to Prometheus: each thing once, when it has happened, with a stand-in for Triton that records it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from kvcast.protocol.errors import (
    DeadlineExceededError,
    ErrorKind,
    InvalidRequestError,
    ServerFaultError,
    TryAgainError,
)
from kvcast.serving.metrics import BUCKETS, CACHE_COUNTERS, CACHE_GAUGES, ERRORS, SECONDS, WAITING, Metrics, Stopwatch
from kvcast.serving.user_kv_cache import ENTRY_OVERHEAD_BYTES, Arrays, UserKVCache

LABELS = {"model": "user_encoder", "version": "1", "instance": "user_encoder_0"}
HISTORY_BYTES = 4 * 2 * 8
ENTRY_BYTES = ENTRY_OVERHEAD_BYTES + HISTORY_BYTES + 64


@dataclass
class FakeMetric:
    """One time series."""

    kind: str
    buckets: list[float] | None = None
    value: float = 0.0
    observed: list[float] = field(default_factory=list)
    writes: int = 0

    def increment(self, by: float) -> None:
        # As Triton: a counter that is taken back is an error.
        assert self.kind == "COUNTER"
        assert by >= 0
        self.value += by
        self.writes += 1

    def set(self, value: float) -> None:
        assert self.kind == "GAUGE"
        self.value = value
        self.writes += 1

    def observe(self, value: float) -> None:
        assert self.kind == "HISTOGRAM"
        self.observed.append(value)
        self.writes += 1


class FakeTriton:
    """The part of `pb_utils` that makes metrics. The registry is what a scrape would show."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str], FakeMetric] = {}
        self.labels: list[dict[str, str]] = []
        self.families: dict[str, str] = {}
        triton = self

        class MetricFamily:
            """As Triton's: a name may be registered once."""

            COUNTER: ClassVar[str] = "COUNTER"
            GAUGE: ClassVar[str] = "GAUGE"
            HISTOGRAM: ClassVar[str] = "HISTOGRAM"

            def __init__(self, name: str, description: str, kind: str) -> None:
                assert name not in triton.families
                assert description
                triton.families[name] = self.kind = kind
                self.name = name

            def Metric(self, labels: dict[str, str], **options: Any) -> FakeMetric:  # noqa: N802 Triton's name
                key = (self.name, labels.get("code", ""))
                assert key not in triton.series
                triton.labels.append(labels)
                triton.series[key] = FakeMetric(self.kind, **options)
                return triton.series[key]

        self.MetricFamily = MetricFamily

    def read(self, description: tuple[str, str, str], code: str = "") -> float:
        return self.series[description[0], code].value

    def count_writes(self) -> Counter[tuple[str, str]]:
        return Counter({key: each.writes for key, each in self.series.items()})


class Setting:
    """A cache with room for three users, its metrics, and where they are written to."""

    def __init__(self, budget_bytes: int = 3 * ENTRY_BYTES, time_to_live: float = 0) -> None:
        self.now = 0.0
        self.cache = UserKVCache("kv_id", lambda _: [(1, 16)], budget_bytes, time_to_live, clock=lambda: self.now)
        self.triton = FakeTriton()
        self.metrics = Metrics(self.triton, LABELS)
        self.stopwatch = Stopwatch()

    def ask(self, *users: int, fails: bool = False) -> None:
        def encode(places: list[int], spaces: list[Arrays | None]) -> list[Arrays]:
            if fails:
                raise ValueError("no")
            return [space or (np.zeros((1, 16), np.float32),) for space in spaces]

        try:
            self.cache.fetch([np.full((4, 2), user) for user in users], encode)
        except ValueError:
            assert fails

    def publish(self, *errors: Any, waiting: int = 0) -> Counter[tuple[str, str]]:
        """Publish; return how often each series was written to."""
        before = self.triton.count_writes()
        self.metrics.publish(self.stopwatch, self.cache, waiting, errors)
        return self.triton.count_writes() - before

    def check(self) -> None:
        """Check that what is shown is what the cache counts."""
        counts = self.cache.counts
        assert {name: self.triton.read(CACHE_COUNTERS[name]) for name in CACHE_COUNTERS} == {
            name: getattr(counts, name) for name in CACHE_COUNTERS
        }
        assert {name: self.triton.read(CACHE_GAUGES[name]) for name in CACHE_GAUGES} == {
            "bytes_held": self.cache.bytes_held,
            "budget_bytes": self.cache.budget_bytes,
            "entries": self.cache.entries,
        }


def test_everything_of_the_cache_is_there_as_zero_before_anything_has_happened():
    setting = Setting()
    setting.metrics.start(setting.cache)
    setting.check()
    assert setting.triton.read(WAITING) == 0
    assert set(setting.triton.families) == {
        each[0] for each in (WAITING, ERRORS, *CACHE_COUNTERS.values(), *CACHE_GAUGES.values())
    }


def test_a_model_without_a_cache_shows_nothing_of_one():
    triton = FakeTriton()
    metrics = Metrics(triton, LABELS)
    metrics.start(None)
    metrics.publish(Stopwatch(wait=[0.5]), None, waiting=2)
    assert set(triton.families) == {WAITING[0], ERRORS[0], SECONDS["wait"][0]}
    assert triton.read(WAITING) == 2


def test_a_cache_that_is_off_shows_a_budget_of_zero():
    setting = Setting(budget_bytes=0)
    setting.metrics.start(setting.cache)
    setting.ask(1, 2)
    setting.publish()
    setting.check()
    assert setting.triton.read(CACHE_GAUGES["budget_bytes"]) == 0


def test_counts_are_what_the_cache_counts_after_each_publishing():
    setting = Setting(time_to_live=10)
    setting.metrics.start(setting.cache)
    for users in ([1], [1], [2, 3, 4], [4, 2], [5], [6, 7, 8, 9, 10]):
        setting.ask(*users)
        setting.publish()
        setting.check()
    setting.ask(11, fails=True)
    setting.now = 100
    setting.ask(12)
    setting.publish()
    setting.check()
    counts = setting.cache.counts
    assert all((counts.hits, counts.misses, counts.refused, counts.failed, counts.evictions, counts.expirations))


def test_only_what_was_added_since_the_last_time_is_written():
    setting = Setting()
    setting.metrics.start(setting.cache)
    setting.ask(1)
    setting.publish()
    setting.ask(1)
    setting.ask(1)
    assert setting.publish() == {(CACHE_COUNTERS["hits"][0], ""): 1}, "two hits, one write"
    assert setting.triton.read(CACHE_COUNTERS["hits"]) == 2


def test_nothing_is_written_when_nothing_has_happened():
    setting = Setting()
    setting.metrics.start(setting.cache)
    setting.ask(1)
    setting.publish()
    assert not setting.publish()
    assert not setting.publish()


def test_gauges_are_set_when_they_change_and_only_then():
    setting = Setting()
    setting.metrics.start(setting.cache)
    setting.publish()
    written = []
    for waiting in (3, 3, 0, 0, 3):
        written.append(setting.publish(waiting=waiting)[WAITING[0], ""])
        assert setting.triton.read(WAITING) == waiting
    assert written == [1, 0, 1, 0, 1]
    setting.ask(1)
    added = setting.publish(waiting=3)
    assert {name: added[CACHE_GAUGES[name][0], ""] for name in CACHE_GAUGES} == {
        "bytes_held": 1,
        "budget_bytes": 0,
        "entries": 1,
    }


def test_one_user_for_another_of_the_same_size_changes_no_gauge():
    setting = Setting(ENTRY_BYTES)
    setting.metrics.start(setting.cache)
    setting.ask(1)
    setting.publish()
    setting.ask(2)
    assert set(setting.publish()) == {(CACHE_COUNTERS[name][0], "") for name in ("misses", "evictions")}
    setting.check()


def test_errors_are_counted_by_their_code():
    setting = Setting()
    setting.publish(InvalidRequestError("a"), TryAgainError("b"), InvalidRequestError("c"))
    setting.publish(ServerFaultError("d"), DeadlineExceededError("e"))
    setting.publish()
    codes = {code: setting.triton.read(ERRORS, code) for name, code in setting.triton.series if name == ERRORS[0]}
    assert codes == {
        "INVALID_ARGUMENT": 2, "UNAVAILABLE": 1, "INTERNAL": 1, "DEADLINE_EXCEEDED": 1,
    }  # fmt: skip


def test_every_observation_is_written_once_and_in_its_own_stage():
    setting = Setting()
    setting.stopwatch.wait += [0.1, 0.2]
    setting.stopwatch.fuse += [0.3]
    setting.publish()
    assert setting.stopwatch == Stopwatch()
    setting.stopwatch.wait += [0.2]
    setting.publish()
    setting.publish()
    shown = {stage: setting.triton.series.get((SECONDS[stage][0], "")) for stage in SECONDS}
    assert shown["wait"] is not None
    assert shown["fuse"] is not None
    assert shown["wait"].observed == [0.1, 0.2, 0.2]
    assert shown["fuse"].observed == [0.3]
    assert shown["encode"] is None, "a stage that never ran is not shown"


def test_series_carry_the_labels_of_their_instance_and_histograms_their_buckets():
    setting = Setting()
    setting.metrics.start(setting.cache)
    setting.stopwatch.encode.append(1.0)
    setting.publish(InvalidRequestError("a"))
    codes = [LABELS | {"code": kind.grpc_status} for kind in ErrorKind]
    assert all(labels in (LABELS, *codes) for labels in setting.triton.labels)
    assert all(labels in setting.triton.labels for labels in codes)
    for metric in setting.triton.series.values():
        assert metric.buckets == (BUCKETS if metric.kind == "HISTOGRAM" else None)


def test_what_was_counted_in_a_warm_up_that_is_forgotten_is_never_shown():
    setting = Setting()
    setting.ask(1, 1, 2)
    setting.cache.forget()
    setting.metrics.start(setting.cache)
    setting.check()
    setting.ask(3)
    setting.publish()
    setting.check()
    assert setting.triton.read(CACHE_COUNTERS["misses"]) == 1


@pytest.mark.parametrize("seed", range(20))
def test_sums_agree_however_often_they_are_published(seed):
    generator = np.random.default_rng(seed)
    setting = Setting(time_to_live=5)
    setting.metrics.start(setting.cache)
    errors = 0
    for _ in range(60):
        setting.now += float(generator.integers(0, 3))
        setting.ask(*generator.integers(0, 8, int(generator.integers(0, 4))), fails=generator.random() < 0.2)
        setting.stopwatch.encode.append(float(generator.random()))
        if generator.random() < 0.4:
            errors += 1
            setting.publish(TryAgainError("busy"), waiting=int(generator.integers(0, 3)))
            setting.check()
    setting.publish()
    setting.check()
    assert setting.triton.read(ERRORS, "UNAVAILABLE") == errors
    assert len(setting.triton.series[SECONDS["encode"][0], ""].observed) == 60
