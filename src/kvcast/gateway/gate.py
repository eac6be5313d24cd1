"""Admission control of one model, for both protocols: a request is sent to Triton, waits, or is refused.

The only bounded queue is here, before the first model: first come first served, with refusals as soon as a deadline
cannot be met. Behind it Triton holds few requests, so that user KV between the steps of an ensemble cannot pile up.
While a model's process is dead, requests wait, and those that were with it, which Triton 2.51 never answers
(github.com/triton-inference-server/server/issues/8604), are sent again: a ranking changes nothing, so sending one twice
is safe. A request is something to be awaited here, of no particular protocol.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kvcast.protocol.errors import BusyError, DeadlineExceededError, ExpiredError, TryAgainError

Reply = TypeVar("Reply")

# How often one request is sent, if it comes back unanswered.
SENT_AT_MOST = 3
# How long a request waits for a dead model process to be replaced if its caller names no deadline.
REPLACED_WITHIN_SECONDS = 30.0
# Weight of the newest gap between two answers in the estimate of how long an answer takes.
NEWEST = 0.1
# What does not fit the estimate with this much to spare is refused: a late answer is wasted work.
MARGIN = 1.25
# A model process is said to be dead by Triton before the launcher says so by at most this.
NOTICED_WITHIN_SECONDS = 2.0
# What Triton has not answered so long after its caller has gone, it has lost.
LOST_AFTER_SECONDS = 60.0
GIVEN_UP = "the server has stopped before this request was answered: send it again"


class UnansweredError(TryAgainError):
    """Triton has given a request back without an answer: it may be sent again at once."""


class ModelDiedError(UnansweredError):
    """The process of a model died while it had the request: another has to be there first."""


@dataclass(frozen=True)
class GateLimits:
    """How many requests Triton holds at once, and how many more may wait for it."""

    in_flight: int = 16
    waiting: int = 256


@dataclass
class GateCounts:
    """What happened, since the start."""

    answered: int = 0
    refused: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("full", "deadline", "stopping", "broken"), 0)
    )
    sent_again: int = 0


@dataclass
class _Place:
    """One request that was let through; `sending`: what Triton has of it."""

    sending: asyncio.Future[Any] | None = None

    def has_answered_with(self, error: Exception) -> bool:
        """Whether an error is Triton's answer, and no refusal."""
        sending = self.sending
        return sending is not None and sending.done() and not sending.cancelled() and sending.exception() is error


