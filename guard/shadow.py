"""A share of the rankings is scored again by `ranker_full`, off the caller's path, and the difference measured.

This watches what no proof at export can see: the machine, the libraries and the caches that really serve. It knows
KServe messages; it does not know when a release is switched, and is told so.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from kvcast.contract.tensors import CANDIDATES, HISTORY, RANKER, RANKER_FULL, RANKER_RESIDENT, SCORES

SHADOWED = (RANKER.name, RANKER_RESIDENT.name)
# The traditional scheme is slow: a request that finds this many before it is not shadowed.
WAITING_AT_MOST = 4
SCORED_WITHIN_SECONDS = 120.0


class Shadow:
    """Chooses requests, has them scored again one after the other, and remembers the largest difference."""

    def __init__(
        self,
        share: float,
        send: Callable[[bytes, float], Awaitable[bytes]],
        get_release: Callable[[], str],
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Take note of how many to choose.

        Args:
            share: the share of rankings that are scored again, 0 to 1.
            send: sends a ModelInferRequest's bytes to Triton within so many seconds.
            get_release: returns what is served now; a comparison across a switch would mean nothing.
            draw: a random number, 0 to 1.
        """
        self.share = share
        self.scored = self.skipped = self.failed = 0
        self.largest_difference = 0.0
        self._send, self._get_release, self._draw = send, get_release, draw
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    def consider(self, request: Any, reply: bytes | None = None) -> None:
        """Perhaps score a ranking again, later.

        Args:
            request: a ModelInferRequest that has just been answered.
            reply: the bytes of its ModelInferResponse; None to have the same model asked again for it.
        """
        if request.model_name not in SHADOWED or self._draw() >= self.share:
            return
        if len(self._tasks) >= WAITING_AT_MOST:
            self.skipped += 1
            return
        task = asyncio.create_task(self._score_again(request, reply, self._get_release()))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for those that were chosen."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _score_again(self, request: Any, reply: bytes | None, release: str) -> None:
        async with self._one_at_a_time:
            try:
                fast = reply or await self._send(request.SerializeToString(), SCORED_WITHIN_SECONDS)
                scores = read_scores(fast)
                if scores is None:  # a prefetch, or only the manifest
                    return
                slow = read_scores(await self._send(make_full_request(request), SCORED_WITHIN_SECONDS))
            except Exception:  # noqa: BLE001 whatever it is, callers have their answer; the count shows it
                self.failed += 1
                return
        if release != self._get_release():
            self.skipped += 1
        elif slow is None or slow.shape != scores.shape:
            self.failed += 1
        else:
            self.scored += 1
            difference = float(np.abs(slow - scores).max(initial=0.0))
            self.largest_difference = max(self.largest_difference, difference)


def make_full_request(request: Any) -> bytes:
    """Return the same request to `ranker_full`."""
    full = service_pb2.ModelInferRequest(model_name=RANKER_FULL.name)
    full.inputs.extend(each for each in request.inputs if each.name in (HISTORY.name, CANDIDATES.name))
    full.raw_input_contents.extend(request.raw_input_contents)
    full.outputs.add(name=SCORES.name)
    return bytes(full.SerializeToString())


def make_request(model: str, header: Mapping[str, Any], tensors: Iterable[bytes | memoryview]) -> Any:
    """Return the ModelInferRequest of a checked HTTP body: its header, and the bytes of each input."""
    message: Any = service_pb2.ModelInferRequest(model_name=model)
    for each in header["inputs"]:
        message.inputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
    message.raw_input_contents.extend(bytes(tensor) for tensor in tensors)
    message.outputs.add(name=SCORES.name)
    return message


def read_scores(reply: bytes) -> npt.NDArray[np.float32] | None:
    """Return the scores FP32 `[B, N]` in a ModelInferResponse, None if it has none."""
    message: Any = service_pb2.ModelInferResponse.FromString(reply)
    for index, output in enumerate(message.outputs):
        if output.name == SCORES.name and index < len(message.raw_output_contents):
            return np.frombuffer(message.raw_output_contents[index], np.float32).reshape(list(output.shape))
    return None
