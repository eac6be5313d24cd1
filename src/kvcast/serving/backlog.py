"""The queue of one model and its scheduling: quick requests first, none passed over for long, none too late.

Jobs, deadlines and errors only; no threads and no Triton.
"""

import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvcast.protocol.errors import ExpiredError, KvcastError, ServerFaultError
from kvcast.serving.model import Request, ServedModel, Tensors

Job = TypeVar("Job")
Ticket = TypeVar("Ticket")
Log = Callable[[str], None]
Reply = Tensors | KvcastError

# How many of the oldest are looked at when the next run is chosen.
WINDOW = 16
# How often a request may be passed over by younger ones.
PASSED_OVER_AT_MOST = 8
# Who has waited no longer than this is not asked whether the caller has gone.
PATIENCE_SECONDS = 0.005


def never() -> bool:
    """The default: the caller does not cancel."""
    return False


@dataclass(eq=False)
class _Waiting(Generic[Job, Ticket]):
    ticket: Ticket
    job: Job
    arrived: float
    deadline: float
    is_cancelled: Callable[[], bool]
    passed_over: int = 0


class Backlog(Generic[Job, Ticket]):
    """The waiting requests of one model, each known by its ticket. For one thread."""

    def __init__(self, model: ServedModel[Job], log_error: Log, clock: Callable[[], float] = time.monotonic) -> None:
        """Make an empty backlog. It is not bounded: the gateway limits what Triton holds.

        Args:
            model: runs the requests.
            log_error: receives what callers must not see.
            clock: seconds from any start.
        """
        self._model, self._log_error, self._clock = model, log_error, clock
        self._waiting: list[_Waiting[Job, Ticket]] = []  # oldest first
        self.waits: list[float] = []
        """Seconds that requests waited before their run, since this was last emptied."""

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def add(
        self,
        ticket: Ticket,
        read: Callable[[], Request],
        seconds: float = float("inf"),
        is_cancelled: Callable[[], bool] = never,
    ) -> Reply | None:
        """Queue a request; return its error if it is wrong.

        Args:
            ticket: comes back with the reply.
            read: reads the request, which can fail too.
            seconds: how long it may wait.
            is_cancelled: whether its caller has gone.
        """
        try:
            job = self._model.check(read())
        except Exception as error:  # noqa: BLE001 whatever it is, only this request fails
            return hide_unexpected(error, self._log_error)
        now = self._clock()
        self._waiting.append(_Waiting(ticket, job, now, now + seconds, is_cancelled))
        return None

    def step(self) -> Iterator[tuple[Ticket, Reply]]:
        """Refuse expired requests, then run the next group, and answer it."""
        now = self._clock()
        late = [each for each in self._waiting if now >= each.deadline]
        window = [each for each in self._waiting if now < each.deadline][:WINDOW]
        group = self._choose(window) if window else []
        youngest = max((window.index(each) for each in group), default=0)
        for each in window[:youngest]:
            each.passed_over += each not in group
        # Asking whether a caller has gone takes a while itself, so only those are asked whose turn has come.
        gone = [each for each in group if now - each.arrived > PATIENCE_SECONDS and each.is_cancelled()]
        for each in late + group:
            self._waiting.remove(each)
        for each in late + gone:
            yield (
                each.ticket,
                ExpiredError("not computed: the caller's deadline passed while the request waited"),
            )
        group = [each for each in group if each not in gone]
        self.waits += [now - each.arrived for each in group]
        yield from zip([each.ticket for each in group], self._run([each.job for each in group]), strict=True)

    def _choose(self, window: list[_Waiting[Job, Ticket]]) -> list[_Waiting[Job, Ticket]]:
        """Return the group that runs next."""
        groups = [[window[place] for place in group] for group in self._plan([each.job for each in window])]
        overdue = (group for group in groups if any(each.passed_over >= PASSED_OVER_AT_MOST for each in group))
        return next(overdue, groups[0])

    def _plan(self, jobs: list[Job]) -> list[list[int]]:
        """Return the model's plan, or each job alone if that fails or leaves one out."""
        each_alone = [[index] for index in range(len(jobs))]
        if len(jobs) == 1:
            return each_alone
        try:
            groups = [group for group in self._model.plan(jobs) if group]
        except Exception as error:  # noqa: BLE001 a plan saves time, no more
            hide_unexpected(error, self._log_error)
            return each_alone
        is_whole = sorted(index for group in groups for index in group) == list(range(len(jobs)))
        return groups if is_whole else each_alone

    def _run(self, jobs: list[Job]) -> Sequence[Reply]:
        """Run the jobs together; if that fails, each alone, so that the one at fault fails alone."""
        if not jobs:
            return []
        try:
            return _check_count(self._model.run(jobs), len(jobs))
        except Exception as error:  # noqa: BLE001 reported to the caller and the log
            if len(jobs) == 1:
                return [hide_unexpected(error, self._log_error)]
        return [self._run([job])[0] for job in jobs]


def answer(model: ServedModel[Any], read: Callable[[], Request], log_error: Log) -> Reply:
    """Answer one request at once."""
    backlog: Backlog[Any, None] = Backlog(model, log_error)
    error = backlog.add(None, read)
    return error if error is not None else next(backlog.step())[1]


def hide_unexpected(error: Exception, log_error: Log) -> KvcastError:
    """Return an error fit for a caller: our own as it is, any other as a reference to the server's log."""
    if isinstance(error, KvcastError):
        return error
    reference = uuid.uuid4().hex[:12]
    log_error(f"unexpected error {reference}:\n" + "".join(traceback.format_exception(error)))
    return ServerFaultError(f"unexpected error on the server; its log has the details under {reference}")


def _check_count(outputs: list[Tensors], count: int) -> list[Tensors]:
    if len(outputs) != count:
        raise RuntimeError(f"{count} jobs got {len(outputs)} outputs")
    return outputs
