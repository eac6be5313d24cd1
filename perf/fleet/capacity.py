"""The arithmetic of capacity: how often users are found, how long requests wait, how many servers that takes.

Pure formulas. The module knows visitors, seconds and counts; it does not know what was measured, where, or what it
costs.

How long is a user kept? A cache that drops the least recently used behaves as if it dropped everybody who has not been
asked for during one time T, the same for all (Che, Tung, Wang: "Hierarchical Web Caching Systems", 2002). With F the
distribution of the time until the same history is asked for again, and q requests a second,

    hit rate = F(T)        users kept = q · ∫₀ᵀ (1 - F(t)) dt

(Denning's working set says the same of pages). T follows from the budget, or from the hit rate that is wanted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.perf.analyzer import PerfError

Floats = npt.NDArray[np.float64]

# Users of nearly the same popularity are counted together from here on: a sum over a billion users stays short.
EXACT_RANKS = 4096
RANKS_PER_BIN = 1.002
LONGEST_SECONDS = 1e12


@dataclass(frozen=True)
class Visitors:
    """Who comes, and when with the same history as before.

    users: how many there are. exponent: of Zipf's law over their visits. returns: the probability that a request is
    followed by another page of the same visit, with the same history. page_seconds: mean time until that page.
    unchanged: the probability that the history is still the same at the user's next visit.
    """

    users: int
    exponent: float = 0.8
    returns: float = 0.5
    page_seconds: float = 30.0
    unchanged: float = 0.5

    def check(self) -> None:
        """Check the numbers.

        Raises:
            PerfError: they describe nobody.
        """
        expect(self.users >= 1, "users", "at least 1", self.users)
        expect(self.exponent >= 0, "exponent", "at least 0", self.exponent)
        expect(0 <= self.returns < 1, "returns", "a probability below 1", self.returns)
        expect(self.page_seconds > 0, "page seconds", "more than 0", self.page_seconds)
        expect(0 <= self.unchanged <= 1, "unchanged", "a probability", self.unchanged)

    @property
    def highest_hit_rate(self) -> float:
        """The hit rate of a cache that keeps everybody for ever."""
        return self.returns + (1 - self.returns) * self.unchanged


def expect(is_so: bool, name: str, expected: str, got: object) -> None:
    """Refuse a number that cannot be.

    Raises:
        PerfError: it is not so.
    """
    if not is_so:
        raise PerfError(f"{name}: expected {expected}, got {got}")


# ---- who is found ---------------------------------------------------------------------------------------------------


def bin_popularity(users: int, exponent: float) -> tuple[Floats, Floats]:
    """Return Zipf's law in bins: the share of one user in each, and how many users it has (`[bins]` both)."""
    exact = np.arange(1, min(users, EXACT_RANKS) + 1, dtype=np.float64)
    if users <= EXACT_RANKS:
        weights, counts = exact**-exponent, np.ones_like(exact)
    else:
        steps = math.ceil(math.log((users + 1) / (EXACT_RANKS + 1)) / math.log(RANKS_PER_BIN))
        edges = np.unique(np.round(np.geomspace(EXACT_RANKS + 1, users + 1, steps + 1)))
        middles = (edges[:-1] + edges[1:] - 1) / 2
        weights = np.concatenate([exact**-exponent, middles**-exponent])
        counts = np.concatenate([np.ones_like(exact), np.diff(edges)])
    return weights / (weights * counts).sum(), counts


