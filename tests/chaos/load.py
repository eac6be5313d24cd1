"""Load with known right answers: every reply is compared, every request is accounted for."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from kvcast.client import NO_RETRIES, RankerClient, RetryPolicy
from kvcast.protocol.config import load_config
from kvcast.protocol.errors import KvcastError
from tests.support import TOLERANCE, draw_request


@dataclass(frozen=True)
class Outcome:
    """One request: when it was sent and answered (monotonic seconds), and what came: `right`, `wrong`, or an error."""

    sent: float
    answered: float
    what: str
    message: str = ""

    @property
    def seconds(self) -> float:
        return self.answered - self.sent


@dataclass
class Load:
    """Threads that rank known requests, one after the other, until the context is left."""

    address: str
    expected: list[tuple[Any, Any, list[Any]]]
    """History, candidates, and the score arrays of which one must be returned."""
    model: str = "ranker"
    protocol: Any = "grpc"
    threads: int = 8
    deadline: float = 20.0
    retry: RetryPolicy = NO_RETRIES
    pause: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)

    def __enter__(self) -> Self:
        """Start."""
        self._stopping = threading.Event()
        self._client = RankerClient(
            self.address, protocol=self.protocol, model=self.model, deadline=self.deadline, retry=self.retry
        )
        self._client.get_manifest()
        self._threads = [threading.Thread(target=self._work, args=(index,)) for index in range(self.threads)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop, and wait for the last answers."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._client.close()

    def count(self) -> Counter[str]:
        return Counter(each.what for each in self.outcomes)

    def wait_for(self, answers: int, seconds: float = 30.0) -> None:
        """Wait until so many more right answers are there."""
        wanted, deadline = self.count()["right"] + answers, time.monotonic() + seconds
        while self.count()["right"] < wanted:
            assert time.monotonic() < deadline, self.count()
            time.sleep(0.05)

    def _work(self, index: int) -> None:
        generator = np.random.default_rng(index)
        while not self._stopping.is_set():
            history, candidates, answers = self.expected[generator.integers(len(self.expected))]
            sent = time.monotonic()
            try:
                scores = self._client.rank(history, candidates).scores
                is_right = any(np.abs(scores - each).max() <= TOLERANCE for each in answers)
                what, message = ("right", "") if is_right else ("wrong", repr(scores))
            except KvcastError as error:
                what, message = type(error).__name__, str(error)
            self.outcomes.append(Outcome(sent, time.monotonic(), what, message))
            if self.pause:
                time.sleep(self.pause)


def draw_requests(count: int = 24, length: int = 40, seed: int = 0) -> list[tuple[Any, Any]]:
    """Return requests of the `tiny` configuration, histories and candidates of several sizes."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, length, (count, 2))
    config = load_config("tiny")
    return [draw_request(config, int(events), int(n) % 20 + 1, seed + index) for index, (events, n) in enumerate(sizes)]


def record_answers(address: str, requests: list[tuple[Any, Any]], model: str = "ranker") -> list[Any]:
    """Return the scores that a healthy server gives."""
    with RankerClient(address, model=model) as client:
        return [client.rank(*request).scores for request in requests]


def expect(requests: list[tuple[Any, Any]], *answers: list[Any]) -> list[tuple[Any, Any, list[Any]]]:
    """Join requests with the answers that are right for them."""
    return [(*request, [each[index] for each in answers]) for index, request in enumerate(requests)]
