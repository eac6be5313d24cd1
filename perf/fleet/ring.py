"""Consistent hashing with bounded load, as haproxy 2.6 does it.

The bound is that of Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016). haproxy's are
`chash_get_server_hash` and `chash_server_is_eligible` (src/lb_chash.c), with other hash functions. Envoy's
`hash_balance_factor` differs: the next point on the ring, one request more before a server counts as full, and then
a random other server instead of the next.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def mix(numbers: Ids) -> npt.NDArray[np.uint64]:
    """Return well spread hashes of numbers (the finaliser of SplitMix64: Steele, Lea, Flood, 2014)."""
    bits = numbers.astype(np.uint64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Ring:
    """Consistent hashing: servers have points on a circle, and a user belongs to the nearest one, as in haproxy.

    (Envoy and the textbook take the next one, which gives servers more uneven shares.) A server's points depend on its
    own number alone, so the others' stay where they are when it leaves.
    """

    def __init__(self, servers: Sequence[int], points: int) -> None:
        names = np.repeat(np.array(servers, np.int64), points)
        places = mix((names + 1) * 2**32 + np.tile(np.arange(points), len(servers)))
        order = np.argsort(places, kind="stable")
        self.places, self.owners = places[order], names[order]  # [points of all]

    def find(self, users: Ids) -> Ids:
        """Return the number of each user's point."""
        where = mix(users)
        after = np.searchsorted(self.places, where) % len(self.places)
        before = (after - 1) % len(self.places)
        # Differences of unsigned numbers go around the circle by themselves.
        is_before = where - self.places[before] <= self.places[after] - where
        return np.where(is_before, before, after)

    def find_servers(self, users: Ids) -> Ids:
        """Return the server of each user."""
        return self.owners[self.find(users)]


def count_slots(in_flight: int, factor: float, servers: int, place: int) -> int:
    """Return how many requests a server may have, with one more than `in_flight` over all.

    As `chash_server_is_eligible` of haproxy 2.6 (src/lb_chash.c) has it for equal weights: the slots of all,
    ⌈factor · (in flight + 1)⌉, are dealt out as evenly as whole numbers can be, and nobody has none.
    """
    percent = round(100 * factor)
    slots = ((in_flight + 1) * percent + 99) // 100
    return max(1, (place + 1) * slots // servers - place * slots // servers)
