"""Click logs with known truth: every click is drawn with a recorded probability.

A user prefers a few categories and a price level; the preferences of a share of the users change at some time; recent
actions raise the probability for a while. The probability of a click is a sigmoid of these and of the item's quality
(`Effects`). Ranking by the true probability gives the highest possible AUC and NDCG: the upper bound. It uses
preferences that a model has to infer from the history, so even a perfect model stays a little below.

Preferences differ between users and are spread evenly over categories, so they can only be learnt by comparing a user's
history with the candidate.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvcast.protocol.log import LABEL, TIME, TRUTH, USER, event_fields
from kvcast.synthetic.shop import Shop

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

START = 1_700_000_000  # the time of the first day, seconds
HOUR, DAY = 3600, 86_400
NEVER = np.iinfo(np.int64).max
FAVOURITES = 4
DRIFTING_SHARE = 0.4  # of the users, whose favourites change at some time
RETRIEVED_SHARE = 0.5  # of what is shown, chosen from the user's favourites; the rest is of any category
# Of an event's weight, what is left after the next one; and what an action weighs. Ids: 2 click, 3 add to cart, 4 buy.
RECENCY_DECAY = 0.8
ACTION_WEIGHTS = np.array([0.0, 0.0, 1.0, 1.5, 2.0])
CART_PROBABILITY, BUY_PROBABILITY = 0.15, 0.07  # of a click, to become one


@dataclass(frozen=True)
class Effects:
    """What the log-odds of a click are made of; 0 switches an effect off.

    taste: between a favourite category and one that is not. recency: between a category that all of the last clicks
    were of, and one that none was of. quality: of one spread of an item's quality. price: between the user's price
    level and a price as far away as can be. base: of an item of no favourite category at the user's price level.
    """

    taste: float = 2.5
    recency: float = 2.5
    quality: float = 0.7
    price: float = 4.0
    base: float = -2.8


@dataclass(frozen=True)
class Habits:
    """The size of a log: users, days, mean visits a day, items shown in a visit."""

    users: int = 2000
    days: float = 30
    visits_a_day: float = 1.0
    shown: int = 12


class PlantedRows(NamedTuple):
    """Rows in order of time, as a log has them, and the probability that each label was drawn with."""

    columns: dict[str, npt.NDArray[Any]]
    truth: Floats

    def write(self, path: Path, *, with_truth: bool = False) -> None:
        """Write a CSV or else a Parquet file, by its name; `with_truth` adds the probabilities as a column."""
        import pyarrow.csv  # noqa: PLC0415 nothing else in this package needs it
        import pyarrow.parquet  # noqa: PLC0415

        table = pyarrow.table(self.columns | ({TRUTH: self.truth} if with_truth else {}))
        write = pyarrow.csv.write_csv if path.suffix == ".csv" else pyarrow.parquet.write_table
        write(table, path)


class PlantedLog:
    """Users of a shop and their clicks, the same for the same seed. `price_level`: 0 to 1 a user, user 1 at index 0."""

    def __init__(self, shop: Shop, habits: Habits = Habits(), seed: int = 0, effects: Effects = Effects()) -> None:
        """Draw the users; `draw_rows` draws their visits.

        Args:
            shop: the items.
            habits: how many users and visits.
            seed: of the users and their clicks; the shop has its own.
            effects: what the probability of a click depends on.
        """
        self.shop, self.habits, self.effects, self._seed = shop, habits, effects, seed
        draw = np.random.default_rng([seed, 1])
        users = habits.users
        self._favourites = np.stack(  # [2, users, FAVOURITES]: before and after the change
            [_draw_different(draw, users, FAVOURITES, shop.categories) for _ in range(2)]
        )
        span = int(habits.days * DAY)
        drifts = draw.random(users) < DRIFTING_SHARE
        self._changes = np.where(drifts, START + draw.integers(0, max(1, span), users), NEVER)
        self.price_level = draw.uniform(0.2, 0.8, users)
        self._visits = np.maximum(2, draw.poisson(habits.days * habits.visits_a_day * draw.lognormal(-0.1, 0.5, users)))
        self._span = max(span, 2 * int(self._visits.max()))

    def list_tastes(self, user: int, time: int | None = None) -> list[int]:
        """Return a user's favourite categories at a time, or at the end."""
        has_changed = (NEVER - 1 if time is None else time) >= self._changes[user - 1]
        return [int(category) for category in self._favourites[int(has_changed), user - 1]]

    def draw_rows(self) -> PlantedRows:
        """Draw all visits of all users; return the rows. Users are the integers from 1 on."""
        draw = np.random.default_rng([self._seed, 2])
        times = self._draw_times(draw)  # [users, most visits]
        recency = np.zeros((self.habits.users, self.shop.categories + 1))
        parts = []
        for visit in range(times.shape[1]):
            who = np.flatnonzero(self._visits > visit)
            parts.append(self._visit(draw, who, times[who, visit], recency, self.habits.shown))
        return self._tabulate(draw, parts)

    def draw_visit(self, rows: PlantedRows, user: int, shown: int) -> PlantedRows:
        """Draw one more visit of a user, an hour after the last of `rows`.

        Args:
            rows: the log, as `draw_rows` returns it; the shop's schema must have an item and an action.
            user: whose visit.
            shown: how many items are shown.
        """
        draw = np.random.default_rng([self._seed, 3, user])
        own = rows.columns[USER] == user
        category, action = self.shop.category[rows.columns["item"][own]], rows.columns["action"][own]
        who = np.array([user - 1])
        recency = np.zeros((self.habits.users, self.shop.categories + 1))
        recency[who] = _follow(recency[who], category[None], action[None])
        time = rows.columns[TIME].max(keepdims=True) + HOUR
        return self._tabulate(draw, [self._visit(draw, who, time, recency, shown)])

    def _tabulate(self, draw: np.random.Generator, parts: list[dict[str, npt.NDArray[Any]]]) -> PlantedRows:
        """Return visits as rows in order of time."""
        rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((rows[USER], rows[TIME]))  # stable: what is shown together stays as it was shown
        rows = {name: column[order] for name, column in rows.items()}
        truth = rows.pop("truth")
        items = rows.pop("items")
        columns = {USER: rows[USER], TIME: rows[TIME]}
        columns |= {name: attribute[items] for name, attribute in self.shop.attributes.items()}
        columns |= self._fill_events(draw, rows["actions"])
        return PlantedRows({**columns, LABEL: rows[LABEL]}, truth)

    def _draw_times(self, draw: np.random.Generator) -> Ids:
        """Return the time of each visit; a user's visits have different times."""
        most = int(self._visits.max())
        times = draw.integers(0, self._span - most, (self.habits.users, most))
        # Only the first `visits` of a user count.
        times[np.arange(most) >= self._visits[:, None]] = self._span
        return START + np.sort(times, axis=1) + np.arange(most)

    def _visit(
        self, draw: np.random.Generator, who: Ids, time: Ids, recency: Floats, shown: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Draw one visit of each of these users; `recency`, their recent actions by category, is updated."""
        favourites = self._favourites[(time >= self._changes[who]).astype(np.int64), who]  # [A, FAVOURITES]
        items = self._choose_shown(draw, favourites, shown)  # [A, shown]
        truth = self._compute_truth(items, favourites, self.price_level[who], recency[who])
        clicked = draw.random(truth.shape) < truth
        kind = draw.random(truth.shape)
        action = 2 + (kind < CART_PROBABILITY + BUY_PROBABILITY) + (kind < BUY_PROBABILITY)
        action = np.where(clicked, action, 0)
        recency[who] = _follow(recency[who], self.shop.category[items], action)
        return {
            USER: np.repeat(1 + who, items.shape[1]),
            TIME: np.repeat(time, items.shape[1]),
            "items": items.ravel(),
            "actions": action.ravel(),
            LABEL: clicked.ravel().astype(np.int64),
            "truth": truth.ravel(),
        }

    def _choose_shown(self, draw: np.random.Generator, favourites: Ids, shown: int) -> Ids:
        """Return different items for each user, in no order: `[A, shown]`."""
        count = (len(favourites), min(shown, self.shop.items))

        def draw_items() -> Ids:
            own = np.take_along_axis(favourites, draw.integers(0, FAVOURITES, count), axis=1)
            other = draw.integers(1, self.shop.categories + 1, count)
            return self.shop.draw_items(draw, np.where(draw.random(count) < RETRIEVED_SHARE, own, other))

        items = draw_items()
        for attempt in range(1000):
            repeated = _find_repeated(items)
            if not repeated.any():
                break
            # In a small shop a few items may be most of what is shown: in the end any item is taken.
            anything = draw.integers(1, self.shop.items + 1, count)
            items = np.where(repeated, draw_items() if attempt < 10 else anything, items)
        return items

    def _compute_truth(self, items: Ids, favourites: Ids, price_level: Floats, recency: Floats) -> Floats:
        """Return the probability of a click on each item: `[A, shown]`."""
        effects, category = self.effects, self.shop.category[items]
        is_favourite = (category[:, :, None] == favourites[:, None, :]).any(axis=2)
        logit = (
            effects.base
            + effects.taste * is_favourite
            + effects.recency * np.take_along_axis(recency, category, axis=1)
            + effects.quality * self.shop.quality[items]
            - effects.price * np.abs(self.shop.price[items] - price_level[:, None])
        )
        truth: Floats = 1 / (1 + np.exp(-logit))
        return truth

    def _fill_events(self, draw: np.random.Generator, actions: Ids) -> dict[str, Ids]:
        """Return a column for each field that only an event has: 0 where there was no action."""
        columns = {}
        for field in event_fields(self.shop.schema):
            if field.name == "action":
                ids = np.minimum(actions, field.vocab_size - 1)
            else:
                ids = draw.integers(1, field.vocab_size, len(actions))
            columns[field.name] = np.where(actions > 0, ids, 0)
        return columns


def compute_best_auc(truth: Floats) -> float:
    """Return the AUC of ranking by the true probabilities, in the mean over draws of the labels (a ratio of means)."""
    levels, level = np.unique(truth, return_inverse=True)
    clicks = np.bincount(level, weights=truth, minlength=len(levels))
    others = np.bincount(level, weights=1 - truth, minlength=len(levels))
    below = np.cumsum(others) - others
    return float((clicks * (below + others / 2)).sum() / (clicks.sum() * others.sum()))


def _follow(recency: Floats, category: Ids, action: Ids) -> Floats:
    """Return the recent actions after more events, in their order: weights of categories, at most 2 in all."""
    every_user = np.arange(len(recency))
    for column in range(category.shape[1]):
        acted = action[:, column] > 0
        recency = np.where(acted[:, None], recency * RECENCY_DECAY, recency)
        recency[every_user, category[:, column]] += (1 - RECENCY_DECAY) * ACTION_WEIGHTS[action[:, column]]
    return recency


def _find_repeated(items: Ids) -> npt.NDArray[np.bool_]:
    """Return which items of a row came before in the row."""
    order = np.argsort(items, axis=1, kind="stable")
    ranked = np.take_along_axis(items, order, axis=1)
    repeated = np.zeros(items.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ranked[:, 1:] == ranked[:, :-1], axis=1)
    return repeated


def _draw_different(draw: np.random.Generator, rows: int, count: int, most: int) -> Ids:
    """Return `count` different numbers 1 … most a row, as far as there are so many."""
    ranked = np.argsort(draw.random((rows, most)), axis=1)
    return 1 + ranked[:, np.arange(count) % most]
