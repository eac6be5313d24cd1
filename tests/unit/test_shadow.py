"""The shadow: what it chooses, what it measures, and that no caller ever notices it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from kvcast.gateway.shadow import WAITING_AT_MOST, Shadow
from kvcast.protocol.tensors import CANDIDATES, HISTORY, RANKER_FULL, SCORES
from tests.chaos.fuzzing import make_infer_request

SCORED = np.array([[0.5, -1.0, 2.0]], np.float32)
HISTORY_IDS, CANDIDATE_IDS = np.ones((1, 4, 2), np.int64), np.full((1, 3, 2), 7, np.int64)


def make_reply(scores: np.ndarray = SCORED) -> bytes:
    reply: Any = service_pb2.ModelInferResponse()
    reply.outputs.add(name="fuse_report", datatype="BYTES", shape=[1])
    reply.outputs.add(name=SCORES.name, datatype="FP32", shape=scores.shape)
    reply.raw_output_contents.extend([b"\2\0\0\0{}", scores.astype(np.float32).tobytes()])
    return bytes(reply.SerializeToString())


def make_ranking(model: str = "ranker", candidates: np.ndarray = CANDIDATE_IDS) -> Any:
    request = make_infer_request(model, {HISTORY.name: ("INT64", HISTORY_IDS), CANDIDATES.name: ("INT64", candidates)})
    request.outputs.add(name=SCORES.name)
    return request


class Triton:
    """Answers as told; keeps what it was asked."""

    def __init__(self, *scores: np.ndarray | Exception) -> None:
        self.replies = list(scores) or [SCORED]
        self.asked: list[Any] = []
        self.release = "one"
        self.switches_to = ""

    async def send(self, message: bytes) -> bytes:
        self.asked.append(service_pb2.ModelInferRequest.FromString(message))
        await asyncio.sleep(0)
        reply = self.replies[min(len(self.asked), len(self.replies)) - 1]
        if isinstance(reply, Exception):
            raise reply
        self.release = self.switches_to or self.release
        return make_reply(reply)

    def make_shadow(self, share: float = 1.0, draw: Callable[[], float] = lambda: 0.5) -> Shadow:
        return Shadow(share, self.send, lambda: self.release, draw, settled_seconds=0.05)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 10))  # type: ignore[arg-type]


def count(shadow: Shadow) -> dict[str, int]:
    return {"scored": shadow.scored, "skipped": shadow.skipped, "failed": shadow.failed}


def test_the_share_is_what_is_chosen():
    triton, drawn = Triton(), iter(np.linspace(0, 1, 1000, endpoint=False))
    shadow = triton.make_shadow(0.25, lambda: next(drawn))
    assert sum(shadow.chooses("ranker") for _ in range(1000)) == 250
    assert not triton.make_shadow(0, lambda: 0.0).chooses("ranker")
    assert triton.make_shadow(1, lambda: 0.999999).chooses("ranker_resident")
    assert not any(triton.make_shadow().chooses(name) for name in ("ranker_full", "user_encoder", "doc_fusion", "x"))


def test_a_ranking_is_scored_again_by_full_recomputation():
    triton = Triton(SCORED + 1e-6)

    async def scenario() -> None:
        shadow = triton.make_shadow()
        shadow.score_again(make_ranking(), "one", make_reply())
        await shadow.finish()
        assert count(shadow) == {"scored": 1, "skipped": 0, "failed": 0}
        assert 0 < shadow.largest_difference < 2e-6

    run(scenario)
    (asked,) = triton.asked
    assert asked.model_name == RANKER_FULL.name
    assert [tensor.name for tensor in asked.inputs] == [HISTORY.name, CANDIDATES.name]
    assert list(asked.raw_input_contents) == [HISTORY_IDS.tobytes(), CANDIDATE_IDS.tobytes()]
    assert [output.name for output in asked.outputs] == [SCORES.name]


@pytest.mark.parametrize(
    ("slow", "difference"), [(SCORED + 0.5, 0.5), (np.where(SCORED > 1, np.nan, SCORED), float("inf"))]
)
def test_a_wrong_scorer_is_seen(slow, difference):
    async def scenario() -> None:
        shadow = Triton(SCORED, slow, SCORED).make_shadow()
        for _ in range(3):
            shadow.score_again(make_ranking(), "one", make_reply())
        await shadow.finish()
        assert count(shadow) == {"scored": 3, "skipped": 0, "failed": 0}
        assert shadow.largest_difference == pytest.approx(difference)

    run(scenario)


def test_what_was_answered_before_a_switch_of_release_is_skipped():
    async def scenario() -> None:
        triton = Triton(SCORED + 1)
        triton.switches_to = "two"
        shadow = triton.make_shadow()
        shadow.score_again(make_ranking(), "one", make_reply())
        await shadow.finish()
        assert count(shadow) == {"scored": 0, "skipped": 1, "failed": 0}
        assert shadow.largest_difference == 0
        shadow.score_again(make_ranking(), "one", make_reply())  # answered after the switch, sent before
        await shadow.finish()
        assert shadow.skipped == 2

    run(scenario)


def test_a_difference_from_the_midst_of_a_switch_is_skipped():
    async def scenario() -> None:
        triton = Triton(SCORED + 1)
        shadow = triton.make_shadow()
        shadow.score_again(make_ranking(), "one", make_reply())
        await asyncio.sleep(0.02)  # scored by the new release, and nobody has said yet that it is there
        triton.release = "two"
        await shadow.finish()
        assert count(shadow) == {"scored": 0, "skipped": 1, "failed": 0}

    run(scenario)


@pytest.mark.parametrize("slow", [ValueError("no"), TimeoutError(), SCORED[:, :2]])
def test_what_fails_is_counted_and_nothing_more(slow):
    async def scenario() -> None:
        shadow = Triton(slow).make_shadow()
        shadow.score_again(make_ranking(), "one", make_reply())
        shadow.score_again(make_ranking(), "one", b"\xff\xff")
        await shadow.finish()
        assert count(shadow) == {"scored": 0, "skipped": 0, "failed": 2}

    run(scenario)


def test_what_asks_for_no_scores_is_left_alone():
    async def scenario() -> None:
        triton = Triton()
        shadow = triton.make_shadow()
        shadow.score_again(make_ranking("ranker_resident", CANDIDATE_IDS[:, :0]), "one", make_reply())
        report = make_ranking()
        report.outputs[0].name = "fuse_report"
        shadow.score_again(report, "one", make_reply())
        await shadow.finish()
        assert triton.asked == []
        assert not any(count(shadow).values())

    run(scenario)


def test_only_so_many_wait_to_be_scored_again_one_after_the_other():
    async def scenario() -> None:
        triton = Triton()
        shadow = triton.make_shadow()
        for _ in range(WAITING_AT_MOST + 3):
            if shadow.chooses("ranker"):
                shadow.score_again(make_ranking(), "one", make_reply())
        await asyncio.sleep(0)
        assert len(triton.asked) == 1
        await shadow.finish()
        assert count(shadow) == {"scored": WAITING_AT_MOST, "skipped": 3, "failed": 0}
        assert shadow.chooses("ranker")

    run(scenario)
