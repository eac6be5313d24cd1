"""The gate: who goes in, who waits, who is refused, and that no place is ever lost."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.gateway import gate as gate_module
from kvcast.gateway.admission import HELD_BYTES, Admission
from kvcast.gateway.config import State
from kvcast.gateway.gate import NOTICED_WITHIN_SECONDS, SENT_AT_MOST, Gate, GateLimits, ModelDiedError, UnansweredError
from kvcast.protocol.errors import BusyError, DeadlineExceededError, InvalidRequestError, KvcastError, TryAgainError

FOREVER = float("inf")
MODEL = "ranker"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Triton:
    """Answers when told to, and knows what it was sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.answers: dict[str, asyncio.Future[str]] = {}
        self.inside = self.most_inside = 0

    def make_send(self, name: str) -> Callable[[float], Awaitable[str]]:
        async def send(seconds: float) -> str:
            assert seconds > 0
            self.sent.append(name)
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            self.answers[name] = asyncio.get_running_loop().create_future()
            try:
                return await self.answers[name]
            finally:
                self.inside -= 1

        return send

    def answer(self, name: str) -> None:
        self.answers[name].set_result(name)

    def die(self, name: str) -> None:
        self.answers[name].set_exception(ModelDiedError(name))


async def settle() -> None:
    """Let everything happen that can happen by itself."""
    for _ in range(20):
        await asyncio.sleep(0)


def start(gate: Gate, triton: Triton, name: str, seconds: float = FOREVER) -> asyncio.Task[str]:
    return asyncio.create_task(gate.ask(MODEL, seconds, triton.make_send(name)))


def run(scenario: Callable[[], Awaitable[Any]]) -> None:
    """Run it; what asyncio has to complain about is a failure too."""
    complaints: list[str] = []

    async def run_watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        async with asyncio.timeout(20):
            await scenario()
        await settle()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run_watched())
    assert not complaints


def test_at_most_so_many_are_inside_and_the_others_follow_in_their_order():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=2, waiting=10)), Triton()
        tasks = [start(gate, triton, str(index)) for index in range(6)]
        await settle()
        assert (triton.sent, gate.in_flight, gate.waiting) == (["0", "1"], 2, 4)
        for index in (1, 0, 2, 3, 4, 5):
            triton.answer(str(index))
            await settle()
        assert triton.sent == ["0", "1", "2", "3", "4", "5"]
        assert [await task for task in tasks] == triton.sent
        assert triton.most_inside == 2
        assert gate.is_idle
        assert gate.counts.answered == 6

    run(scenario)


def test_one_who_comes_when_a_place_is_free_does_not_overtake_those_who_wait():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=10)), Triton()
        start(gate, triton, "a")
        waiting = start(gate, triton, "b")
        await settle()
        triton.answer("a")
        late = start(gate, triton, "c")
        await settle()
        assert triton.sent == ["a", "b"]
        triton.answer("b")
        await settle()
        triton.answer("c")
        await asyncio.gather(waiting, late)

    run(scenario)


def test_more_than_may_wait_are_refused():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=2)), Triton()
        tasks = [start(gate, triton, name) for name in "abcd"]
        await settle()
        with pytest.raises(TryAgainError, match="busy: 2 requests are waiting already"):
            await tasks[3]
        for name in "abc":
            triton.answer(name)
            await settle()
        await asyncio.gather(*tasks[:3])
        assert triton.sent == ["a", "b", "c"]
        assert gate.counts.refused == {"full": 1, "deadline": 0, "stopping": 0, "broken": 0}

    run(scenario)


def test_an_error_of_tritons_is_an_answer_and_a_refusal_is_none():
    async def scenario() -> None:
        seconds: list[float] = []
        clock = iter(range(100))
        gate = Gate(GateLimits(in_flight=1, waiting=2), lambda: float(next(clock)), seconds.append)
        for error, answers in ((InvalidRequestError, 1), (TryAgainError, 2), (None, 3)):

            async def send(left: float, error=error) -> str:
                if error is not None:
                    raise error
                return "scores"

            with contextlib.nullcontext() if error is None else pytest.raises(error):
                await gate.ask(MODEL, FOREVER, send)
            assert gate.counts.answered == len(seconds) == answers
        gate.is_draining = True
        with pytest.raises(TryAgainError, match="stopping"):
            await gate.ask(MODEL, FOREVER, send)
        assert gate.counts.answered == len(seconds) == 3
        assert all(each > 0 for each in seconds)

    run(scenario)


