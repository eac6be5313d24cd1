"""When a call is sent again: pauses with jitter, a budget, the caller's deadline.

Sending again is safe because a ranking changes nothing on the server. Only `TryAgainError` is tried again; a wrong
request and a broken server stay what they are. What happens is said step by step (`Steps`) and nothing here waits or
knows how bytes travel, so that the sync and the asyncio client, and a test with a clock of its own, follow the very
same steps.

Pauses: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog (2015): "full jitter" spreads the callers
that an outage has brought into step. Budget: Twitter Finagle's `RetryBudget`: a share of the calls may be sent twice,
so that retries cannot multiply an overload.
"""

import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from kvcast.client.transport import Call, Tensors
from kvcast.protocol.errors import DeadlineExceededError, ExpiredError, NoServerError, TryAgainError

# How long a call asks at an address where nobody was ever reached: a wrong one should be told soon.
FIRST_SECONDS = 1.0

Clock = Callable[[], float]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Send:
    """A step: send this, and give back the outputs or throw in the error; `deadline` in seconds."""

    call: Call
    deadline: float


@dataclass(frozen=True)
class Pause:
    """A step: wait this many seconds, and give back nothing."""

    seconds: float


# A call of a client as what it asks of its driver; a pause is answered with no tensors.
Steps = Generator[Send | Pause, Tensors, Result]


@dataclass(frozen=True)
class RetryPolicy:
    """How often and how long to try again. Times in seconds.

    first_pause: the longest that the first pause can be; each next one may be twice as long, up to `longest_pause`.
        A pause is drawn evenly from zero up to there.
    seconds: how long after its start a call may still be sent again; its deadline ends it too. 0: never again.
    budget_share, budget_rate, budget_capacity: sending again costs one token; each exchange brings `budget_share`,
        each second `budget_rate`, and a client never has more than `budget_capacity`, with which it starts.
    """

    first_pause: float = 0.05
    longest_pause: float = 1.0
    seconds: float = float("inf")
    budget_share: float = 0.2
    budget_rate: float = 10.0
    budget_capacity: float = 100.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            ValueError: a number is negative or not a number.
        """
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"retry: expected {name} to be 0 or more, got {value}")

    def limit_pause(self, attempts: int) -> float:
        """Return the longest pause, in seconds, after so many attempts (1 or more)."""
        # The exponent is bounded: a call can be sent more often than a float can be doubled.
        return min(self.longest_pause, self.first_pause * 2.0 ** min(attempts - 1, 64))


NO_RETRIES = RetryPolicy(seconds=0)


class RetryBudget:
    """The tokens that all calls of one client share. Safe to use from several threads."""

    def __init__(self, policy: RetryPolicy, clock: Clock = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._lock = threading.Lock()
        self._tokens = policy.budget_capacity
        self._filled = clock()

    def deposit(self) -> None:
        """Count an exchange that is sent for the first time."""
        with self._lock:
            self._add(self._policy.budget_share)

    def withdraw(self) -> bool:
        """Pay for sending one exchange again; return whether that could be paid."""
        with self._lock:
            now = self._clock()
            self._add((now - self._filled) * self._policy.budget_rate)
            self._filled = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def _add(self, tokens: float) -> None:
        self._tokens = min(self._policy.budget_capacity, self._tokens + tokens)


class Deadline:
    """When a whole call has to be over, with its attempts and its pauses."""

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds until the end; zero or less after it."""
        return self.seconds - self.passed


@dataclass(frozen=True)
class Answer:
    """The outputs of an exchange, how many times it was sent, and the seconds from its first sending to the outputs."""

    outputs: Tensors
    attempts: int
    seconds: float


class Retries:
    """The policy of one client, with the budget that its calls share."""

    def __init__(
        self,
        policy: RetryPolicy,
        where: str,
        *,
        clock: Clock = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Prepare the budget.

        Args:
            policy: how often and how long.
            where: the server's address, for messages.
            clock: seconds, from any start, never backwards.
            draw: a random number from 0 to 1, for jitter.
        """
        self.policy = policy
        self._where = where
        self._clock = clock
        self._draw = draw
        self._budget = RetryBudget(policy, clock)

    def start(self, seconds: float) -> Deadline:
        """Return the deadline of a call that starts now and may take so many seconds."""
        return Deadline(seconds, self._clock)

    def exchange(self, call: Call, deadline: Deadline, *, once: bool = False) -> Steps[Answer]:
        """Send a call until it is answered, or must not be sent again.

        Args:
            call: what to send.
            deadline: of the whole; each attempt gets what is left of it.
            once: do not send it again, whatever the policy says.

        Raises:
            TryAgainError: the last attempt's, as soon as there is no time or no budget for another.
            DeadlineExceededError: the deadline has passed.
            InvalidRequestError, ServerFaultError: as they come; they are not tried again.
        """
        first_sent, attempts = deadline.passed, 0
        self._budget.deposit()
        while True:
            if deadline.left <= 0:
                raise self._miss(deadline, attempts)
            attempts += 1
            try:
                outputs = yield Send(call, deadline.left)
            except TryAgainError as error:
                pause = self._choose_pause(error, attempts, deadline, once=once)
                if pause is None:
                    raise self._conclude(error, attempts, deadline) from error.__cause__
            else:
                return Answer(outputs, attempts, deadline.passed - first_sent)
            yield Pause(pause)

    def _choose_pause(self, error: TryAgainError, attempts: int, deadline: Deadline, *, once: bool) -> float | None:
        """Return the seconds to wait before sending again, None if it must not be sent again."""
        if once or isinstance(error, DeadlineExceededError):
            return None
        pause = self._draw() * self.policy.limit_pause(attempts)
        patience = min(self.policy.seconds, FIRST_SECONDS) if isinstance(error, NoServerError) else self.policy.seconds
        left = min(deadline.left, patience - deadline.passed)
        return pause if pause < left and self._budget.withdraw() else None

    def _conclude(self, error: TryAgainError, attempts: int, deadline: Deadline) -> TryAgainError:
        """Return the error that ends a call: the last attempt's, which says how many there were."""
        if isinstance(error, DeadlineExceededError):
            return error if isinstance(error, ExpiredError) else self._miss(deadline, attempts)
        return error if attempts == 1 else type(error)(f"{error} ({attempts} attempts)")

    def _miss(self, deadline: Deadline, attempts: int) -> DeadlineExceededError:
        sent = f" ({attempts} attempts)" if attempts > 1 else ""
        return DeadlineExceededError(f"{self._where}: no answer within the deadline of {deadline.seconds:g} s{sent}")
