"""Click logs of a small shop, drawn from a seed: items with related attributes, and users who browse in sessions.

Popularity follows Zipf's law. A category has its own brands and its own price level. A user likes a few categories,
stays within one for a session, comes back to items seen before, and acts in a funnel (view, click, cart, buy).
Fields with other names get uniform random ids, so any schema can be filled.
"""

import numpy as np
import numpy.typing as npt

from kvcast.protocol.request import RankRequest
from kvcast.protocol.schema import FeatureSchema, Field
from kvcast.synthetic.shop import draw_brands, zipf_shares

Ids = npt.NDArray[np.int64]

CATEGORIES_PER_USER = 4
SESSION_LENGTH = 12.0
RETURN_PROBABILITY = 0.15
# How often each action happens; ids 1, 2, 3, 4 are view, click, add to cart, buy.
ACTION_SHARES = (0.7, 0.2, 0.07, 0.03)


class ClickLog:
    """The shop. Users and requests are drawn from it one after the other, the same for the same seed."""

    def __init__(self, schema: FeatureSchema, seed: int) -> None:
        """Stock the shop with every item of the schema's vocabulary.

        Args:
            schema: the fields of a history event and of a candidate.
            seed: of everything that is drawn.
        """
        self.schema = schema
        self._generator = np.random.default_rng(seed)
        sizes = {field.name: field.vocab_size for field in schema.history_fields + schema.candidate_fields}
        items = sizes.get("item", 2)
        self._attributes = self._stock_items(items, sizes)  # field name → [items], index 0 unused
        # Popular items are spread over the ids, as in a catalogue that grew over years.
        self._popularity = self._generator.permutation(zipf_shares(items - 1))  # [items - 1]
        self._by_category = self._shelve(self._attributes["category"])

    def draw_history(self, length: int) -> Ids:
        """Draw a new user and return that user's last `length` events, oldest first: INT64 `[L, fields]`."""
        items = self._browse(length)  # [L]
        return self._fill(self.schema.history_fields, items)

    def draw_candidates(self, count: int) -> Ids:
        """Draw `count` different items as retrieval might, popular ones first: INT64 `[N, T]`."""
        items = 1 + self._generator.choice(
            len(self._popularity), count, replace=count > len(self._popularity), p=self._popularity
        )
        return self._fill(self.schema.candidate_fields, items)

    def draw_request(self, length: int, count: int) -> RankRequest:
        """Draw a new user with `length` events, and `count` candidates."""
        return RankRequest(self.draw_history(length), self.draw_candidates(count))

    def _stock_items(self, items: int, sizes: dict[str, int]) -> dict[str, Ids]:
        draw = self._generator
        categories, brands = sizes.get("category", 64), sizes.get("brand", 64)
        prices = sizes.get("price_bucket", 64)
        category = draw.integers(1, categories, items)
        brand = draw_brands(draw, category, categories, brands)
        price_level = draw.uniform(0.1, 0.9, categories)
        price = (price_level[category] + draw.normal(0, 0.08, items)) * prices
        return {
            "item": np.arange(items),
            "category": category,
            "brand": brand,
            "price_bucket": np.clip(price.astype(np.int64), 1, prices - 1),
        }

    def _shelve(self, category: Ids) -> dict[int, tuple[Ids, npt.NDArray[np.float64]]]:
        """Return, per category, its items and their shares of its popularity."""
        order = 1 + np.argsort(category[1:], kind="stable")  # items 1 … sorted by category
        names, starts = np.unique(category[order], return_index=True)
        shelves = np.split(order, starts[1:])
        shares = [self._popularity[shelf - 1] for shelf in shelves]
        return {
            int(name): (shelf, share / share.sum()) for name, shelf, share in zip(names, shelves, shares, strict=True)
        }

    def _browse(self, length: int) -> Ids:
        """Return the items of a user's events, session after session."""
        draw = self._generator
        tastes = draw.choice(list(self._by_category), CATEGORIES_PER_USER)
        visited: list[int] = []
        while len(visited) < length:
            items, shares = self._by_category[int(draw.choice(tastes))]
            session = draw.choice(items, 1 + draw.poisson(SESSION_LENGTH), p=shares)
            for item in session:
                comes_back = visited and draw.random() < RETURN_PROBABILITY
                visited.append(int(draw.choice(visited[-50:])) if comes_back else int(item))
        return np.array(visited[:length], np.int64)

    def _fill(self, fields: tuple[Field, ...], items: Ids) -> Ids:
        """Return a column a field for these items."""
        return np.stack([self._fill_field(field, items) for field in fields], axis=1)

    def _fill_field(self, field: Field, items: Ids) -> Ids:
        if field.name in self._attributes:
            return self._attributes[field.name][items]
        if field.name == "action":
            return self._generator.choice(np.arange(1, 5), len(items), p=ACTION_SHARES)
        return self._generator.integers(1, field.vocab_size, len(items))
