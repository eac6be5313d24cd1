"""Logs with known truth: labels follow the probabilities, which follow the history; nothing else ranks as well."""

import re
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import roc_auc_score

from kvcast.protocol.config import load_config
from kvcast.protocol.log import log_fields
from kvcast.protocol.schema import FeatureSchema, Field, Limits
from kvcast.synthetic.__main__ import main
from kvcast.synthetic.shop import CATEGORY_NAMES, Shop
from kvcast.synthetic.truth import (
    ACTION_WEIGHTS,
    DAY,
    RECENCY_DECAY,
    START,
    Effects,
    Habits,
    PlantedLog,
    compute_best_auc,
)
from kvcast.synthetic.visitor import ACTIONS, MARK, describe_ranking, describe_visitor, draw_visitor, measure_auc
from kvcast.train.log import Log, read_log
from kvcast.train.requests import Requests

TINY = load_config("tiny")
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
visit = PlantedLog._visit


class Drawn:
    """A log of 300 users, its requests, and a column a candidate in the order of the requests."""

    def __init__(self) -> None:
        self.shop = Shop(TINY.schema)
        self.planted = PlantedLog(self.shop, Habits(users=300, days=30), seed=1)
        self.columns, self.truth = self.planted.draw_rows()
        users = tuple(str(user) for user in range(1, 301))
        ids = {field.name: self.columns[field.name] for field in log_fields(TINY.schema)}
        log = Log(users, self.columns["user"] - 1, self.columns["time"], ids, self.columns["label"])
        self.requests = Requests(log, TINY.schema, Limits(history=10**6, candidates=100))
        self.rows = np.concatenate([self.requests.rows(index) for index in range(len(self.requests))])
        self.label = self.columns["label"][self.rows]


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn()


def measure(drawn: Drawn, scores: Floats) -> float:
    return float(roc_auc_score(drawn.label, scores))


def score_history(drawn: Drawn, recent: bool) -> Floats:
    """Score as a reader of histories can: shares of the candidate's category among the events, all and recent ones."""
    scores = []
    for request in drawn.requests:
        category = drawn.shop.category[request.history[:, 0]]
        same = category[None, :] == drawn.shop.category[request.candidates[:, 0]][:, None]  # [N, L]
        score = 2 * np.minimum(1.3, 4 * same.sum(axis=1) / max(1, len(category)))
        if recent:
            age = np.arange(len(category))[::-1]
            score += 2.5 * same @ ((1 - RECENCY_DECAY) * RECENCY_DECAY**age * ACTION_WEIGHTS[request.history[:, 1]])
        scores.append(score + 0.7 * drawn.shop.quality[request.candidates[:, 0]])
    return np.concatenate(scores)


def test_labels_follow_the_recorded_probabilities(drawn):
    truth, label = drawn.truth, drawn.columns["label"]
    assert np.all((truth > 0) & (truth < 1))
    for low in np.arange(0, 1, 0.1):
        here = (truth >= low) & (truth < low + 0.1)
        error = np.sqrt((truth[here] * (1 - truth[here])).sum()) / here.sum()
        assert abs(label[here].mean() - truth[here].mean()) < 4 * error
    assert abs(compute_best_auc(truth) - roc_auc_score(label, truth)) < 0.005


def test_the_best_auc_is_that_of_all_pairs():
    truth = np.array([0.1, 0.4, 0.4, 0.9])
    pairs = [(one * (1 - other), (one > other) + (one == other) / 2) for one in truth for other in truth]
    expected = sum(weight * win for weight, win in pairs) / sum(weight for weight, _ in pairs)
    assert compute_best_auc(truth) == pytest.approx(expected)


