"""The click-log generator: the same for a seed, within its vocabularies, and shaped like a shop."""

import numpy as np
import pytest

from kvcast.clicklog import ClickLog
from kvcast.contract.config import load_config
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


@pytest.mark.parametrize("name", ["tiny", "bench", "seed"])
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
