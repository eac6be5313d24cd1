"""Items: popularity by Zipf's law, brands of a category, and the shop of the logs with known truth.

A shop has a seed of its own: logs of other users of the same shop have the same items, so a model that is trained on
one can be evaluated on another.
"""

import numpy as np
import numpy.typing as npt

from kvcast.protocol.schema import FeatureSchema

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CATEGORIES = (
    "running shoes, teapots, bicycles, novels, headphones, raincoats, garden tools, board games, cameras, backpacks, "
    "coffee, lamps, guitars, pillows, cookbooks, sunglasses, puzzles, tents, watches, blankets, paint, knives, "
    "candles, hats, keyboards, chocolate, umbrellas, yoga mats, telescopes, wallets, cheese, mirrors, skates, drones, "
    "scarves, olive oil, maps, bird feeders, soap, rugs, fishing rods, spices, clocks, toy trains, gloves, vases, "
    "boots, honey"
)
CATEGORY_NAMES = tuple(CATEGORIES.split(", "))
SYLLABLES = (
    "Al Ber Cor Dal El Far Gor Hal Is Jor Kal Lin Mar Nor Os Pel, a be do fi go li ma ne o pi ra se ta ve wi zu, "
    "bel dan fen gard kin lan mont nor pax rix son tel ver win x zen"
)
# A brand's name is one of each.
FIRST, MIDDLE, LAST = (tuple(part.split()) for part in SYLLABLES.split(", "))
ZIPF_EXPONENT = 1.05
BRANDS_PER_CATEGORY = 12
# How far apart brands, and the prices of one category, are.
BRAND_SPREAD = 0.4
PRICE_SPREAD = 0.2
# How much chance there is, beside quality, in how often an item is shown.
POPULARITY_NOISE = 1.0


class Shop:
    """Items 1 … n with category, brand, price and quality; index 0 of every array is the unknown item.

    category, brand: ids. price: 0 to 1. quality: what everybody likes about an item, its brand included; of mean 0 and
    spread 1. attributes: a column of ids for each field of a candidate.
    """

    def __init__(self, schema: FeatureSchema, seed: int = 0, items: int | None = None, categories: int = 24) -> None:
        """Stock the shop.

        Args:
            schema: the fields of a history event and of a candidate. Fields other than item, category, brand and
                price_bucket get ids that mean nothing.
            seed: decides everything.
            items: how many; None: as many as the vocabulary has.
            categories: how many, at most as many as the vocabulary has.
        """
        sizes = {field.name: field.vocab_size for field in schema.history_fields + schema.candidate_fields}
        draw = np.random.default_rng([seed, 0])
        most = sizes.get("item", 1001) - 1
        self.schema = schema
        self.items = most if items is None else min(items, most)
        self.categories = min(categories, sizes.get("category", 64) - 1)
        brands, prices = sizes.get("brand", 64), sizes.get("price_bucket", 64)
        rows = self.items + 1
        self.category: Ids = draw.integers(1, self.categories + 1, rows)
        self.brand = draw_brands(draw, self.category, self.categories + 1, brands)
        level = draw.uniform(0.2, 0.8, self.categories + 1)
        self.price: Floats = np.clip(level[self.category] + draw.normal(0, PRICE_SPREAD, rows), 0, 1)
        own_quality = draw.normal(0, np.sqrt(1 - BRAND_SPREAD**2), rows)
        self.quality: Floats = own_quality + draw.normal(0, BRAND_SPREAD, brands)[self.brand]
        # Good items tend to be shown more often.
        rank = np.argsort(np.argsort(-self.quality[1:] - draw.normal(0, POPULARITY_NOISE, self.items)))
        share = zipf_weights(self.items)[rank]  # [items]
        self._shelf: Ids = 1 + np.argsort(self.category[1:], kind="stable")  # items sorted by category
        self._cumulated: Floats = np.append(0.0, np.cumsum(share[self._shelf - 1]))
        starts = np.searchsorted(self.category[self._shelf], np.arange(self.categories + 2))
        self._bounds: Floats = self._cumulated[starts]  # of category c: from [c] to [c + 1]
        known: dict[str, Ids] = {
            "item": np.arange(rows),
            "category": self.category,
            "brand": self.brand,
            "price_bucket": 1 + np.minimum((self.price * (prices - 1)).astype(np.int64), prices - 2),
        }
        self.attributes: dict[str, Ids] = {
            field.name: known[field.name] if field.name in known else draw.integers(1, field.vocab_size, rows)
            for field in schema.candidate_fields
        }

    def draw_items(self, draw: np.random.Generator, category: Ids) -> Ids:
        """Draw an item of each of these categories, those that are shown often more often.

        Where a category has no item it is one of any category.
        """
        start, end = self._bounds[category], self._bounds[category + 1]
        place = draw.random(category.shape)
        place = np.where(end > start, start + place * (end - start), place * self._cumulated[-1])
        shelf = np.searchsorted(self._cumulated, place, side="right") - 1
        items: Ids = self._shelf[np.minimum(shelf, self.items - 1)]
        return items

    def name_category(self, category: int) -> str:
        """Return a category's name."""
        return CATEGORY_NAMES[category - 1] if 1 <= category <= len(CATEGORY_NAMES) else f"category {category}"

    def name_brand(self, brand: int) -> str:
        """Return a brand's name; names repeat after 4096."""
        first, rest = divmod(brand * 1597 % 4096, 256)  # an odd factor: neighbours get names that differ
        return FIRST[first] + MIDDLE[rest // 16] + LAST[rest % 16]

    def name_item(self, item: int) -> str:
        """Return a line about an item."""
        if not 1 <= item <= self.items:
            return f"Item {item}: unknown"
        category, brand = self.name_category(int(self.category[item])), self.name_brand(int(self.brand[item]))
        return f"Item {item}: {category}, {brand}"


def zipf_weights(count: int, exponent: float = ZIPF_EXPONENT) -> Floats:
    """Return the weights of ranks 1 … count by Zipf's law."""
    weights: Floats = 1 / np.arange(1, count + 1) ** exponent
    return weights


def zipf_shares(count: int, exponent: float = ZIPF_EXPONENT) -> Floats:
    """Return the weights as probabilities."""
    weights = zipf_weights(count, exponent)
    shares: Floats = weights / weights.sum()
    return shares


def draw_brands(draw: np.random.Generator, category: Ids, categories: int, brands: int) -> Ids:
    """Return a brand for each item: a category has its own, and a few of them sell most of its items.

    Args:
        draw: the source.
        category: of each item, below `categories`.
        categories: how many ids there are, that of the unknown one included.
        brands: likewise.
    """
    own: Ids = draw.integers(1, brands, (categories, BRANDS_PER_CATEGORY))
    rank = np.minimum(draw.geometric(0.3, len(category)) - 1, BRANDS_PER_CATEGORY - 1)
    chosen: Ids = own[category, rank]
    return chosen