def test_the_signal_is_in_comparing_the_history_with_the_candidate(drawn):
    items = drawn.columns["item"][drawn.rows]
    half = len(items) // 2  # requests are in order of time: popularity is that of the past
    clicks = np.bincount(items[:half], drawn.label[:half], minlength=drawn.shop.items + 1)
    popularity = float(roc_auc_score(drawn.label[half:], clicks[items[half:]]))
    quality = measure(drawn, drawn.shop.quality[items])
    history = measure(drawn, score_history(drawn, recent=False))
    recent = measure(drawn, score_history(drawn, recent=True))
    bound = measure(drawn, drawn.truth[drawn.rows])
    assert 0.52 < popularity < quality < 0.7
    assert quality + 0.1 < history
    assert history + 0.01 < recent < bound
    assert 0.83 < bound < 0.9
    # The length of the history alone predicts next to nothing.
    activity = measure(drawn, np.repeat(drawn.requests.history_lengths, drawn.requests.candidate_counts).astype(float))
    assert abs(activity - 0.5) < 0.1


def compute_documented_truth(drawn: Drawn, user: int, time: int | None, history: Ids, items: Ids) -> Floats:
    """Return the probability of a click on each item after these events (item, action), by docs/click-logs.md."""
    effects, shop = Effects(), drawn.shop
    recency = np.zeros(shop.categories + 1)
    for item, action in history:
        recency *= RECENCY_DECAY
        recency[shop.category[item]] += (1 - RECENCY_DECAY) * ACTION_WEIGHTS[action]
    likes = np.isin(shop.category[items], drawn.planted.list_tastes(user, time))
    logit = effects.base + effects.taste * likes + effects.recency * recency[shop.category[items]]
    logit += effects.quality * shop.quality[items]
    logit -= effects.price * np.abs(shop.price[items] - drawn.planted.price_level[user - 1])
    return 1 / (1 + np.exp(-logit))


def test_the_probability_is_the_documented_function_of_the_history(drawn):
    for index in range(0, len(drawn.requests), 97):
        request = drawn.requests[index]
        items = request.candidates[:, 0]
        expected = compute_documented_truth(drawn, int(request.user), request.time, request.history, items)
        assert np.allclose(expected, drawn.truth[drawn.requests.rows(index)])


def test_one_more_visit_has_the_whole_history(drawn):
    for user in (1, 150):
        visitor = draw_visitor(drawn.planted, user, events=10**6, shown=40)
        history = [tuple(row) for row in visitor.request.history]
        columns = zip(*(drawn.columns[name].tolist() for name in ("user", "item", "action")), strict=True)
        assert history == [(item, action) for who, item, action in columns if who == user and action > 0]
        assert [*zip(visitor.events, visitor.actions, strict=True)] == history
        items = visitor.request.candidates[:, 0]
        assert len(set(items)) == 40
        for column, name in enumerate(("item", "category", "brand", "price_bucket")):
            assert np.array_equal(visitor.request.candidates[:, column], drawn.shop.attributes[name][visitor.items])
        assert np.allclose(visitor.truth, compute_documented_truth(drawn, user, None, visitor.request.history, items))
        assert visitor.tastes == drawn.planted.list_tastes(user)
        last = draw_visitor(drawn.planted, user, events=5, shown=40)
        assert np.array_equal(last.request.history, visitor.request.history[-5:])
        assert np.array_equal(last.request.candidates, visitor.request.candidates)
    assert draw_visitor(drawn.planted, 1, events=0, shown=3).request.history.shape == (0, 2)


def test_one_more_visit_shows_items_like_those_of_the_log(drawn):
    log = PlantedLog(drawn.shop, Habits(users=60, days=3))
    visitors = [draw_visitor(log, user, events=30, shown=12) for user in range(1, 61)]
    liked = np.array([[visitor.likes(item) for item in visitor.items] for visitor in visitors])
    assert 0.5 < liked.mean() < 0.67  # half, and four in 24 of the rest
    truth, clicked = (np.concatenate(each) for each in zip(*((v.truth, v.outcomes > 0) for v in visitors), strict=True))
    assert abs(clicked.mean() - truth.mean()) < 4 * np.sqrt((truth * (1 - truth)).sum()) / len(truth)


