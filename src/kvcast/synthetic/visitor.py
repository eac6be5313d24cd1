"""One more visit of a user of a log with known truth, and a text that explains a ranking of the items shown.

With another seed than that of the log that a model was trained on, it is a new user of the same shop.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.protocol.log import USER, log_fields
from kvcast.protocol.request import RankRequest
from kvcast.protocol.schema import Field
from kvcast.synthetic.shop import Shop
from kvcast.synthetic.truth import Floats, Ids, PlantedLog, PlantedRows

Scores = npt.NDArray[np.float32] | Floats
# What an action is called, by its id.
ACTIONS = {0: "", 2: "clicked", 3: "put in the cart", 4: "bought"}
EVENTS_SAID = 8
TOP, BOTTOM = 10, 3
MARK = "♥"
_COLUMNS = f"{'item':>5}  {'brand':<10}    {'category':<13}  {'price':>5}"


@dataclass(frozen=True)
class Visitor:
    """A user at the time of a visit.

    tastes: the preferred categories. price_level: 0 to 1. events, actions: the history, `[L]`, oldest first. items:
    those shown, `[N]`; outcomes: the user's action on each, 0 for none; truth: the probability of a click on each.
    request: the part of this that a model gets.
    """

    user: int
    shop: Shop
    tastes: list[int]
    price_level: float
    events: Ids
    actions: Ids
    items: Ids
    outcomes: Ids
    truth: Floats
    request: RankRequest

    def likes(self, item: int) -> bool:
        """Whether an item is of a preferred category."""
        return int(self.shop.category[item]) in self.tastes


def draw_visitor(log: PlantedLog, user: int, events: int, shown: int) -> Visitor:
    """Draw one more visit of a user of a log.

    Args:
        log: whose user.
        user: from 1 on.
        events: the most events of the history; the last ones are kept.
        shown: how many items the user is shown: half of the categories that they like, half of any.

    Raises:
        ValueError: there is no such user, or no item or action in the shop's schema.
    """
    if not 1 <= user <= log.habits.users:
        raise ValueError(f"user: expected 1 to {log.habits.users}, got {user}")
    schema = log.shop.schema
    if not {"item", "action"} <= {each.name for each in log_fields(schema)}:
        raise ValueError("user: expected the fields item and action in the configuration")
    rows = log.draw_rows()
    visit = log.draw_visit(rows, user, shown)
    acted = np.flatnonzero((rows.columns[USER] == user) & (rows.columns["action"] > 0))
    acted = acted[len(acted) - min(len(acted), events) :]
    return Visitor(
        user=user,
        shop=log.shop,
        tastes=log.list_tastes(user),
        price_level=float(log.price_level[user - 1]),
        events=rows.columns["item"][acted],
        actions=rows.columns["action"][acted],
        items=visit.columns["item"],
        outcomes=visit.columns["action"],
        truth=visit.truth,
        request=RankRequest(
            _select(rows, schema.history_fields, acted),
            _select(visit, schema.candidate_fields, np.arange(len(visit.truth))),
        ),
    )


def describe_visitor(visitor: Visitor) -> str:
    """Return a description of the user and the latest events."""
    shop, history = visitor.shop, visitor.request.history
    lines = [
        f"A shop of {shop.items} items in {shop.categories} categories, and a user whom the model has never seen:",
        "",
        f"  user      {visitor.user}",
        f"  likes     {', '.join(shop.name_category(category) for category in visitor.tastes)}",
        f"  pays      around {_to_price(visitor.price_level)}; prices are 0 to 100",
        f"  lately    {'':<15}  {_COLUMNS}",
    ]
    for item, action in list(zip(visitor.events, visitor.actions, strict=True))[: -EVENTS_SAID - 1 : -1]:
        lines.append(f"            {ACTIONS[int(action)]:<15}  {_describe_item(visitor, int(item))}")
    lines += [
        "",
        f"The model is not told what the user likes. It gets the last {len(history)} events (the latest are above) and",
        f"{len(visitor.items)} candidates, half of them from categories that the user likes and half from any.",
    ]
    return "\n".join(lines)


def describe_ranking(visitor: Visitor, scores: Scores) -> str:
    """Return a table of a ranking, its first and last places, and its quality in sentences."""
    order = np.argsort(-scores, kind="stable")
    lines = [f"rank   score  {_COLUMNS}  what the user then did"]
    for place, index in enumerate(order):
        if place < TOP or place >= len(order) - BOTTOM:
            item, outcome = int(visitor.items[index]), ACTIONS[int(visitor.outcomes[index])]
            lines.append(f"{place + 1:>4}  {scores[index]:>6.2f}  {_describe_item(visitor, item)}  {outcome}".rstrip())
        elif place == TOP:
            lines.append("   …")
    return "\n".join([*lines, "", *_judge(visitor, scores, order[:TOP])])


def measure_auc(labels: npt.NDArray[np.bool_], scores: Scores) -> float:
    """Return the share of pairs, one clicked and one not, that are in the right order; a tie counts half."""
    above = scores[labels][:, None] - scores[~labels][None, :]
    return float(((above > 0) + (above == 0) / 2).mean())


def _judge(visitor: Visitor, scores: Scores, top: Ids) -> list[str]:
    """Return the quality of the ranking, in sentences."""
    shown, first = f"{len(scores)} candidates", f"the top {len(top)}"
    liked = np.array([visitor.likes(int(item)) for item in visitor.items])
    clicked = visitor.outcomes > 0
    lines = [
        f"{MARK} a category that the user likes: {liked[top].sum()} of {first}, {liked.sum()} of all {shown}.",
        f"The user, shown them in no order, clicked on {clicked.sum()}; {clicked[top].sum()} of these are in {first}.",
    ]
    if clicked.any() and not clicked.all():
        lines.append(
            f"AUC {measure_auc(clicked, scores):.2f}: how often a clicked one is above another; by chance 0.50, by the "
            f"true probabilities {measure_auc(clicked, visitor.truth):.2f}."
        )
    return lines


def _describe_item(visitor: Visitor, item: int) -> str:
    """Return the columns of one item."""
    shop = visitor.shop
    brand, category = shop.name_brand(int(shop.brand[item])), shop.name_category(int(shop.category[item]))
    mark = MARK if visitor.likes(item) else " "
    return f"{item:>5}  {brand:<10}  {mark} {category:<13}  {_to_price(float(shop.price[item])):>5}"


def _to_price(level: float) -> str:
    return f"{100 * level:.0f}"


def _select(rows: PlantedRows, fields: tuple[Field, ...], chosen: Ids) -> Ids:
    """Return a column a field for some rows."""
    return np.stack([rows.columns[field.name][chosen] for field in fields], axis=1)
