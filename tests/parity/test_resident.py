"""`ResidentRanker` without a server = `FullRanker` = `UserEncoder` + `DocFusion`, hot and cold users mixed."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.export.calls import TorchCalls
from kvcast.export.proofs import Floats, Ids, draw_sample, prove
from kvcast.networks.interface import RankingNetwork
from kvcast.networks.transformer import Transformer
from kvcast.networks.weights import draw_weights
from kvcast.protocol.config import load_config
from kvcast.protocol.errors import InvalidRequestError, ServerFaultError
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.tensors import RANKER_RESIDENT
from kvcast.serving import DocFusion, FullRanker, ResidentRanker, UserEncoder
from kvcast.serving.artefact import Artefact, SessionOptions, open_artefact
from kvcast.serving.backlog import Backlog
from kvcast.serving.doc_fusion import FusionJob
from kvcast.serving.model import Request, Tensors
from kvcast.serving.options import CacheOptions
from kvcast.serving.packing import strip_padding
from kvcast.serving.resident_ranker import User
from kvcast.serving.user_kv import KVArrays
from tests.support import TOLERANCE, draw_request, draw_rows, make_config

CONFIG = load_config("tiny")
SCHEMA = CONFIG.schema
LONGEST = 60
USERS = 6
# Budgets in entries of the longest user: off, too small for one, room for one, for some, for all.
BUDGETS = (0, 0.02, 1, 2.5, 1000)
ROWS_PER_RUN = ("COLD_ROWS_PER_CPU_RUN", "WARM_ROWS_PER_CPU_RUN")
Run = Callable[..., Tensors]


@pytest.fixture(scope="module")
def models(tiny_repository: Path) -> dict[str, Any]:
    folders = {kind: tiny_repository / kind.spec.name / "1" for kind in (UserEncoder, DocFusion, FullRanker)}
    return {kind.__name__: kind.open(folder, SessionOptions()) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def artefact(tiny_repository: Path) -> Artefact:
    return open_artefact(tiny_repository / RANKER_RESIDENT.name / "1", RANKER_RESIDENT.name, SessionOptions())


def make_ranker(artefact: Artefact, entries: float = 1000) -> ResidentRanker:
    """Return a ranker with an empty cache for so many users of the longest history."""
    # Beside its KV, an entry holds its history and some bookkeeping.
    entry = artefact.manifest.user_kv.bytes_of(LONGEST) + 4096
    return ResidentRanker(artefact, CacheOptions(int(entries * entry)))


def draw_user(length: int, count: int, seed: int) -> User:
    """Return a random user, some events padding."""
    history, candidates = draw_request(CONFIG, length, count, seed)
    return User(strip_padding(history), candidates)


def fuse(models: dict[str, Any], user_kv: KVArrays, candidates: Ids) -> Floats:
    return models["DocFusion"].score([FusionJob(user_kv, candidates[None])])[0][0]


def expect_right(models: dict[str, Any], user: User, scores: Floats) -> None:
    """Expect the scores of both other ways."""
    if not len(user.candidates):
        assert scores.shape == (0,)
        return
    full = models["FullRanker"].score(user.history, user.candidates)
    np.testing.assert_allclose(scores, full, rtol=0, atol=TOLERANCE)
    fused = fuse(models, models["UserEncoder"].encode([user.history])[0], user.candidates)
    np.testing.assert_allclose(scores, fused, rtol=0, atol=TOLERANCE)


def expect_all_right(models: dict[str, Any], ranker: ResidentRanker, users: list[User], *caches: CacheResult) -> None:
    """Rank, and expect right scores and where each user's KV came from."""
    scored = ranker.rank(users)
    ranker.cache.check()
    for user, (scores, _) in zip(users, scored, strict=True):
        expect_right(models, user, scores)
    assert [report.cache for _, report in scored] == list(caches)


HIT, MISS, OFF = CacheResult.HIT, CacheResult.MISS, CacheResult.OFF