def test_a_ranking_is_described(drawn):
    visitor = draw_visitor(drawn.planted, 2, events=20, shown=40)
    who = describe_visitor(visitor).splitlines()
    assert f"  likes     {', '.join(drawn.shop.name_category(each) for each in visitor.tastes)}" in who
    assert who[6].strip().startswith(ACTIONS[int(visitor.actions[-1])]), "the latest event comes first"
    scores = np.random.default_rng(0).normal(size=40)
    said = describe_ranking(visitor, scores).splitlines()
    assert max(map(len, who + said)) <= 100
    rows = [line for line in said if re.match(r" +\d+ ", line)]
    assert [int(row.split()[0]) for row in rows] == [*range(1, 11), 38, 39, 40]
    for row, index in zip(rows, np.argsort(-scores)[[*range(10), 37, 38, 39]], strict=True):
        item = int(visitor.items[index])
        assert row.split()[2:4] == [str(item), drawn.shop.name_brand(int(drawn.shop.brand[item]))]
        assert drawn.shop.name_category(int(drawn.shop.category[item])) in row
        assert (MARK in row) == (drawn.shop.category[item] in visitor.tastes)
        assert row.endswith(ACTIONS[int(visitor.outcomes[index])])
    labels = visitor.outcomes > 0
    assert f"AUC {roc_auc_score(labels, scores):.2f}" in said[-1]
    assert f"true probabilities {roc_auc_score(labels, visitor.truth):.2f}" in said[-1]
    assert f"{sum(MARK in row for row in rows[:10])} of the top 10, " in said[-3]
    few = describe_ranking(draw_visitor(drawn.planted, 2, events=20, shown=11), np.zeros(11))
    assert "…" not in few
    assert "\n  11 " in few


def test_a_tie_counts_half_in_the_auc():
    labels, scores = np.array([True, False, True, False, False]), np.array([1.0, 1.0, 0.5, 0.2, 0.7])
    assert measure_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))


@pytest.mark.parametrize("user", [0, 301])
def test_an_unknown_user_is_rejected(drawn, user):
    with pytest.raises(ValueError, match=f"user: expected 1 to 300, got {user}"):
        draw_visitor(drawn.planted, user, events=10, shown=5)
    nameless = FeatureSchema((Field("item", 64), Field("mood", 64)), (Field("item", 64),))
    with pytest.raises(ValueError, match="expected the fields item and action"):
        draw_visitor(PlantedLog(Shop(nameless), Habits(users=3, days=1)), 1, events=10, shown=5)


def test_an_effect_can_be_switched_off(drawn):
    habits = Habits(users=100, days=10)
    none = PlantedLog(drawn.shop, habits, 0, Effects(taste=0, recency=0, quality=0, price=0)).draw_rows()
    assert np.ptp(none.truth) == 0
    weaker = PlantedLog(drawn.shop, habits, 0, Effects(recency=0)).draw_rows()
    assert compute_best_auc(weaker.truth) < compute_best_auc(PlantedLog(drawn.shop, habits).draw_rows().truth)


def test_the_preferences_of_some_users_change(drawn):
    end = START + 30 * DAY
    drifted = [
        user for user in range(1, 301) if drawn.planted.list_tastes(user, START) != drawn.planted.list_tastes(user, end)
    ]
    assert 80 < len(drifted) < 160
    assert all(len(set(drawn.planted.list_tastes(user))) == 4 for user in range(1, 301))


def test_the_seed_decides_the_users_and_the_shops_seed_the_items(drawn):
    habits = Habits(users=20, days=5)
    again, other = (PlantedLog(Shop(TINY.schema), habits, seed).draw_rows() for seed in (7, 8))
    same = PlantedLog(drawn.shop, habits, 7).draw_rows()
    assert all(np.array_equal(again.columns[name], same.columns[name]) for name in again.columns)
    assert np.array_equal(again.truth, same.truth)
    assert not np.array_equal(again.columns["item"][:200], other.columns["item"][:200])
    assert not np.array_equal(Shop(TINY.schema, seed=1).quality, drawn.shop.quality)
    # Items keep their attributes from log to log.
    for rows in (again, other):
        assert np.array_equal(rows.columns["category"], drawn.shop.category[rows.columns["item"]])


