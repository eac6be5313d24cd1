"""The click-log generator: the same for a seed, within its vocabularies, and shaped like a shop."""

from itertools import islice

import numpy as np
import pytest

from kvcast.protocol.config import load_config
from kvcast.synthetic import ClickLog, Trace, Traffic, Visit
from tests.support import make_config

CONFIG = load_config("bench")


@pytest.fixture(scope="module")
def log() -> ClickLog:
    return ClickLog(CONFIG.schema, seed=1)


def test_the_seed_decides_everything(log):
    first, second = (ClickLog(CONFIG.schema, seed=9).draw_request(30, 5) for _ in range(2))
    np.testing.assert_array_equal(first.history, second.history)
    np.testing.assert_array_equal(first.candidates, second.candidates)
    assert not np.array_equal(first.history, ClickLog(CONFIG.schema, seed=10).draw_request(30, 5).history)


@pytest.mark.parametrize("name", ["demo", "tiny", "bench", "seed", "hstu"])
def test_ids_are_known_and_within_their_vocabularies(name):
    schema = load_config(name).schema
    log = ClickLog(schema, seed=2)
    for ids, fields in (
        (log.draw_history(500), schema.history_fields),
        (log.draw_candidates(60), schema.candidate_fields),
    ):
        sizes = np.array([field.vocab_size for field in fields])
        assert (ids >= 1).all()
        assert (ids < sizes).all()


def test_any_schema_can_be_filled():
    schema = make_config(history_fields=3, candidate_fields=2).schema
    request = ClickLog(schema, seed=0).draw_request(7, 3)
    assert request.history.shape == (7, 3)
    assert request.candidates.shape == (3, 2)


def test_candidates_are_different_items_while_there_are_enough(log):
    candidates = log.draw_candidates(1000)
    assert len(np.unique(candidates[:, 0])) == 1000


def test_attributes_belong_to_their_item(log):
    seen: dict[int, list[int]] = {}
    for row in np.concatenate([log.draw_candidates(500) for _ in range(4)]):
        assert seen.setdefault(int(row[0]), row.tolist()) == row.tolist()


def test_popularity_is_uneven_and_users_have_tastes(log):
    items = np.concatenate([log.draw_history(400)[:, 0] for _ in range(20)])
    _, counts = np.unique(items, return_counts=True)
    top_share = np.sort(counts)[::-1][: len(counts) // 10].sum() / counts.sum()
    assert top_share > 0.3, "a tenth of the items gets far more than a tenth of the events"
    categories = log._attributes["category"]
    own = [len(np.unique(categories[log.draw_history(300)[:, 0]])) for _ in range(10)]
    assert max(own) <= 4, "a user stays within a few categories"


def test_actions_form_a_funnel(log):
    actions = np.concatenate([log.draw_history(1000)[:, 1] for _ in range(5)])
    views, clicks, carts, buys = (int((actions == action).sum()) for action in (1, 2, 3, 4))
    assert views > clicks > carts > buys > 0


def draw_visits(count: int, seed: int = 4, **changes: float) -> list[Visit]:
    traffic = Traffic(history=30, candidates=5, shortest=10, users=50, **changes)
    return list(islice(Trace(ClickLog(CONFIG.schema, seed=seed), traffic, seed=seed), count))


def test_a_trace_is_the_same_for_the_same_seed():
    for first, second in zip(draw_visits(60), draw_visits(60), strict=True):
        assert first.user == second.user
        np.testing.assert_array_equal(first.request.history, second.request.history)
        np.testing.assert_array_equal(first.request.candidates, second.request.candidates)
    assert [visit.user for visit in draw_visits(60)] != [visit.user for visit in draw_visits(60, seed=5)]


def test_returning_users_have_the_same_or_a_grown_history():
    latest: dict[int, np.ndarray] = {}
    unchanged = grown = 0
    for user, request in draw_visits(400):
        history = request.history
        assert 10 <= len(history) <= 30
        assert request.candidates.shape == (5, 4)
        if user in latest:
            before = latest[user]
            if np.array_equal(before, history):
                unchanged += 1
            else:
                grown += 1
                # What was there is still there, oldest events apart, and something new stands at the end.
                kept = next(
                    length for length in range(len(before), -1, -1) if any(
                        np.array_equal(before[len(before) - length :], history[start : start + length])
                        for start in range(len(history) - length)
                    )
                )  # fmt: skip
                assert kept > 0
        latest[user] = history
    assert unchanged > 100
    assert grown > 50


def test_without_page_views_histories_always_change():
    seen: set[bytes] = set()
    for _, request in draw_visits(200, return_probability=0.0):
        content = request.history.tobytes()
        assert content not in seen
        seen.add(content)
