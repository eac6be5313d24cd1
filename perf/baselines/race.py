"""Runs peers alternately on the same requests, a process each, and compares their times and scores."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcast.protocol.errors import ErrorKind, KvcastError
from kvcast.protocol.tensors import SCORE_TOLERANCE

MEMORY_LIMIT_BYTES = 16 << 30
# The first runs of a size fault their memory in, which takes longer than the work.
WARM_UPS = 2
# glibc gives memory back after each run and faults it in again at the next; at these sizes that costs torch more than
# its own work. All peers run with the same settings.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 33)}


class RaceError(KvcastError):
    """A peer did not start, died, or gave other scores."""

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL


@dataclass(frozen=True)
class Field:
    """The parameters that all peers of a race share."""

    config: str
    repository: Path
    threads: int
    seed: int


class Worker:
    """A peer's process."""

    def __init__(self, name: str, field: Field) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "perf.baselines.worker", name, json.dumps(vars(field), default=str)],
            env={**os.environ, **KEEP_MEMORY},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            self._read()
        except RaceError:
            self.close()
            raise

    def ask(self, history: int, candidates: int, seed: int) -> dict[str, Any]:
        """Run one request; the same seed and order of calls gives every peer the same requests."""
        if self._process.stdin is None:
            raise RaceError(f"{self.name}: its process has no standard input")
        self._process.stdin.write(json.dumps({"history": history, "candidates": candidates, "seed": seed}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate(timeout=30)

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RaceError(f"{self.name}: its process ended (status {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def start_workers(names: Sequence[str], field: Field) -> Iterator[list[Worker]]:
    """Start a worker for each name, and end them all."""
    workers: list[Worker] = []
    try:
        for name in names:
            workers.append(Worker(name, field))  # noqa: PERF401 those that started must be closed
        yield workers
    finally:
        for worker in workers:
            worker.close()


def race(workers: Sequence[Worker], history: int, candidates: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Alternate `rounds` times after `WARM_UPS` more; return medians per peer, and how far scores lie from the first's.

    Raises:
        RaceError: a peer's scores differ by more than fp32 rounding from the first one's.
    """
    seed = 1000 * history + candidates
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for _ in range(WARM_UPS + rounds):
        for worker in workers:
            if not (answers[worker.name] and "error" in answers[worker.name][-1]):
                answers[worker.name].append(worker.ask(history, candidates, seed))
    first = answers[workers[0].name]
    return {worker.name: _summarise(worker.name, answers[worker.name], first) for worker in workers}


def _summarise(name: str, answers: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    if "error" in answers[-1]:
        return {"error": answers[-1]["error"]}
    difference = max(
        abs(own - other)
        for answer, reference in zip(answers, first, strict=True)
        for own, other in zip(answer["scores"], reference["scores"], strict=True)
    )
    if not difference <= SCORE_TOLERANCE:
        raise RaceError(
            f"{name}: expected the scores of the others to {SCORE_TOLERANCE}, got a difference of {difference:.3g} "
            "(peers have the weights that the configuration comes with, else those of seed 0: has the export others?)"
        )
    counted = answers[WARM_UPS:]
    return {
        "encode": statistics.median(answer["encode"] for answer in counted),
        "fuse": statistics.median(answer["fuse"] for answer in counted),
        "total": statistics.median(answer["encode"] + answer["fuse"] for answer in counted),
        "added_bytes": max(answer["added_bytes"] for answer in counted),
        "score_difference": difference,
        "rounds": len(counted),
    }