def test_a_visit_shows_different_items_at_a_time_of_its_own(drawn):
    keys = np.stack([drawn.columns["user"], drawn.columns["time"]], axis=1)
    _, counts = np.unique(keys, axis=0, return_counts=True)
    assert np.all(counts == 12)
    assert all(len(set(request.candidates[:, 0])) == 12 for request in drawn.requests)
    assert np.all(np.diff(drawn.columns["time"]) >= 0)
    few = PlantedLog(Shop(TINY.schema, items=5), Habits(users=3, days=3, shown=12)).draw_rows()
    assert set(few.columns["item"]) == {1, 2, 3, 4, 5}


def test_tiny_shops_and_short_periods_give_valid_logs(drawn):
    for items, categories in ((1, 1), (3, 30), (10**9, 10**9)):
        shop = Shop(TINY.schema, items=items, categories=categories)
        rows = PlantedLog(shop, Habits(users=4, days=1e-6)).draw_rows()
        assert set(rows.columns["item"]) <= set(range(1, shop.items + 1))
        assert len(rows.truth) == 4 * 2 * min(12, shop.items)


def test_ids_fit_any_schema():
    fields = (Field("item", 64), Field("colour", 64))
    schema = FeatureSchema(history_fields=(Field("item", 64), Field("mood", 64)), candidate_fields=fields)
    rows = PlantedLog(Shop(schema), Habits(users=20, days=5)).draw_rows()
    assert list(rows.columns) == ["user", "time", "item", "colour", "mood", "label"]
    assert all(
        ids.min() >= 0 and ids.max() < 64 for name, ids in rows.columns.items() if name in ("item", "colour", "mood")
    )
    assert np.array_equal(rows.columns["mood"] > 0, rows.columns["label"] == 1)


def test_items_categories_and_brands_have_names(drawn):
    names = {drawn.shop.name_item(item) for item in range(1, drawn.shop.items + 1)}
    assert len(names) == drawn.shop.items
    item = 17
    category = CATEGORY_NAMES[drawn.shop.category[item] - 1]
    assert drawn.shop.name_item(item) == f"Item 17: {category}, {drawn.shop.name_brand(int(drawn.shop.brand[item]))}"
    assert len({drawn.shop.name_brand(brand) for brand in range(4096)}) == 4096
    assert len(set(CATEGORY_NAMES)) == len(CATEGORY_NAMES) == 48
    assert drawn.shop.name_category(60) == "category 60"


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_the_command_writes_a_log_that_is_read(tmp_path, capsys, name):
    options = ["--config", "tiny", "--users", "30", "--days", "5", "--seed", "3"]
    assert main([*options, "--log", str(tmp_path / name)]) == 0
    assert "rows of 30 users" in capsys.readouterr().out
    log = read_log(tmp_path / name, TINY.schema)
    expected = PlantedLog(Shop(TINY.schema), Habits(users=30, days=5), seed=3).draw_rows()
    assert np.array_equal(log.ids["item"], expected.columns["item"])
    assert main([*options, "--log", str(tmp_path / name), "--with-truth"]) == 0
    assert np.allclose(read_log(tmp_path / name, TINY.schema, truth=True).truth, expected.truth)


@pytest.mark.parametrize("options", [["--log", "x.txt"], ["--users", "0"], ["--days", "nan"], ["--user", "2001"]])
def test_the_command_rejects_invalid_options(options):
    with pytest.raises(SystemExit):
        main(["--config", "tiny", *options])


def test_users_visit_together_so_that_a_million_rows_take_seconds(monkeypatch):
    """Python runs once for the first visits of all users, once for their second visits, and so on."""
    counts = []
    monkeypatch.setattr(PlantedLog, "_visit", lambda log, *given: counts.append(1) or visit(log, *given))
    rows = PlantedLog(Shop(TINY.schema), Habits(users=2800), seed=1).draw_rows()
    assert len(rows.truth) > 10**6
    assert len(counts) < 250


def test_a_request_is_printed_without_arrow():
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from kvcast.synthetic.__main__ import main; main(['--config', 'tiny'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert '"history"' in run.stdout