class Reuse:
    """When the same history is asked for again, at a rate of requests a second over all servers."""

    def __init__(self, visitors: Visitors, rate: float) -> None:
        visitors.check()
        expect(rate > 0, "requests a second", "more than 0", rate)
        self.visitors, self.rate = visitors, rate
        self._shares, self._counts = bin_popularity(visitors.users, visitors.exponent)
        self._visits = rate * (1 - visitors.returns)  # a second: what a visit's further pages are not

    def hit_rate(self, seconds: float) -> float:
        """Return F(T): the share of requests whose history was asked for within that time before."""
        who = self.visitors
        # 1 - F: neither another page of this visit within T, nor another visit with the same history.
        no_page = who.returns * math.exp(-seconds / who.page_seconds) + 1 - who.returns
        no_visit = 1 - who.unchanged + who.unchanged * np.exp(-self._visits * self._shares * seconds)  # [bins]
        return 1 - no_page * float((self._counts * self._shares * no_visit).sum())

    def users_kept(self, seconds: float) -> float:
        """Return how many histories have been asked for within that time, on average."""
        who = self.visitors
        again = self._visits * self._shares  # visits a second of one user: [bins]
        same, changed = who.unchanged, 1 - who.unchanged

        def integrate(leaving: Floats | float) -> Floats | float:
            """Return ∫₀ᵀ exp(-leaving · t) dt."""
            return -np.expm1(-leaving * seconds) / leaving

        page = 1 / who.page_seconds
        while_here = changed * integrate(page) + same * integrate(page + again)
        when_gone = changed * seconds + same * integrate(again)
        each = who.returns * while_here + (1 - who.returns) * when_gone
        return self.rate * float((self._counts * self._shares * each).sum())

    def time_kept(self, entries: float) -> float:
        """Return T for room for so many users over all servers."""
        if self.users_kept(LONGEST_SECONDS) <= entries:
            return LONGEST_SECONDS
        return bisect(lambda seconds: self.users_kept(seconds) >= entries)

    def hit_rate_of(self, entries: float) -> float:
        """Return the hit rate with room for so many users over all servers, each on its own server."""
        return self.hit_rate(self.time_kept(entries))

    def entries_for(self, hit_rate: float) -> float:
        """Return the room that a hit rate takes, over all servers.

        Raises:
            PerfError: it cannot be reached, whatever the room.
        """
        expect(0 <= hit_rate <= 1, "hit rate", "a share between 0 and 1", hit_rate)
        highest = self.hit_rate(LONGEST_SECONDS)
        if hit_rate > highest:
            who = self.visitors
            raise PerfError(
                f"hit rate: expected at most {highest:.3f}, which is what keeping everybody for ever gives with "
                f"returns {who.returns:g} and unchanged {who.unchanged:g}, got {hit_rate:g}"
            )
        return self.users_kept(bisect(lambda seconds: self.hit_rate(seconds) >= hit_rate)) if hit_rate else 0.0


def bisect(is_enough: Callable[[float], bool]) -> float:
    """Return the shortest time that is enough, to one part in a million."""
    low, high = 1e-6, LONGEST_SECONDS
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


# ---- how long requests take -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Service:
    """Seconds of a server that a ranking takes: user kept, user encoded, and the share of the former."""

    warm: float
    cold: float
    hit_rate: float

    @property
    def mean(self) -> float:
        """Seconds a ranking, on average."""
        return self.hit_rate * self.warm + (1 - self.hit_rate) * self.cold

    @property
    def mean_square(self) -> float:
        """The mean of its square, in which the long ones weigh more: they are what others wait for."""
        return self.hit_rate * self.warm**2 + (1 - self.hit_rate) * self.cold**2

    def mean_wait(self, utilisation: float) -> float:
        """Return the mean wait for a server that is busy for this share of the time (Pollaczek and Khinchine).

        With affinity every server has a queue of its own, M/G/1: nobody else takes what waits there.
        """
        return utilisation * self.mean_square / (2 * self.mean * (1 - utilisation))

    def long_wait(self, utilisation: float, share: float = 0.01) -> float:
        """Return the wait that this share of requests exceeds (Kingman's exponential tail)."""
        return max(0.0, self.mean_wait(utilisation) / utilisation * math.log(utilisation / share))


# ---- how many servers -----------------------------------------------------------------------------------------------


def count_servers(rate: float, seconds: float, workers: int, utilisation: float) -> int:
    """Return the servers that so many requests a second take: ⌈rate · seconds / (workers · utilisation)⌉."""
    return max(1, math.ceil(rate * seconds / (workers * utilisation) - 1e-9))


def find_servers(reuse: Reuse, entries_each: float, enough: Callable[[float], int]) -> tuple[int, float]:
    """Return the fewest servers that do, and their hit rate, where more servers keep more users.

    Args:
        reuse: when histories are asked for again.
        entries_each: users that one server has room for.
        enough: hit rate → servers needed.
    """
    low, high = 0, enough(0.0)  # with no hits at all, this many do
    while high - low > 1:
        middle = (low + high) // 2
        if enough(reuse.hit_rate_of(middle * entries_each)) <= middle:
            high = middle
        else:
            low = middle
    return high, reuse.hit_rate_of(high * entries_each)