def test_one_whose_deadline_passes_while_it_waits_is_never_sent():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=2)), Triton()
        first, hasty = start(gate, triton, "a"), start(gate, triton, "b", 0.02)
        with pytest.raises(DeadlineExceededError, match="not computed"):
            await hasty
        assert (gate.in_flight, gate.waiting) == (1, 0)
        triton.answer("a")
        await first
        assert triton.sent == ["a"]
        assert gate.counts.refused["deadline"] == 1

    run(scenario)


@pytest.mark.parametrize("seconds", [0.0, -1.0, -1e9])
def test_one_whose_deadline_has_passed_already_is_never_sent(seconds):
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=2)), Triton()
        with pytest.raises(DeadlineExceededError):
            await start(gate, triton, "a", seconds)
        busy = start(gate, triton, "b")
        with pytest.raises(DeadlineExceededError):
            await start(gate, triton, "c", seconds)
        triton.answer("b")
        await busy
        assert triton.sent == ["b"]
        assert gate.is_idle

    run(scenario)


async def take_seconds(gate: Gate, triton: Triton, clock: Clock, seconds: float) -> None:
    """Have the gate learn how long an answer takes."""
    for index in range(60):
        task = start(gate, triton, f"slow {index}")
        await settle()
        clock.now += seconds
        triton.answer(f"slow {index}")
        await task


@pytest.mark.parametrize("in_flight", [1, 4])
def test_what_cannot_be_made_in_time_is_refused_at_once(in_flight):
    async def scenario() -> None:
        clock, triton = Clock(), Triton()
        gate = Gate(GateLimits(in_flight, waiting=100), clock)
        await take_seconds(gate, triton, clock, 1.0)
        tasks = [start(gate, triton, str(index)) for index in range(in_flight + 5)]
        await settle()
        with pytest.raises(BusyError, match="busy: expected to take"):
            await gate.ask(MODEL, in_flight + 5.0, triton.make_send("late"))
        in_time = start(gate, triton, "in time", 1.3 * (in_flight + 6))
        await settle()
        assert gate.waiting == 6
        for index in range(in_flight + 5):
            triton.answer(str(index))
            await settle()
        triton.answer("in time")
        await asyncio.gather(*tasks, in_time)
        assert "late" not in triton.sent

    run(scenario)


def test_an_old_estimate_cannot_shut_the_gate():
    async def scenario() -> None:
        clock, triton = Clock(), Triton()
        gate = Gate(GateLimits(in_flight=1, waiting=100), clock)
        await take_seconds(gate, triton, clock, 100.0)
        clock.now += 1e6  # idle; fast from now on
        for index in range(100):
            alone = start(gate, triton, str(index), 1.0)
            await settle()
            clock.now += 0.001
            triton.answer(str(index))
            await alone
        first, second = start(gate, triton, "a"), start(gate, triton, "b", 1.0)
        await settle()
        assert gate.waiting == 1, "the estimate has followed, and idle time was no part of it"
        triton.answer("a")
        await settle()
        triton.answer("b")
        await asyncio.gather(first, second)

    run(scenario)


@pytest.mark.parametrize("moments", range(10))
def test_a_caller_who_goes_gives_the_place_back_in_every_phase(moments):
    """While waiting, when its turn has come and it does not know yet, while it is sent, when the answer is there."""

    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=10)), Triton()
        inside, goes, last = (start(gate, triton, name) for name in "abc")
        await settle()
        triton.answer("a")
        for _ in range(moments):
            await asyncio.sleep(0)
        goes.cancel()
        await settle()
        assert triton.sent[-1] == "c"
        assert (gate.in_flight, gate.waiting, triton.inside) == (1, 0, 1)
        last.cancel()
        await asyncio.gather(inside, goes, last, return_exceptions=True)
        assert gate.is_idle

    run(scenario)