def make_request(users: Sequence[User], padding: int, generator: np.random.Generator) -> Request:
    """Return a request of several users with the same number of candidates, padding anywhere in their histories."""
    length = max(len(user.history) for user in users) + padding
    histories = []
    for user in users:
        places = generator.integers(0, len(user.history) + 1, length - len(user.history))
        histories.append(np.insert(user.history, places, 0, axis=0))
    tensors = {"history": np.stack(histories), "candidates": np.stack([user.candidates for user in users])}
    parameters = {"kvcast_report": True, "kvcast_prefetch": not len(users[0].candidates)}
    return Request(tensors, [tensor.name for tensor in RANKER_RESIDENT.outputs], parameters)


def serve(ranker: ResidentRanker, requests: list[Request]) -> list[Tensors]:
    """Answer requests that wait together; unlike `Backlog`, without a second attempt for a group that fails."""
    jobs = [ranker.check(request) for request in requests]
    replies: dict[int, Tensors] = {}
    for group in ranker.plan(jobs):
        replies |= dict(zip(group, ranker.run([jobs[place] for place in group]), strict=True))
        ranker.cache.check()
    return [replies[place] for place in range(len(requests))]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, LONGEST), min_size=USERS, max_size=USERS),
    batches=st.lists(
        # Requests of one to three users: who, how many candidates each (0: a prefetch), how much padding.
        st.lists(
            st.tuples(
                st.lists(st.integers(0, USERS - 1), min_size=1, max_size=3),
                st.one_of(st.just(0), st.integers(1, 12)),
                st.integers(0, 4),
            ),
            min_size=1,
            max_size=5,
        ),
        min_size=1,
        max_size=3,
    ),
    entries=st.sampled_from(BUDGETS),
    seed=st.integers(0, 2**32 - 1),
)
def test_ragged_batches_of_hot_and_cold_users_get_the_scores_of_the_other_ways(
    models, artefact, lengths, batches, entries, seed
):
    """Few users and several batches, so that users return, twice in a batch too."""
    generator = np.random.default_rng(seed)
    histories = [strip_padding(draw_rows(SCHEMA.history_fields, (length,), generator)) for length in lengths]
    ranker = make_ranker(artefact, entries)
    misses, asked = 0, set()
    for batch in batches:
        jobs = [
            [User(histories[who], draw_rows(SCHEMA.candidate_fields, (count,), generator)) for who in whose]
            for whose, count, _ in batch
        ]
        requests = [make_request(users, padding, generator) for users, (_, _, padding) in zip(jobs, batch, strict=True)]
        for users, reply in zip(jobs, serve(ranker, requests), strict=True):
            reports = [Report.merge(text.decode()) for text in reply["encode_report"][:, 0]]
            for user, scores, report in zip(users, reply["scores"], reports, strict=True):
                expect_right(models, user, scores)
                is_worth_it = len(user.candidates) or ranker.cache.fits(user.history)
                assert (report.cache is OFF) == (entries == 0 or not is_worth_it)
                misses += report.cache is MISS
                asked |= {user.history.tobytes()}
    if entries == max(BUDGETS):
        assert misses == ranker.cache.counts.misses == ranker.cache.entries == len(asked), "each history once"
    assert ranker.cache.bytes_held <= ranker.cache.budget_bytes


@pytest.mark.parametrize("entries", BUDGETS)
def test_whatever_the_budget_the_same_users_again_get_the_same_scores(models, artefact, entries):
    ranker = make_ranker(artefact, entries)
    users = [draw_user(length, 1 + length % 5, length) for length in (60, 59, 58, 0, 1, 57)]
    first = ranker.rank(users)
    for _ in range(3):
        for user, before, again in zip(users, first, ranker.rank(users), strict=True):
            expect_right(models, user, again.scores)
            np.testing.assert_allclose(before.scores, again.scores, rtol=0, atol=TOLERANCE)
            assert again.report.cache is not OFF or entries == 0
    ranker.cache.check()