class Gate:
    """Lets requests through. For one event loop."""

    def __init__(
        self,
        limits: GateLimits,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[float], object] | None = None,
    ) -> None:
        """Open the gate.

        Args:
            limits: how many are let through at once, and how many may wait.
            clock: seconds from any start.
            observe: is told how long each answer took from the request's arrival.
        """
        self.limits, self.counts = limits, GateCounts()
        self.in_flight = 0
        self.is_draining = False
        self._clock, self._observe = clock, observe
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._seconds_an_answer = 0.0
        self._busy_since = 0.0
        self._broken: frozenset[str] = frozenset()
        self._incidents = 0
        self._changed: asyncio.Future[None] | None = None
        self._abandoned: set[asyncio.Future[Any]] = set()
        self._has_given_up = False

    @property
    def waiting(self) -> int:
        """How many wait to be let through."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether no request is in flight or waits."""
        return not self.in_flight and not self._waiting

    def set_broken(self, models: Collection[str], incidents: int) -> None:
        """Say which models have a dead process now, and how many have died so far."""
        if (frozenset(models), incidents) != (self._broken, self._incidents):
            self._broken, self._incidents = frozenset(models), incidents
            self._wake()
            for sending in list(self._abandoned):  # a dead process never answers
                self._leave_last(sending)

    def give_up(self) -> None:
        """Refuse the requests that wait, and those that Triton still has."""
        self.is_draining = self._has_given_up = True
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(self.count_refusal("stopping", TryAgainError(GIVEN_UP)))
                turn.exception()  # retrieved, or asyncio would log it
        self._waiting.clear()
        self._wake()

    def _wake(self) -> None:
        """Wake all that wait for a change."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    def _await_change(self) -> asyncio.Future[None]:
        """Return what is done at the next change; many wait for it, so it must not be cancelled."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        return self._changed

    async def ask(self, model: str, seconds: float, send: Callable[[float], Awaitable[Reply]]) -> Reply:
        """Send a request as soon as there is room, and return its answer.

        Args:
            model: which model it is for.
            seconds: how long its caller waits; infinite if that is not known.
            send: sends it; takes the seconds that are left, returns the answer or raises. It is cancelled when nobody
                wants the answer any more, and ends when Triton is done with the request: its place is taken until then.

        Raises:
            DeadlineExceededError: it could not be answered in time, and was not computed.
            TryAgainError: too many wait, the server is stopping, or model processes died under it.
        """
        begun = self._clock()
        deadline = begun + seconds
        await self._enter(deadline)
        place = _Place()
        try:
            reply = await self._send(model, deadline, send, place)
        except Exception as error:
            if place.has_answered_with(error):
                self._count_answer(begun)
            raise
        finally:
            self._leave_place(place)
        self._count_answer(begun)
        return reply

    def _count_answer(self, begun: float) -> None:
        self.counts.answered += 1
        if self._observe is not None:
            self._observe(self._clock() - begun)

    async def _enter(self, deadline: float) -> None:
        """Wait for a place; a request that returns from here has been counted in."""
        if self.is_draining:
            raise self.count_refusal(
                "stopping", TryAgainError("the server is stopping: try again, elsewhere if you can")
            )
        if self.in_flight < self.limits.in_flight and not self._waiting:
            self._start()
            return
        if len(self._waiting) >= self.limits.waiting:
            raise self.count_refusal("full", BusyError(f"busy: {len(self._waiting)} requests are waiting already"))
        self._check_time(deadline, self.in_flight + len(self._waiting))
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(None if deadline == float("inf") else deadline - self._clock()):
                await turn  # the request that leaves has counted this one in
            self._check_time(deadline, self.in_flight - 1)
        except TimeoutError:
            self._leave_queue(turn)
            raise self._miss() from None
        except BaseException:
            self._leave_queue(turn)
            raise

    def _leave_queue(self, turn: asyncio.Future[None]) -> None:
        """Take one out of the queue, or out again if its turn has come."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            self._leave(answered=False)

    def _start(self) -> None:
        if not self.in_flight:
            self._busy_since = self._clock()
        self.in_flight += 1

    def _leave(self, *, answered: bool = True) -> None:
        """Count one out, and the next in."""
        if answered:
            now = self._clock()
            self._seconds_an_answer += NEWEST * (now - self._busy_since - self._seconds_an_answer)
            self._busy_since = now
        self.in_flight -= 1
        while self._waiting and self.in_flight < self.limits.in_flight:
            turn = self._waiting.popleft()
            if not turn.done():  # else its caller has gone, and is about to notice
                self._start()
                turn.set_result(None)

    def _leave_place(self, place: "_Place") -> None:
        """Count one out, or see to it that it is when Triton is done with it."""
        sending = place.sending
        if sending is None or sending.done():
            self._leave()
            return
        sending.cancel()
        self._abandoned.add(sending)
        sending.add_done_callback(self._leave_last)

    def _leave_last(self, sending: asyncio.Future[Any]) -> None:
        """Count out what its caller has left before, once."""
        if sending in self._abandoned:
            self._abandoned.remove(sending)
            self._leave()

    def _check_time(self, deadline: float, ahead: int) -> None:
        """Refuse what cannot be answered in time after the others; one alone goes in, since the estimate may be old."""
        expected = MARGIN * self._seconds_an_answer * (ahead + 1)
        left = deadline - self._clock()
        if left <= 0:
            raise self._miss()
        if ahead and expected > left:
            message = f"busy: expected to take {expected:.2f} s, and the caller's deadline is in {max(left, 0):.2f} s"
            raise self.count_refusal("deadline", BusyError(message))

    def _miss(self) -> TryAgainError:
        message = "not computed: the caller's deadline passed while the request waited"
        return self.count_refusal("deadline", ExpiredError(message))

    def count_refusal(self, why: str, error: TryAgainError) -> TryAgainError:
        """Count a refusal, and return the error that says it."""
        self.counts.refused[why] += 1
        return error

    async def _send(
        self, model: str, deadline: float, send: Callable[[float], Awaitable[Reply]], place: "_Place"
    ) -> Reply:
        """Send a request, and again if it comes back unanswered, as from a process that dies; note it in `place`."""
        for attempt in range(SENT_AT_MOST):
            await self._wait_until_whole(model, deadline)
            self._check_goes_on()
            left = deadline - self._clock()
            if left <= 0:
                raise self._miss()
            incidents = self._incidents
            self.counts.sent_again += attempt > 0
            place.sending = sending = asyncio.ensure_future(send(left))
            sending.add_done_callback(_look_at)
            try:
                return await self._watch(sending, incidents, deadline)
            except UnansweredError as error:
                sending.cancel()
                place.sending = None  # what had it is dead, or has given it back
                if isinstance(error, ModelDiedError) and attempt + 1 < SENT_AT_MOST:
                    await self._wait_until_noticed(incidents)
        raise self.count_refusal("broken", TryAgainError(f"{model} left a request unanswered {SENT_AT_MOST} times"))

    async def _watch(self, sending: asyncio.Future[Reply], incidents: int, deadline: float) -> Reply:
        """Return the answer.

        Raises:
            DeadlineExceededError: it is not there in time.
            ModelDiedError: the model's process has died meanwhile; Triton would never answer.
            TryAgainError: the server stops before the answer is there.
        """
        while not sending.done():
            # Nothing is awaited between the look at what has changed and this, so that no change is missed.
            left = None if deadline == float("inf") else max(0.0, deadline - self._clock())
            await asyncio.wait((sending, self._await_change()), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not sending.done():
                self._check_goes_on()
                if self._clock() >= deadline:
                    raise self.count_refusal(
                        "deadline", DeadlineExceededError("not answered within the caller's deadline")
                    )
                # It need not be broken any more: a short while can be missed.
                if self._incidents != incidents:
                    raise ModelDiedError("its process died")
        return sending.result()

    def _check_goes_on(self) -> None:
        if self._has_given_up:
            raise self.count_refusal("stopping", TryAgainError(GIVEN_UP))

    async def _wait_until_whole(self, model: str, deadline: float) -> None:
        """Wait while the model is broken."""
        until = min(deadline, self._clock() + REPLACED_WITHIN_SECONDS)
        while model in self._broken and not self._has_given_up:
            left = until - self._clock()
            if left <= 0:
                kind = DeadlineExceededError if until == deadline else TryAgainError
                raise self.count_refusal("broken", kind(f"{model} is being replaced: its process died"))
            await asyncio.wait((self._await_change(),), timeout=left)

    async def _wait_until_noticed(self, incidents: int) -> None:
        """Triton has said that a process is dead: wait until the launcher, which replaces it, has said so too."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOTICED_WITHIN_SECONDS):
                while self._incidents == incidents and not self._has_given_up:
                    await asyncio.wait((self._await_change(),))


def _look_at(sending: asyncio.Future[Any]) -> None:
    """Retrieve the outcome, so that asyncio does not log it where nothing waits for it any more."""
    if not sending.cancelled():
        sending.exception()