def make_stubborn_send(triton: Triton, name: str) -> Callable[[float], Awaitable[str]]:
    """Return what goes on until the answer is there, also if nobody wants it any more."""

    async def send(seconds: float) -> str:
        sending = asyncio.ensure_future(triton.make_send(name)(seconds))
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait((sending,))
            raise

    return send


@pytest.mark.parametrize("how", ["goes", "has waited long enough"])
def test_what_triton_still_has_keeps_its_place_when_nobody_waits_for_it(how):
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=10)), Triton()
        seconds = FOREVER if how == "goes" else 0.01
        first = asyncio.create_task(gate.ask(MODEL, seconds, make_stubborn_send(triton, "a")))
        await settle()
        second = start(gate, triton, "b")
        if how == "goes":
            first.cancel()
        with pytest.raises((asyncio.CancelledError, DeadlineExceededError)):
            await first
        await settle()
        assert (triton.sent, gate.in_flight, gate.waiting, gate.is_idle) == (["a"], 1, 1, False)
        triton.answer("a")
        await settle()
        assert (triton.sent, gate.in_flight) == (["a", "b"], 1)
        triton.answer("b")
        assert await second == "b"
        assert gate.is_idle

    run(scenario)


def test_what_died_with_its_process_after_its_caller_went_gives_the_place_back_once():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=2, waiting=10)), Triton()
        gone = asyncio.create_task(gate.ask(MODEL, FOREVER, make_stubborn_send(triton, "gone")))
        await settle()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert gate.in_flight == 1
        gate.set_broken({MODEL}, 1)
        assert gate.in_flight == 0
        gate.set_broken((), 1)
        stays = start(gate, triton, "stays")
        await settle()
        triton.answer("gone")  # Triton had not lost it after all
        await settle()
        assert gate.in_flight == 1
        triton.answer("stays")
        await stays
        assert gate.is_idle

    run(scenario)


def test_a_caller_who_goes_while_everybody_is_refused_takes_no_place_along():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=10)), Triton()
        inside, waiting = start(gate, triton, "a"), start(gate, triton, "b")
        await settle()
        gate.give_up()
        waiting.cancel()
        await asyncio.gather(inside, waiting, return_exceptions=True)
        assert (gate.in_flight, gate.waiting) == (0, 0)

    run(scenario)


class Story:
    """Requests to one gate, to which things happen that a test chooses."""

    def __init__(self, in_flight: int, waiting: int) -> None:
        self.clock, self.triton = Clock(), Triton()
        self.gate = Gate(GateLimits(in_flight, waiting), self.clock)
        self.tasks: list[asyncio.Task[str]] = []
        self.incidents = 0

    async def ask(self, number: int) -> None:
        self.tasks.append(start(self.gate, self.triton, str(len(self.tasks))))

    async def ask_in_haste(self, number: int) -> None:
        self.tasks.append(start(self.gate, self.triton, str(len(self.tasks)), number / 1e5))

    async def cancel(self, number: int) -> None:
        for task in self.tasks[number % 7 :: 7][:1]:
            task.cancel()

    async def answer(self, number: int) -> None:
        for answer in self._find_open()[number % 3 :][:1]:
            answer.set_result("")

    async def fail(self, number: int) -> None:
        for answer in self._find_open()[:1]:
            answer.set_exception(ValueError())

    async def die(self, number: int) -> None:
        for answer in self._find_open()[:1]:
            answer.set_exception(ModelDiedError())
        await self.break_model(number)

    async def break_model(self, number: int) -> None:
        self.incidents += 1
        self.gate.set_broken([MODEL], self.incidents)

    async def mend(self, number: int) -> None:
        self.gate.set_broken([], self.incidents)

    async def tick(self, number: int) -> None:
        await asyncio.sleep(0)

    async def pass_time(self, number: int) -> None:
        self.clock.now += number / 1e6
        await settle()

    async def answer_all(self) -> list[Any]:
        """Answer until nobody waits any more, and return what everybody got."""
        while not all(task.done() for task in self.tasks):
            await settle()
            for answer in self._find_open():
                answer.set_result("")
            self.clock.now += 0.01
            await asyncio.sleep(0.001)
        return await asyncio.gather(*self.tasks, return_exceptions=True)

    def _find_open(self) -> list[asyncio.Future[str]]:
        return [answer for answer in self.triton.answers.values() if not answer.done()]