def test_a_user_who_gives_way_within_a_batch_is_still_scored_with_the_own_kv(models, artefact):
    """Room for one: new users take it while the cached user's KV is still to be read."""
    ranker = make_ranker(artefact, 1)
    hot, *cold = (draw_user(LONGEST, 5, seed) for seed in range(4))
    expect_all_right(models, ranker, [hot], MISS)
    expect_all_right(models, ranker, [hot, *cold], HIT, MISS, MISS, MISS)
    # Now the memory that is free again held another user's KV.
    for user in (*cold, hot):
        expect_right(models, user, ranker.rank([user])[0].scores)


def test_a_prefetch_scores_nothing_and_the_rank_after_it_is_warm(models, artefact):
    ranker = make_ranker(artefact)
    users = [draw_user(length, 4, length) for length in (0, 20, 60)]
    prefetches = [User(user.history, user.candidates[:0]) for user in users]
    expect_all_right(models, ranker, prefetches, MISS, MISS, MISS)
    expect_all_right(models, ranker, users, HIT, HIT, HIT)
    expect_all_right(models, ranker, prefetches, HIT, HIT, HIT)


@pytest.mark.parametrize("entries", [0, 0.02])
def test_a_prefetch_that_cannot_be_kept_runs_nothing(models, artefact, entries):
    ranker = make_ranker(artefact, entries)
    expect_all_right(models, ranker, [draw_user(40, 0, 1)], OFF)
    assert not ranker.stopwatch.encode
    assert not ranker.stopwatch.fuse


def test_candidates_in_a_prefetch_and_none_without_one_are_refused(artefact):
    ranker = make_ranker(artefact)
    tensors = {"history": np.ones((1, 5, 2), np.int64), "candidates": np.ones((1, 3, 4), np.int64)}
    with pytest.raises(InvalidRequestError, match="N = 0 candidates for a prefetch, got 3"):
        ranker.check(Request(tensors, ["scores"], {"kvcast_prefetch": True}))
    with pytest.raises(InvalidRequestError, match="N = 1 to 64 candidates, got 0"):
        ranker.check(Request({**tensors, "candidates": tensors["candidates"][:, :0]}, ["scores"]))


