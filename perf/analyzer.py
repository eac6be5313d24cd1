"""Drives the real perf_analyzer: finds it, gives it what it lacks, feeds it generated requests, reads its CSV.

The program comes in the tritonclient 2.51 wheel and needs two libraries beside it, which `make setup-perf` brings. It
is never left to its own random inputs: they are drawn once and repeated, which flatters every cache.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcast.protocol.request import RankRequest
from kvcast.protocol.tensors import CANDIDATES, HISTORY

LIBRARIES = Path("build/perf-libraries")
MICROSECONDS = 1e6


class PerfError(Exception):
    """A load test cannot run; the message is one sentence with the remedy."""


@dataclass(frozen=True)
class Load:
    """What perf_analyzer is asked for: a number of requests in flight, or arrivals a second (open loop, Poisson)."""

    requests: int
    concurrency: int | None = None
    rate: float | None = None


@dataclass(frozen=True)
class Measurement:
    """What it reports: seconds, except throughput (answers a second). `stages` are Triton's own averages."""

    throughput: float
    mean: float
    p50: float
    p90: float
    p99: float
    stages: dict[str, float]


def write_input_data(requests: Sequence[RankRequest], path: Path) -> None:
    """Write requests in perf_analyzer's format, shapes without the batch axis."""
    entries = [
        {
            name: {"content": ids.ravel().tolist(), "shape": list(ids.shape)}
            for name, ids in ((HISTORY.name, request.history), (CANDIDATES.name, request.candidates))
        }
        for request in requests
    ]
    path.write_text(json.dumps({"data": entries}))


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
    seconds = {
        name: float(value) / MICROSECONDS
        for name, value in row.items()
        if value and name not in ("Concurrency", "Request Rate", "Inferences/Second")
    }
    stages = ("Client Send", "Network+Server Send/Recv", "Server Queue", "Server Compute Input",
              "Server Compute Infer", "Server Compute Output", "Client Recv")  # fmt: skip
    return Measurement(
        throughput=float(row["Inferences/Second"]),
        mean=seconds.get("Avg latency", seconds["p50 latency"]),
        p50=seconds["p50 latency"],
        p90=seconds["p90 latency"],
        p99=seconds["p99 latency"],
        stages={name: seconds[name] for name in stages if name in seconds},
    )


def find_analyzer() -> Path:
    """Return the perf_analyzer program.

    Raises:
        PerfError: it is not installed.
    """
    beside = Path(sys.executable).parent / "perf_analyzer"
    found = beside if beside.exists() else shutil.which("perf_analyzer")
    if not found:
        raise PerfError("perf_analyzer is not installed: run `make setup-perf`")
    return Path(found)


def make_environment() -> dict[str, str]:
    """Return an environment in which perf_analyzer finds its libraries."""
    folders = [str(path.parent.resolve()) for path in LIBRARIES.rglob("*.so*")]
    folders += [str(path) for path in Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cuda_runtime/lib")]
    existing = os.environ.get("LD_LIBRARY_PATH")
    unique = list(dict.fromkeys([*folders, *([existing] if existing else [])]))
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(unique)}