STEPS = ["ask", "ask", "ask_in_haste", "cancel", "answer", "fail", "die", "break_model", "mend", "tick", "pass_time"]


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1000)), max_size=60),
    st.sampled_from(["answers", "drain", "give up"]),
)
def test_whatever_happens_in_whatever_order_no_place_is_lost(in_flight, waiting, steps, end):
    async def scenario() -> None:
        story = Story(in_flight, waiting)
        gate = story.gate
        for step, number in steps:
            await getattr(story, step)(number)
            assert 0 <= gate.in_flight <= in_flight
            assert gate.waiting <= waiting
        gate.is_draining = end != "answers"
        if end == "give up":
            gate.give_up()
        await story.mend(0)
        outcomes = await story.answer_all()
        assert (gate.in_flight, gate.waiting, story.triton.inside) == (0, 0, 0)
        assert story.triton.most_inside <= in_flight
        assert gate.counts.answered == sum(each == "" or isinstance(each, ValueError) for each in outcomes)
        refusals = [each for each in outcomes if isinstance(each, KvcastError)]
        assert sum(gate.counts.refused.values()) == len(refusals)
        assert not any(isinstance(each, ModelDiedError | AssertionError) for each in outcomes)

    run(scenario)


def test_while_a_model_is_broken_requests_wait_and_those_inside_are_sent_again():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=3, waiting=10)), Triton()
        inside = start(gate, triton, "inside")
        await settle()
        gate.set_broken([MODEL], 1)
        later = start(gate, triton, "later")
        await settle()
        assert (triton.sent, triton.inside) == (["inside"], 0)
        gate.set_broken([], 1)
        await settle()
        assert sorted(triton.sent) == ["inside", "inside", "later"]
        for name in ("inside", "later"):
            triton.answer(name)
        assert await asyncio.gather(inside, later) == ["inside", "later"]
        assert gate.counts.sent_again == 1
        assert gate.counts.answered == 2

    run(scenario)


def test_a_death_that_was_mended_before_anybody_looked_is_noticed_all_the_same():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        task = start(gate, triton, "a")
        await settle()
        gate.set_broken([], 1)
        await settle()
        assert triton.sent == ["a", "a"]
        triton.answer("a")
        await task

    run(scenario)


def test_a_request_under_which_processes_die_is_not_sent_for_ever():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        task = start(gate, triton, "deadly")
        for incident in range(1, SENT_AT_MOST + 1):
            await settle()
            gate.set_broken([MODEL], incident)
            await settle()
            gate.set_broken([], incident)
        with pytest.raises(TryAgainError, match="unanswered 3 times"):
            await task
        assert triton.sent == ["deadly"] * SENT_AT_MOST
        assert gate.counts.refused["broken"] == 1
        assert gate.is_idle

    run(scenario)


def test_a_model_that_stays_broken_is_waited_for_until_the_callers_deadline():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        gate.set_broken([MODEL], 1)
        with pytest.raises(DeadlineExceededError, match="is being replaced"):
            await start(gate, triton, "a", 0.02)
        assert triton.sent == []
        assert gate.counts.refused["broken"] == 1

    run(scenario)


def test_a_model_that_stays_broken_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(gate_module, "REPLACED_WITHIN_SECONDS", 0.02)

    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        gate.set_broken([MODEL], 1)
        with pytest.raises(TryAgainError, match="is being replaced") as caught:
            await start(gate, triton, "a")
        assert not isinstance(caught.value, DeadlineExceededError)

    run(scenario)