def test_packed_runs_equal_single_runs(models, artefact, monkeypatch):
    """Whatever the packing policy, scores agree, cold and warm: everything in one run, and nothing."""
    users = [draw_user(length, count, length) for length, count in ((30, 4), (3, 9), (17, 1), (0, 5), (44, 0))]
    results = []
    for bound, runs in ((0, 5), (1 << 20, 1)):
        for name in ROWS_PER_RUN:
            monkeypatch.setattr(f"kvcast.serving.resident_ranker.{name}", bound)
        ranker = make_ranker(artefact)
        results.append([*ranker.rank(users), *ranker.rank(users)])
        assert len(ranker.stopwatch.encode) == runs
        assert len(ranker.stopwatch.fuse) == min(runs, 4), "nothing is fused for a user without candidates"
        ranker.cache.check()
    for user, alone, packed in zip(users * 2, *results, strict=True):
        expect_right(models, user, alone.scores)
        np.testing.assert_allclose(alone.scores, packed.scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bound", [0, 1 << 20], ids=["single runs", "packed runs"])
def test_what_a_cold_run_keeps_is_what_the_encoder_makes(models, artefact, monkeypatch, bound):
    monkeypatch.setattr("kvcast.serving.resident_ranker.COLD_ROWS_PER_CPU_RUN", bound)
    ranker, layout = make_ranker(artefact), artefact.manifest.user_kv
    users = [draw_user(length, count, length) for length, count in ((0, 3), (9, 4), (31, 0), (60, 7))]
    ranker.rank(users)
    histories = [user.history for user in users]
    kept = ranker.cache.fetch(histories, lambda *_: [])
    for user, (arrays, cache), encoded in zip(users, kept, models["UserEncoder"].encode(histories), strict=True):
        assert cache is HIT
        layers = len(arrays) // 2
        user_kv = KVArrays(np.stack(arrays[:layers], axis=1), np.stack(arrays[layers:], axis=1))
        assert user_kv.keys.shape == encoded.keys.shape
        assert user_kv.values.shape == encoded.values.shape
        # A slot of padding, which an empty history has, may hold anything beside its mask.
        mask = encoded.keys[0, 0, 0, layout.mask_row]
        np.testing.assert_array_equal(user_kv.keys[..., layout.mask_row, :], encoded.keys[..., layout.mask_row, :])
        slots = np.flatnonzero(mask != layout.mask_value)
        for own, other in (
            (user_kv.keys[..., slots], encoded.keys[..., slots]),
            (user_kv.values[..., slots, :], encoded.values[..., slots, :]),
        ):
            np.testing.assert_allclose(own, other, rtol=0, atol=TOLERANCE)
        candidates = draw_rows(SCHEMA.candidate_fields, (6,), np.random.default_rng(0))
        expect_right(models, User(user.history, candidates), fuse(models, user_kv, candidates))


def damage_run(monkeypatch: pytest.MonkeyPatch, damage: Callable[[int, Tensors, Tensors], None]) -> None:
    """Let `damage` look at the number, inputs and outputs of each run from now on; it may change them, or raise."""
    run: Run = Artefact.run
    runs = iter(range(1000))

    def run_and_damage(
        self: Artefact, outputs: Sequence[str], feeds: Mapping[str, Any], into: Mapping[str, Any] | None = None
    ) -> Tensors:
        made = run(self, outputs, feeds, into)
        made["scores"] = made["scores"].copy()
        damage(next(runs), dict(feeds), made)
        return made

    monkeypatch.setattr(Artefact, "run", run_and_damage)


def raise_at(place: int) -> Callable[[int, Tensors, Tensors], None]:
    def damage(number: int, feeds: Tensors, made: Tensors) -> None:
        if number == place:
            for array in made.values():  # what was written so far is not worth keeping
                array.fill(np.nan)
            raise RuntimeError("out of memory")

    return damage


def spoil_scores_at(place: int) -> Callable[[int, Tensors, Tensors], None]:
    def damage(number: int, feeds: Tensors, made: Tensors) -> None:
        if number == place:
            made["scores"][..., -1] = np.nan

    return damage


FAILURES = {"raises": (raise_at, RuntimeError), "returns NaN": (spoil_scores_at, ServerFaultError)}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("place", range(3))
def test_a_call_whose_session_fails_half_way_keeps_nothing_new(models, artefact, monkeypatch, failure, place):
    monkeypatch.setattr("kvcast.serving.resident_ranker.COLD_ROWS_PER_CPU_RUN", 0)  # each user in a run alone
    ranker = make_ranker(artefact, 4)
    hot, *cold = (draw_user(LONGEST, 3, seed) for seed in range(4))
    expect_all_right(models, ranker, [hot], MISS)
    make_damage, kind = FAILURES[failure]
    with monkeypatch.context() as during:
        damage_run(during, make_damage(place))
        with pytest.raises(kind):
            ranker.rank([hot, *cold])
    ranker.cache.check()
    assert ranker.cache.entries == 1
    assert ranker.cache.counts.failed == 3
    assert not any(ranker.cache.holds(user.history) for user in cold)
    # Nor does it hold on to memory: there is room for all four.
    expect_all_right(models, ranker, [hot, *cold], HIT, MISS, MISS, MISS)
    expect_all_right(models, ranker, [hot, *cold], HIT, HIT, HIT, HIT)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_warm_run_that_fails_loses_nobody(models, artefact, monkeypatch, failure):
    ranker = make_ranker(artefact)
    user = draw_user(33, 6, 1)
    expect_all_right(models, ranker, [user], MISS)
    make_damage, kind = FAILURES[failure]
    with monkeypatch.context() as during:
        # What is kept is an input here, which a failing run leaves alone.
        damage_run(during, make_damage(0))
        with pytest.raises(kind):
            ranker.rank([user])
    expect_all_right(models, ranker, [user], HIT)


@pytest.mark.parametrize("entries", [0, 1, 1000])
def test_in_a_batch_only_the_user_at_fault_fails(models, artefact, monkeypatch, entries):
    ranker = make_ranker(artefact, entries)
    users = [draw_user(LONGEST, 4, seed) for seed in range(5)]
    bad = users[2]
    requests = [make_request([user], 2, np.random.default_rng(0)) for user in users]
    event = bad.history[10]

    def damage(number: int, feeds: Tensors, made: Tensors) -> None:
        if (feeds["history"] == event).all(axis=-1).any():
            made["scores"][:] = np.nan

    log: list[str] = []
    with monkeypatch.context() as during:
        damage_run(during, damage)
        backlog: Backlog[Any, int] = Backlog(ranker, log.append)
        for place, request in enumerate(requests):
            assert backlog.add(place, partial(lambda each: each, request)) is None
        replies: dict[int, Any] = {}
        while len(backlog):
            replies |= backlog.step()
    assert isinstance(replies.pop(2), ServerFaultError)
    assert sorted(replies) == [0, 1, 3, 4]
    for place, reply in replies.items():
        expect_right(models, users[place], reply["scores"][0])
    ranker.cache.check()
    assert not ranker.cache.holds(bad.history)
    # Room for one may have been made for the user who failed.
    assert ranker.cache.entries in {0: {0}, 1: {0, 1}, 1000: {4}}[entries]
    expect_right(models, bad, ranker.rank([bad])[0].scores)


@settings(max_examples=40, deadline=None)
@given(
    jobs=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), max_size=8),
    kept=st.sets(st.integers(0, 7)),
    manifests=st.integers(0, 2),
)
def test_kept_users_come_first_in_the_plan_and_every_job_once(artefact, jobs, kept, manifests):
    ranker = make_ranker(artefact)
    users = [draw_user(7 * who + 1, 1 + who, who) for who in range(8)]
    ranker.rank([users[who] for who in sorted(kept)])
    before = (vars(ranker.cache.counts).copy(), ranker.cache.entries)
    generator = np.random.default_rng(0)
    # The users of one request have the same number of candidates.
    requests = [
        make_request([User(users[who].history, users[0].candidates) for who in whose], 0, generator) for whose in jobs
    ]
    requests += [Request({}, ["manifest"])] * manifests
    plan = ranker.plan([ranker.check(request) for request in requests])
    in_order = [place for group in plan for place in group]
    assert sorted(in_order) == list(range(len(requests)))
    is_quick = [place >= len(jobs) or kept.issuperset(jobs[place]) for place in in_order]
    assert is_quick == sorted(is_quick, reverse=True)
    assert all(len({is_quick[in_order.index(place)] for place in group}) == 1 for group in plan if group)
    assert (vars(ranker.cache.counts), ranker.cache.entries) == before, "asking is not using"


