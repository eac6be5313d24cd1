"""Runs the real perf_analyzer: finds it and its libraries, gives it generated requests, reads its CSV.

The program comes in the tritonclient 2.51 wheel and needs two libraries beside it, which `make setup-perf` brings. It
is never left to its own random inputs: they are drawn once and repeated, which flatters every cache.
"""

import csv
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcast.protocol.errors import ErrorKind, KvcastError
from perf import programs

LIBRARIES = Path("build/perf-libraries")
MICROSECONDS = 1e6


class PerfError(KvcastError):
    """A load test cannot run; the message is one sentence with the remedy."""

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL


@dataclass(frozen=True)
class Load:
    """The load to generate: a number of requests in flight, or arrivals a second (open loop, Poisson)."""

    requests: int
    concurrency: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Measurement:
    """The result: seconds, except throughput (answers a second)."""

    throughput: float
    mean: float
    p50: float
    p99: float


def run_analyzer(model: str, address: str, data: Path, load: Load, timeout: float = 900) -> Measurement:
    """Run perf_analyzer once over gRPC.

    Raises:
        PerfError: it is not installed, or does not come to an end with a result.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.csv"
        command = [str(find_analyzer()), "-m", model, "-i", "grpc", "-u", address, "--input-data", str(data)]
        # One window of a fixed number of requests: repetitions and medians are ours to choose, side by side.
        command += ["--request-count", str(load.requests), "-f", str(report), "--verbose-csv"]
        if load.rate is not None:
            command += ["--request-rate-range", str(load.rate), "--request-distribution", "poisson"]
        else:
            command += ["--concurrency-range", str(load.concurrency or 1)]
        try:
            done = subprocess.run(
                command, env=make_environment(), capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise PerfError(f"perf_analyzer was not done within {timeout:.0f} s: {' '.join(command)}") from error
        if done.returncode != 0 or not report.exists():
            raise PerfError(f"perf_analyzer failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-600:]}")
        return read_report(report.read_text())


def read_report(text: str) -> Measurement:
    """Read the one row of a perf_analyzer CSV."""
    rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines()))
    if len(rows) != 1:
        raise PerfError(f"perf_analyzer's report: expected one row, got {len(rows)}")
    row = rows[0]
    return Measurement(
        throughput=float(row["Inferences/Second"]),
        mean=float(row.get("Avg latency") or row["p50 latency"]) / MICROSECONDS,
        p50=float(row["p50 latency"]) / MICROSECONDS,
        p99=float(row["p99 latency"]) / MICROSECONDS,
    )


def find_analyzer() -> Path:
    """Return the perf_analyzer program.

    Raises:
        PerfError: it is not installed.
    """
    found = programs.find_program("perf_analyzer")
    if found is None:
        raise PerfError("perf_analyzer is not installed: run `make setup-perf`")
    return found


def make_environment() -> dict[str, str]:
    """Return an environment in which perf_analyzer finds its libraries."""
    fetched = [path.parent.resolve() for path in LIBRARIES.rglob("*.so*")]
    installed = Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cuda_runtime/lib")
    return programs.add_libraries(*fetched, *installed)
