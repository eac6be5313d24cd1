"""What every drawn shop has in common: popularity by Zipf's law, and brands that belong to a category."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ZIPF_EXPONENT = 1.05
BRANDS_PER_CATEGORY = 12


def zipf_weights(count: int, exponent: float = ZIPF_EXPONENT) -> Floats:
    """Return the weights of ranks 1 … count: few are popular, most are not."""
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
