"""A share of the rankings is scored again by `ranker_full`, off the caller's path, and the difference measured.

This watches what no proof at export can see: the machine, the libraries and the caches that really serve.
"""

import asyncio
import contextlib
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2

from kvcast.protocol.tensors import (
    CANDIDATES,
    RANKER,
    RANKER_FULL,
    RANKER_RESIDENT,
    SCORE_TOLERANCE,
    SCORES,
)

SHADOWED = (RANKER.name, RANKER_RESIDENT.name)
# Full recomputation is slow: a request that finds this many before it is not shadowed.
WAITING_AT_MOST = 4
SCORED_WITHIN_SECONDS = 120.0
# Models are switched to another release one after the other, and that is said when all have been: a difference counts
# if the release is still the same after this.
SETTLED_SECONDS = 15.0


class Shadow:
    """Chooses requests, has them scored again one after the other, and remembers the largest difference."""

    def __init__(
        self,
        share: float,
        send: Callable[[bytes], Awaitable[bytes]],
        get_release: Callable[[], str],
        draw: Callable[[], float] = random.random,
        settled_seconds: float = SETTLED_SECONDS,
    ) -> None:
        """Start with nothing chosen.

        Args:
            share: the share of rankings that are scored again, 0 to 1.
            send: sends a ModelInferRequest's bytes to Triton and returns the reply's.
            get_release: returns what is served now; a comparison across a switch would mean nothing.
            draw: a random number, from 0 to below 1.
            settled_seconds: how long after a difference the release must not have been switched.
        """
        self.share = share
        self.scored = self.skipped = self.failed = 0
        self.largest_difference = 0.0
        self._send, self._get_release, self._draw = send, get_release, draw
        self._settled_seconds = settled_seconds
        self._tasks: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    def chooses(self, model: str) -> bool:
        """Whether this ranking of a model's is to be scored again; never, if too many are waiting for that."""
        if model not in SHADOWED or self._draw() >= self.share:
            return False
        if len(self._tasks) < WAITING_AT_MOST:
            return True
        self.skipped += 1
        return False

    def score_again(self, request: Any, release: str, reply: bytes) -> None:
        """Score a ranking that was chosen again, later.

        Args:
            request: a ModelInferRequest that has just been answered.
            release: what was served when it was sent.
            reply: the bytes of its ModelInferResponse.
        """
        if not asks_for_scores(request):
            return
        task = asyncio.create_task(self._score_again(request, release, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self) -> None:
        """Wait for those that were chosen."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _score_again(self, request: Any, release: str, reply: bytes) -> None:
        difference: float | None = None
        # Whatever goes wrong, callers have their answer; the count shows it.
        with contextlib.suppress(Exception):
            async with self._one_at_a_time:
                difference = await self._measure(request, reply)
            if difference > SCORE_TOLERANCE:
                await asyncio.sleep(self._settled_seconds)
        if release != self._get_release():
            self.skipped += 1
        elif difference is None:
            self.failed += 1
        else:
            self.scored += 1
            self.largest_difference = max(self.largest_difference, difference)

    async def _measure(self, request: Any, reply: bytes) -> float:
        """Return the largest difference of a score; infinity if one is no number.

        Raises:
            Exception: one of the two has no such scores, or does not answer.
        """
        fast = read_scores(reply)
        async with asyncio.timeout(SCORED_WITHIN_SECONDS):
            slow = read_scores(await self._send(make_full_request(request)))
        if slow.shape != fast.shape:
            raise ValueError(f"scores {slow.shape} and {fast.shape}")
        difference = float(np.abs(slow - fast).max())
        return difference if math.isfinite(difference) else math.inf


def asks_for_scores(request: Any) -> bool:
    """Whether a ranking has items to be scored, and wants their scores: a prefetch and a mere report do not."""
    has_items = any(tensor.name == CANDIDATES.name and 0 not in tensor.shape for tensor in request.inputs)
    wanted = [output for output in request.outputs if output.name == SCORES.name]
    return has_items and (not request.outputs or bool(wanted and "classification" not in wanted[0].parameters))


def make_full_request(request: Any) -> bytes:
    """Return the same request to `ranker_full`."""
    full = service_pb2.ModelInferRequest(model_name=RANKER_FULL.name)
    full.inputs.extend(request.inputs)
    full.raw_input_contents.extend(request.raw_input_contents)
    full.outputs.add(name=SCORES.name)
    return bytes(full.SerializeToString())


def read_scores(reply: bytes) -> npt.NDArray[np.float32]:
    """Return the scores FP32 `[B, N]` in a ModelInferResponse.

    Raises:
        ValueError: it has none.
    """
    message: Any = service_pb2.ModelInferResponse.FromString(reply)
    for output, data in zip(message.outputs, message.raw_output_contents, strict=False):
        if output.name == SCORES.name:
            return np.frombuffer(data, np.float32).reshape(list(output.shape))
    raise ValueError("no scores")
