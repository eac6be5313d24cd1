"""Trying again: when, how often, how long, and never what must not be sent again. A transport in memory."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from kvcast.client import (
    NO_RETRIES,
    AsyncRankerClient,
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    RankerClient,
    RetryPolicy,
    ServerFaultError,
    TryAgainError,
)
from kvcast.client.retry import Answer, Pause, Retries, RetryBudget, Send
from kvcast.client.transport import AsyncTransport, Call, Tensors, Transport
from kvcast.protocol.manifest import Manifest, read_manifest

QUICK = RetryPolicy(first_pause=0.001, longest_pause=0.002)
HISTORY, CANDIDATES = [[1, 2], [3, 1]], [[1, 1, 1, 1], [2, 1, 1, 1]]


class Script:
    """What a server answers: the errors of its list, one a sending, and where that says None or ends, rightly."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.errors: list[Exception | None] = []
        self.sent: list[tuple[str, float]] = []
        """(output asked for, deadline in seconds) of every sending."""
        self.scores: list[float] = []
        """Of all candidates of a sending; 0 where the list ends."""
        self.counts: list[int] = []
        """Candidates of every sending that asked for scores."""

    def answer(self, call: Call, deadline: float) -> Tensors:
        self.sent.append((call.outputs[0], deadline))
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        text = self.manifest.to_json().encode()
        answers = {
            "manifest": lambda: np.array([[text]], object),
            "scores": lambda: self.score(call.inputs["candidates"].shape[1]),
            "kv_id": lambda: np.zeros((1, 32), np.uint8),
            "encode_report": lambda: np.array([[b'{"cache": "hit", "encode_seconds": 0.0}']], object),
        }
        return {name: answers[name]() for name in call.outputs}

    def score(self, count: int) -> np.ndarray:
        self.counts.append(count)
        return np.full((1, count), self.scores.pop(0) if self.scores else 0, np.float32)