class RanksInTwoCalls(Transformer):
    """A family that leaves `rank` as the interface has it."""

    rank = RankingNetwork.rank


@torch.inference_mode()
def test_one_call_after_the_other_is_proved_too():
    """What a new family gets for nothing; `tests/e2e/test_user_kv_cache.py` exports and serves it."""
    config = make_config(layers=2)
    network = RanksInTwoCalls(config).eval().requires_grad_(False)
    draw_weights(network, 0)
    for length, count, seed in ((20, 5, 1), (3, 2, 2)):
        sample = draw_sample(config.schema, length, count, seed)
        assert 0 <= prove(TorchCalls(network), sample, network.kv_layout) <= TOLERANCE


def test_the_number_of_threads_changes_no_bit_of_a_score(tiny_repository):
    folder = tiny_repository / RANKER_RESIDENT.name / "1"
    rankers = [ResidentRanker.open(folder, SessionOptions(threads=n), CacheOptions(10**8)) for n in (1, 2, 3)]
    users = [draw_user(length, count, seed) for seed, (length, count) in enumerate([(0, 3), (7, 1), (33, 40), (60, 9)])]
    for cache in (MISS, HIT):
        alone, *others = [ranker.rank(users) for ranker in rankers]
        assert {report.cache for _, report in alone} == {cache}
        for scored in others:
            for (scores, _), (expected, _) in zip(scored, alone, strict=True):
                np.testing.assert_array_equal(scores, expected)