def test_the_bytes_that_are_held_are_bounded_and_given_back():
    async def run() -> None:
        admission, triton = Admission(GateLimits()), Triton()
        admission.follow(State(is_ready=True, release_number=1))
        large = asyncio.create_task(admission.ask(MODEL, HELD_BYTES - 10, FOREVER, triton.make_send("large")))
        await settle()
        with pytest.raises(TryAgainError, match="busy: 511 MiB of requests"):
            await admission.ask(MODEL, 11, FOREVER, triton.make_send("refused"))
        large.cancel()
        await settle()
        assert admission.held_bytes == 0
        gone = asyncio.create_task(admission.ask(MODEL, HELD_BYTES, FOREVER, make_stubborn_send(triton, "gone")))
        await settle()
        gone.cancel()
        await settle()
        assert admission.held_bytes == HELD_BYTES, "Triton has it, and so has the gateway"
        triton.answer("gone")
        await settle()
        assert admission.held_bytes == 0
        with pytest.raises(TryAgainError, match="starting"):
            await Admission(GateLimits()).ask(MODEL, 1, FOREVER, triton.make_send("early"))

    asyncio.run(run())


def test_a_death_elsewhere_changes_nothing():
    async def scenario() -> None:
        admission, triton = Admission(GateLimits()), Triton()
        admission.follow(State(is_ready=True, release_number=1))
        names = ("ranker", "ranker_resident", "user_encoder")
        tasks = [asyncio.create_task(admission.ask(name, 100, FOREVER, triton.make_send(name))) for name in names]
        await settle()
        admission.follow(State(release_number=1, broken=("doc_fusion",), deaths={"doc_fusion": 1}))
        await settle()
        assert triton.answers["ranker"].cancelled(), "doc_fusion is a step of it"
        assert triton.inside == 2
        admission.follow(State(is_ready=True, release_number=1, deaths={"doc_fusion": 1}))
        await settle()
        assert triton.sent == [*names, "ranker"]
        for name in names:
            triton.answer(name)
        await asyncio.gather(*tasks)

    run(scenario)


def test_one_who_is_told_by_triton_that_a_process_died_waits_until_the_launcher_has_noticed():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        task = start(gate, triton, "a")
        await settle()
        triton.die("a")
        await settle()
        gate.set_broken(["another"], 0)  # news, but not these
        await settle()
        assert triton.sent == ["a"]
        gate.set_broken([MODEL], 1)
        await settle()
        assert triton.sent == ["a"]
        gate.set_broken([], 1)
        await settle()
        assert triton.sent == ["a", "a"]
        triton.answer("a")
        assert await task == "a"

    run(scenario)


def test_one_whom_nobody_notices_is_sent_again_after_a_while(monkeypatch):
    monkeypatch.setattr(gate_module, "NOTICED_WITHIN_SECONDS", 0.02)

    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        task = start(gate, triton, "a")
        for _ in range(SENT_AT_MOST):
            await settle()
            triton.die("a")
            await asyncio.sleep(0.05)
        with pytest.raises(TryAgainError, match="unanswered 3 times"):
            await task
        hasty = start(gate, triton, "b", 0.01)
        await settle()
        triton.die("b")
        with pytest.raises(DeadlineExceededError):
            await hasty
        assert triton.sent == [*"aaab"], "nothing is sent after its deadline"

    run(scenario)


def test_an_error_that_is_an_answer_is_passed_on():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits()), Triton()
        task = start(gate, triton, "a")
        await settle()
        triton.answers["a"].set_exception(ValueError("wrong"))
        with pytest.raises(ValueError, match="wrong"):
            await task
        assert triton.sent == ["a"]
        assert (gate.is_idle, gate.counts.answered) == (True, 1)

    run(scenario)


