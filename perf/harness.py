"""What all experiments share: one exported repository, how thorough to be, servers of their own, load and samples."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from kvcast.protocol.config import ModelConfig
from kvcast.protocol.manifest import Manifest, read_manifest
from kvcast.protocol.tensors import USER_ENCODER
from kvcast.server import ServeConfig, TritonServer
from kvcast.server.repository import find_free_ports
from kvcast.serving.options import CACHE_BUDGET
from perf.baselines.race import Field

SAMPLES = 360
# What an experiment adds to the result file: JSON.
Record = dict[str, object]
Item = TypeVar("Item")
Choice = TypeVar("Choice")
Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Plan:
    """How thorough a run is.

    traditional_limit: seconds that a request of full recomputation may take to be measured. counts: candidates, if
    chosen. endurance, soak: seconds. visits, seed, trace: of the visitors in affinity.
    """

    rounds: int
    requests: int
    traditional_limit: float
    quick: bool
    counts: Sequence[int]
    endurance: float
    soak: float
    visits: int
    seed: int
    trace: Path | None


@dataclass(frozen=True)
class Harness:
    """Starts servers on one exported repository, with caches of any size, by the plan; `say` receives progress."""

    settings: ServeConfig
    config: ModelConfig
    plan: Plan
    field: Field
    say: Callable[[str], None]

    @property
    def manifest(self) -> Manifest:
        """What was exported."""
        return read_manifest(self.settings.repository / USER_ENCODER.name / "1")

    def choose(self, full: Choice, quick: Choice) -> Choice:
        """Return what the plan asks for."""
        return quick if self.plan.quick else full

    def keep_served(self, counts: Sequence[int]) -> list[int]:
        """Return the counts of candidates that are within the configuration's limit."""
        return [count for count in counts if count <= self.config.limits.candidates]

    def count_megabytes(self, users: float) -> float:
        """Return the cache budget that holds so many users of the expected history."""
        length, layout = self.config.workload.history, self.manifest.user_kv
        return users * 1.01 * layout.bytes_of(length) / 1e6  # 1%: the history itself, bookkeeping, rounding

    @contextlib.contextmanager
    def serve(
        self, models: Sequence[str], *, megabytes: float | None = None, is_guarded: bool = False
    ) -> Iterator[TritonServer]:
        """Serve on free ports as long as the block runs.

        Args:
            models: what is served.
            megabytes: of each user KV cache, 0 for none; None: as the repository says.
            is_guarded: whether requests pass the gateway.
        """
        http, grpc, metrics = find_free_ports(3)
        own = replace(self.settings, models=list(models), http_port=http, grpc_port=grpc, metrics_port=metrics)
        if megabytes is not None:
            own = replace(own, parameters={CACHE_BUDGET: f"{megabytes:g}"})
        with TritonServer(replace(own, is_guarded=is_guarded)) as server:
            yield server

    def sample(self, seconds: float, sample: Callable[[float], Sample]) -> list[Sample]:
        """Return samples taken over so many seconds; `sample` gets the seconds that have passed."""
        samples, started = [], time.monotonic()
        while (passed := time.monotonic() - started) < seconds:
            samples.append(sample(passed))
            if len(samples) % (SAMPLES // 10) == 0:
                self.say(f"    {passed / 60:.0f} of {seconds / 60:.0f} minutes")
            time.sleep(max(0.5, seconds / SAMPLES))
        return samples


@contextlib.contextmanager
def keep_sending(items: Iterator[Item], send: Callable[[Item], object], callers: int) -> Iterator[None]:
    """Send items from several threads, each item once, as long as the block runs."""
    stop, lock = threading.Event(), threading.Lock()

    def work() -> None:
        while not stop.is_set():
            with lock:
                item = next(items)
            send(item)

    with ThreadPoolExecutor(callers) as pool:
        working = [pool.submit(work) for _ in range(callers)]
        try:
            yield
        finally:
            stop.set()
        for each in working:
            each.result()