class ScriptTransport(Transport):
    """Answers from a script."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def infer(self, call: Call, deadline: float) -> Tensors:
        return self.script.answer(call, deadline)

    def close(self) -> None:
        pass


class AsyncScriptTransport(AsyncTransport):
    """Answers from a script, for asyncio."""

    def __init__(self, script: Script) -> None:
        self.script = script

    async def infer(self, call: Call, deadline: float) -> Tensors:
        return self.script.answer(call, deadline)

    async def close(self) -> None:
        pass


Ask = Callable[..., Any]


@pytest.fixture
def script(tiny_repository) -> Script:
    return Script(read_manifest(tiny_repository / "user_encoder" / "1"))


@pytest.fixture(params=["sync", "async"])
def ask(request, script) -> Ask:
    """Call a method of a new client of the script, sync or async."""

    def call(method: str, *arguments: Any, deadline: float = 5.0, retry: RetryPolicy = QUICK) -> Any:
        if request.param == "sync":
            with RankerClient(retry=retry, transport=ScriptTransport(script)) as client:
                return getattr(client, method)(*arguments, deadline=deadline)

        async def run() -> Any:
            async with AsyncRankerClient(retry=retry, transport=AsyncScriptTransport(script)) as client:
                return await getattr(client, method)(*arguments, deadline=deadline)

        return asyncio.run(run())

    return call


def away(count: int) -> list[Exception | None]:
    return [TryAgainError("here:1: away") for _ in range(count)]


def test_what_can_be_answered_later_is_asked_again(ask, script):
    script.errors = [*away(2), BusyError("busy")]
    assert ask("get_manifest") == script.manifest
    assert len(script.sent) == 4
    script.errors = away(3)
    assert ask("prefetch", HISTORY).cache == "hit"


def test_a_ranking_says_how_often_it_was_sent(ask, script):
    assert ask("rank", HISTORY, CANDIDATES).attempts == 1
    script.sent.clear()
    script.errors = [*away(1), None, *away(2)]
    assert ask("rank", HISTORY, CANDIDATES).attempts == 3, "those for the manifest are not the ranking's"
    assert [name for name, _ in script.sent] == ["manifest"] * 2 + ["scores"] * 3


@pytest.mark.parametrize("kind", [InvalidRequestError, ServerFaultError, DeadlineExceededError])
def test_what_cannot_be_answered_later_is_not_asked_again(ask, script, kind):
    script.errors = [kind("no")]
    with pytest.raises(kind):
        ask("get_manifest")
    assert len(script.sent) == 1


def test_no_retries(ask, script):
    script.errors = away(1)
    with pytest.raises(TryAgainError, match=r"^here:1: away$"):
        ask("rank", HISTORY, CANDIDATES, retry=NO_RETRIES)
    assert len(script.sent) == 1


def test_the_deadline_is_the_whole_calls(ask, script):
    script.errors = away(10_000)
    started = time.monotonic()
    with pytest.raises(TryAgainError, match=r"^here:1: away \(\d+ attempts\)$"):
        ask("rank", HISTORY, CANDIDATES, deadline=0.2, retry=RetryPolicy(first_pause=0.02))
    assert time.monotonic() - started < 3
    deadlines = [deadline for _, deadline in script.sent]
    assert len(deadlines) > 2
    assert deadlines == sorted(deadlines, reverse=True)
    assert 0 < deadlines[-1] < deadlines[0] <= 0.2


def test_an_empty_budget_ends_it(ask, script):
    script.errors = away(100)
    policy = RetryPolicy(first_pause=0, longest_pause=0, budget_rate=0, budget_capacity=3)
    with pytest.raises(TryAgainError, match=r"\(4 attempts\)"):
        ask("get_manifest", retry=policy)
    assert len(script.sent) == 4


def test_a_wrong_request_is_refused_without_waiting_for_a_server_that_is_away(script):
    with RankerClient(retry=RetryPolicy(), transport=ScriptTransport(script)) as client:
        client.get_manifest()
        script.errors = away(100)
        with pytest.raises(InvalidRequestError, match="N = 1 to 64"):
            client.rank(HISTORY, [])
        assert len(script.sent) == 2


MANY = [[1, 1, 1, 1]] * 150


def test_candidates_above_the_limit_are_sent_in_parts_that_share_the_first(ask, script):
    script.errors = [None, None, *away(1)]
    ranking = ask("rank", HISTORY, MANY)
    assert script.counts == [64, 64, 24], "64 + 63 + 23"
    assert (ranking.scores.shape, ranking.candidates.shape, ranking.attempts) == ((150,), (150, 4), 2)


def test_parts_from_different_releases_are_never_joined(ask, script):
    script.scores = [0.5, 0.5, 0.7]
    assert ask("rank", HISTORY, MANY).scores.tolist() == [0] * 150
    assert len(script.counts) == 6
    script.scores = [0.5, 0.7, 0.7] * 2
    with pytest.raises(TryAgainError, match="the release changed while they were scored in 3 parts"):
        ask("rank", HISTORY, MANY)


def test_limits_that_the_server_has_lowered_are_learnt_from_its_refusal(script):
    with RankerClient(retry=QUICK, transport=ScriptTransport(script)) as client:
        client.get_manifest()
        limits = msgspec.structs.replace(script.manifest.limits, candidates=32)
        script.manifest = msgspec.structs.replace(script.manifest, limits=limits)
        script.errors = [InvalidRequestError("candidates: expected N = 1 to 32 candidates, got 50")]
        assert client.rank(HISTORY, MANY[:50]).scores.shape == (50,)
        assert script.counts == [32, 19]


def test_who_truncates_learns_of_longer_histories(script, monkeypatch):
    long = [[1, 1]] * 200
    with RankerClient(retry=QUICK, transport=ScriptTransport(script)) as client:
        client.rank(long, CANDIDATES, truncate=True)
        client.rank(long, CANDIDATES, truncate=True)
        assert [name for name, _ in script.sent] == ["manifest", "scores", "scores"]
        monkeypatch.setattr("kvcast.client.clients.TRUNCATION_SECONDS", 0)
        script.errors = away(1)
        client.rank(long, CANDIDATES, truncate=True)
        client.rank(HISTORY, CANDIDATES)
        assert [name for name, _ in script.sent][3:] == ["manifest", "scores", "scores"], (
            "a server that is away is none"
        )


def test_one_users_error_leaves_the_others_their_scores(ask, script):
    script.errors = [None, None, ServerFaultError("broken"), None]
    many = ask("rank_many", [(HISTORY, CANDIDATES)] * 3)
    assert sorted(type(each).__name__ for each in many) == ["Ranking", "Ranking", "ServerFaultError"]
    script.errors = [ServerFaultError("broken")]
    with pytest.raises(ServerFaultError, match="broken"):
        ask("rank_many", [(HISTORY, CANDIDATES)])


def test_a_cancelled_call_is_over(script):
    script.errors = away(10_000)

    async def run() -> None:
        policy, transport = RetryPolicy(first_pause=0.01), AsyncScriptTransport(script)
        async with AsyncRankerClient(retry=policy, transport=transport) as client:
            task = asyncio.create_task(client.rank(HISTORY, CANDIDATES))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            count = len(script.sent)
            await asyncio.sleep(0.05)
            assert len(script.sent) == count > 0

    asyncio.run(run())


# The steps themselves, with a clock of their own.

CALL = Call("ranker", {}, ["scores"])


class FakeTime:
    """A clock that moves when told, and a dice with a fixed side."""

    def __init__(self, side: float = 0.5) -> None:
        self.now = 100.0
        self.side = side

    def make(self, policy: RetryPolicy) -> Retries:
        return Retries(policy, "here:1", clock=lambda: self.now, draw=lambda: self.side)


def collect_pauses(fake: FakeTime, retries: Retries, deadline: float) -> list[float]:
    """Return the pauses of a call whose sendings all fail, until its error is raised."""
    steps = retries.exchange(CALL, retries.start(deadline))
    step, pauses = next(steps), []
    while isinstance(step, Send):
        try:
            pause = steps.throw(TryAgainError("away"))
        except TryAgainError:
            return pauses
        assert isinstance(pause, Pause)
        pauses.append(pause.seconds)
        fake.now += pause.seconds
        step = steps.send({})
    raise AssertionError("expected a sending after a pause")


@pytest.mark.parametrize("side", [0.0, 0.3, 1.0])
def test_pauses_double_up_to_a_second_and_jitter_takes_any_part_of_them(side):
    fake = FakeTime(side)
    pauses = collect_pauses(fake, fake.make(RetryPolicy(budget_capacity=9, budget_rate=0)), 100)
    limits = [0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1, 1]
    np.testing.assert_allclose(pauses, [side * limit for limit in limits])
    assert RetryPolicy().limit_pause(100_000) == 1.0


def test_no_pause_that_the_deadline_would_not_outlast():
    fake = FakeTime(1.0)
    assert collect_pauses(fake, fake.make(RetryPolicy()), 0.16) == pytest.approx([0.05, 0.1])
    assert fake.now == pytest.approx(100.15), "the third pause would have been 0.2 s: raised at once"
    fake = FakeTime(1.0)
    assert collect_pauses(fake, fake.make(RetryPolicy(seconds=0.16)), 30) == pytest.approx([0.05, 0.1])


def test_a_deadline_that_has_passed_sends_nothing_more():
    fake = FakeTime()
    retries = fake.make(RetryPolicy())
    deadline = retries.start(2)
    fake.now += 2
    with pytest.raises(DeadlineExceededError, match=r"^here:1: no answer within the deadline of 2 s$"):
        next(retries.exchange(CALL, deadline))


def test_missing_the_deadline_names_the_whole_of_it():
    fake = FakeTime()
    retries = fake.make(RetryPolicy())
    steps = retries.exchange(CALL, retries.start(2))
    next(steps)
    fake.now += 0.5
    pause = steps.throw(TryAgainError("away"))
    assert isinstance(pause, Pause)
    fake.now += pause.seconds
    step = steps.send({})
    assert isinstance(step, Send)
    assert step.deadline == pytest.approx(1.5 - pause.seconds)
    with pytest.raises(DeadlineExceededError, match=r"deadline of 2 s \(2 attempts\)"):
        steps.throw(DeadlineExceededError("here:1: no answer within the deadline of 1.475 s"))


def test_an_answer_counts_its_attempts_and_its_time():
    fake = FakeTime()
    retries = fake.make(RetryPolicy())
    steps = retries.exchange(CALL, retries.start(9))
    next(steps)
    fake.now += 1
    steps.throw(TryAgainError("away"))
    fake.now += 1
    steps.send({})
    fake.now += 1
    with pytest.raises(StopIteration) as end:
        steps.send({"scores": np.zeros(1)})
    answer = end.value.value
    assert isinstance(answer, Answer)
    assert (answer.attempts, answer.seconds) == (2, 3.0)


def test_the_budget_is_a_share_of_the_calls_and_a_trickle():
    fake = FakeTime()
    budget = RetryBudget(RetryPolicy(budget_capacity=10, budget_share=0.25), clock=lambda: fake.now)
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False]
    for _ in range(8):
        budget.deposit()
    assert [budget.withdraw() for _ in range(3)] == [True, True, False]
    fake.now += 0.5  # five tokens
    assert [budget.withdraw() for _ in range(6)] == [True] * 5 + [False]
    fake.now += 1e6
    assert [budget.withdraw() for _ in range(11)] == [True] * 10 + [False], "never more than its capacity"


def test_an_outage_is_not_multiplied():
    """A thousand calls a second for ten seconds, all refused: sent again are a fifth, the trickle and the reserve."""
    fake = FakeTime(0.0)
    retries = fake.make(RetryPolicy(seconds=0.001))
    sent = 0
    for _ in range(10_000):
        steps = retries.exchange(CALL, retries.start(1))
        next(steps)
        sent += 1
        try:
            while True:
                steps.throw(TryAgainError("busy"))
                steps.send({})
                sent += 1
        except TryAgainError:
            pass
        fake.now += 0.001
    assert sent <= 10_000 * 1.2 + 10 * 10 + 100 + 1


def test_threads_share_one_budget():
    budget = RetryBudget(RetryPolicy(budget_rate=0))
    paid: list[bool] = []
    threads = [threading.Thread(target=lambda: paid.extend(budget.withdraw() for _ in range(50))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(paid) == 100


@pytest.mark.parametrize("change", [{"first_pause": -1}, {"seconds": float("nan")}, {"budget_capacity": -0.1}])
def test_a_policy_that_makes_no_sense_is_refused(change):
    with pytest.raises(ValueError, match=f"expected {next(iter(change))} to be 0 or more"):
        RetryPolicy(**change)