def test_a_drain_refuses_the_new_and_lets_the_old_finish():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=5)), Triton()
        tasks = [start(gate, triton, name) for name in "ab"]
        await settle()
        gate.is_draining = True
        with pytest.raises(TryAgainError, match="stopping"):
            await start(gate, triton, "c")
        for name in "ab":
            triton.answer(name)
            await settle()
        assert await asyncio.gather(*tasks) == ["a", "b"]
        assert gate.is_idle
        assert gate.counts.refused["stopping"] == 1

    run(scenario)


def test_giving_up_answers_everybody_whatever_they_wait_for():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=3, waiting=5)), Triton()
        sent, died, held, *waiting = [start(gate, triton, name) for name in ("sent", "died", "held", "x", "y")]
        await settle()
        triton.die("died")
        await settle()
        gate.give_up()
        outcomes = await asyncio.gather(sent, died, held, *waiting, return_exceptions=True)
        assert [type(each) for each in outcomes] == [TryAgainError] * 5
        assert all("stopped before" in str(each) for each in outcomes)
        assert gate.counts.refused["stopping"] == 5
        assert gate.is_idle
        assert triton.sent == ["sent", "died", "held"]

    run(scenario)


def test_giving_up_wakes_those_who_wait_for_a_broken_model_and_those_just_let_in():
    async def scenario() -> None:
        gate, triton = Gate(GateLimits(in_flight=1, waiting=5)), Triton()
        broken, just_in = start(gate, triton, "a"), start(gate, triton, "b")
        gate.set_broken([MODEL], 1)
        await settle()
        broken.cancel()
        await asyncio.sleep(0)
        gate.give_up()
        outcomes = await asyncio.gather(broken, just_in, return_exceptions=True)
        assert isinstance(outcomes[1], TryAgainError)
        assert triton.sent == []
        assert gate.is_idle

    run(scenario)


def test_a_send_that_does_not_let_go_holds_nobody_up():
    async def scenario() -> None:
        gate, let_go = Gate(GateLimits()), asyncio.Event()

        async def send(seconds: float) -> str:
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue
            raise ValueError("nobody sees this")

        task = asyncio.create_task(gate.ask(MODEL, FOREVER, send))
        await settle()
        gate.give_up()
        with pytest.raises(TryAgainError):
            await task
        let_go.set()

    run(scenario)


def test_many_callers_that_come_and_go_at_random_times():
    async def scenario() -> None:
        draw, gate, inside, most = random.Random(7), Gate(GateLimits(in_flight=4, waiting=20)), 0, 0  # noqa: S311 repeated, not secret

        async def send(seconds: float) -> str:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            try:
                await asyncio.sleep(draw.random() * 0.004)
                if draw.random() < 0.05:
                    raise ModelDiedError
            finally:
                inside -= 1
            return ""

        async def call() -> None:
            await asyncio.sleep(draw.random() * 0.5)
            seconds = draw.choice([FOREVER, 0.01, 0.001])
            try:
                async with asyncio.timeout(draw.choice([None, draw.random() * 0.01])):
                    await gate.ask(MODEL, seconds, send)
            except (TimeoutError, TryAgainError):
                pass

        async def die() -> None:
            for incident in range(1, 40):
                gate.set_broken([MODEL] if incident % 2 else [], incident)
                await asyncio.sleep(0.02)
            gate.set_broken([], 40)

        await asyncio.gather(*(call() for _ in range(800)), die())
        assert (gate.in_flight, gate.waiting, inside) == (0, 0, 0)
        assert most <= 4
        assert gate.counts.answered > 50

    run(scenario)


def test_what_comes_back_unanswered_is_sent_again_at_once():
    """No process has died, so there is nothing to wait for."""

    async def scenario() -> None:
        gate, sent = Gate(GateLimits()), []

        async def send(left: float) -> str:
            sent.append(left)
            if len(sent) < SENT_AT_MOST:
                raise UnansweredError("cancelled")
            return "scores"

        async with asyncio.timeout(NOTICED_WITHIN_SECONDS / 2):
            assert await gate.ask(MODEL, FOREVER, send) == "scores"
        assert gate.counts.sent_again == SENT_AT_MOST - 1
        assert gate.is_idle

    run(scenario)
