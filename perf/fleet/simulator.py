"""A simulator of many servers behind a proxy: who is sent where, who is found there, how long it takes.

Exact where it matters: every server's cache is a real LRU (`runtime/user_kv_cache.py` without threads and memory),
every server a queue that answers one request at a time, and the proxy does what haproxy 2.6 does with `hash-type
consistent` and `hash-balance-factor`. It does not know what is computed in a server, only the seconds that it takes;
requests that were in a server that is lost are not sent again.
"""

import heapq
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from kvcast.perf.fleet.capacity import expect
from kvcast.perf.fleet.ring import Ring, count_slots
from kvcast.perf.fleet.visits import Ids, Visits

Row = dict[str, Any]
# haproxy puts 16 points on its ring for each unit of a server's weight (BE_WEIGHT_SCALE); this is weight 64.
POINTS = 1024
# Of the mean in flight, what a server may have; in haproxy's percent 400. `perf/results/fleet.md` shows why not 1.25.
FACTOR = 4.0
# Visits that are looked up at once.
BATCH = 100_000


class Policy(StrEnum):
    """How the proxy chooses a server: in turn, by the user, or by the user while that server is not too busy."""

    ROUND_ROBIN = "round-robin"
    AFFINITY = "affinity"
    BOUNDED = "bounded"


class Change(NamedTuple):
    """A server leaves, or comes (back) with an empty cache."""

    seconds: float
    server: int
    is_up: bool


@dataclass(frozen=True)
class Fleet:
    """The servers and their proxy.

    budget: of each server's cache, in entries or in whatever the visits' sizes are counted. factor: how many times the
    mean of requests in flight a server may have (policy bounded). points: of a server on the ring. warm_seconds,
    cold_seconds: that a request takes. time_to_live: as in the real cache, 0 for no limit.
    """

    servers: int
    budget: float
    policy: Policy = Policy.AFFINITY
    factor: float = FACTOR
    points: int = POINTS
    warm_seconds: float = 0.0
    cold_seconds: float = 0.0
    time_to_live: float = 0.0
    changes: tuple[Change, ...] = ()

    def check(self) -> None:
        """Check the numbers.

        Raises:
            PerfError: there is no such fleet.
        """
        expect(self.servers >= 1, "servers", "at least 1", self.servers)
        expect(self.budget >= 0, "budget", "at least 0", self.budget)
        expect(self.factor > 1, "factor", "more than 1", self.factor)
        expect(self.points >= 1, "points", "at least 1", self.points)
        expect(0 <= self.warm_seconds <= self.cold_seconds, "seconds", "warm at most cold", self.cold_seconds)
        expect(list(self.changes) == sorted(self.changes), "changes", "them in order of time", self.changes)
        for change in self.changes:
            expect(0 <= change.server < self.servers, "server that changes", f"0 to {self.servers - 1}", change.server)


# ---- servers --------------------------------------------------------------------------------------------------------


class Cache:
    """A server's cache: least recently used goes first, as `UserKVCache` does it, with ages counted from the making."""

    def __init__(self, budget: float, time_to_live: float = 0.0) -> None:
        self.budget, self.time_to_live = budget, time_to_live
        self.hits = self.misses = self.evictions = 0
        self.held = 0.0
        self._sizes: OrderedDict[int, float] = OrderedDict()  # least recently used first
        self._made: OrderedDict[int, float] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        """Return how many users are kept."""
        return len(self._sizes)

    def ask(self, content: int, size: float, now: float) -> bool:
        """Return whether it is there; if not, it is from now on, if it fits."""
        if self.time_to_live:
            self._expire(now)
        if content in self._sizes:
            self._sizes.move_to_end(content)
            self.hits += 1
            return True
        self.misses += 1
        if size > self.budget:
            return False
        while self.held + size > self.budget:
            oldest, freed = self._sizes.popitem(last=False)
            self._made.pop(oldest, None)
            self.held -= freed
            self.evictions += 1
        self._sizes[content] = size
        self.held += size
        if self.time_to_live:
            self._made[content] = now
        return False

    def forget(self) -> None:
        """Begin anew; the counts stay."""
        self._sizes.clear()
        self._made.clear()
        self.held = 0.0

    def check(self) -> None:
        """Check that it holds what it says, and no more than it may.

        Raises:
            AssertionError: it does not.
        """
        if self.held > self.budget or abs(self.held - sum(self._sizes.values())) > 1e-6 * (1 + self.budget):
            raise AssertionError(
                f"cache: {self.held} held of {self.budget}, {sum(self._sizes.values())} by its entries"
            )

    def _expire(self, now: float) -> None:
        while self._made:
            content, made = next(iter(self._made.items()))
            if now - made < self.time_to_live:
                return
            del self._made[content]
            self.held -= self._sizes.pop(content)


class Simulation:
    """A fleet that is sent visits, one after the other."""

    def __init__(self, fleet: Fleet, visits: Visits) -> None:
        fleet.check()
        visits.check()
        self.fleet, self.visits = fleet, visits
        self.caches = [Cache(fleet.budget, fleet.time_to_live) for _ in range(fleet.servers)]
        self.in_flight = [0] * fleet.servers
        self.total = 0  # in flight
        self.alive = sorted(set(range(fleet.servers)) - find_absent(fleet.changes))
        self.rings: list[Ring] = []  # one an epoch: the time between two changes
        # What came of each visit so far.
        self.servers, self.homes = array("i"), array("i")
        self.is_hit = bytearray()
        self.latencies = array("d")
        self._free = [0.0] * fleet.servers  # when each has answered all that it has
        self._departures: list[tuple[float, int]] = []
        changed = np.searchsorted(visits.seconds, [change.seconds for change in fleet.changes])
        self._epochs = list(pairwise([0, *map(int, changed), len(visits)]))
        self._ends = self._turn = 0
        # The visits from `_begins` on as plain Python numbers: seconds, content, size, point on the ring.
        self._begins, self._batch = 0, list[tuple[float, int, float, int]]()

    def run(self) -> None:
        """Send all that is left."""
        while len(self.servers) < len(self.visits):
            self.send()

    def send(self) -> int:
        """Send the next visit; return the server that it went to."""
        at = len(self.servers) - self._begins
        if at == len(self._batch):
            self._take_batch()
            at = 0
        now, content, size, place = self._batch[at]
        departures = self._departures
        while departures and departures[0][0] <= now:
            gone = heapq.heappop(departures)[1]
            self.in_flight[gone] -= 1
            self.total -= 1
        server = self._choose(place)
        is_hit = self.caches[server].ask(content, size, now)
        done = max(now, self._free[server]) + (self.fleet.warm_seconds if is_hit else self.fleet.cold_seconds)
        self._free[server] = done
        heapq.heappush(departures, (done, server))
        self.in_flight[server] += 1
        self.total += 1
        self.servers.append(server)
        self.homes.append(self._owners[place])
        self.is_hit.append(is_hit)
        self.latencies.append(done - now)
        return server

    def check(self) -> None:
        """Check that no request got lost or counted twice.

        Raises:
            AssertionError: one was; this is a fault of this module.
        """
        for cache in self.caches:
            cache.check()
        asked = sum(cache.hits + cache.misses for cache in self.caches)
        problems = {
            "visits": not len(self.servers) == len(self.is_hit) == len(self.latencies) == asked,
            "hits": sum(self.is_hit) != sum(cache.hits for cache in self.caches),
            "in flight": not self.total == sum(self.in_flight) == len(self._departures),
            "servers": not set(self.servers) <= set(range(self.fleet.servers)),
        }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise AssertionError(f"simulation: {', '.join(wrong)} do not add up")

    def _choose(self, place: int) -> int:
        if self.fleet.policy is Policy.ROUND_ROBIN:
            self._turn = (self._turn + 1) % len(self.alive)
            return self.alive[self._turn]
        server = self._owners[place]
        if self.fleet.policy is Policy.AFFINITY:
            return server
        # From point to point around the ring, to the first server that is not too busy: one always is not, because
        # there are more slots than requests.
        while not self._is_eligible(server):
            place = (place + 1) % len(self._owners)
            server = self._owners[place]
        return server

    def _is_eligible(self, server: int) -> bool:
        slots = count_slots(self.total, self.fleet.factor, len(self.alive), self._rank[server])
        return self.in_flight[server] < slots

    def _take_batch(self) -> None:
        """Look up where the next visits belong, many at once, after the changes that are due."""
        self._begins += len(self._batch)
        while self._begins == self._ends:
            self._begin_epoch()
        part = slice(self._begins, min(self._ends, self._begins + BATCH))
        visits = self.visits
        sizes = np.ones(part.stop - part.start) if visits.sizes is None else visits.sizes[part]
        columns = (visits.seconds[part], visits.contents[part], sizes, self.rings[-1].find(visits.users[part]))
        self._batch = list(zip(*(column.tolist() for column in columns), strict=True))

    def _begin_epoch(self) -> None:
        if self.rings:
            self._change(self.fleet.changes[len(self.rings) - 1])
        self._ends = self._epochs[len(self.rings)][1]
        self.rings.append(Ring(self.alive, self.fleet.points))
        self._owners: list[int] = self.rings[-1].owners.tolist()
        self._rank = {server: rank for rank, server in enumerate(self.alive)}

    def _change(self, change: Change) -> None:
        alive = set(self.alive) | {change.server} if change.is_up else set(self.alive) - {change.server}
        expect(len(alive) > 0, "changes", "a server that stays", "none")
        self.alive = sorted(alive)
        self.caches[change.server].forget()
        self._departures = [each for each in self._departures if each[1] != change.server]
        heapq.heapify(self._departures)
        self.in_flight[change.server], self._free[change.server] = 0, 0.0
        self.total = sum(self.in_flight)


def find_absent(changes: Sequence[Change]) -> set[int]:
    """Return the servers that are not there at first: those whose first change is to come."""
    first = {change.server: change.is_up for change in reversed(changes)}
    return {server for server, is_up in first.items() if is_up}


# ---- what came of it ------------------------------------------------------------------------------------------------


def simulate(fleet: Fleet, visits: Visits) -> Simulation:
    """Send all visits to a fleet."""
    simulation = Simulation(fleet, visits)
    simulation.run()
    return simulation


def summarise(simulation: Simulation, settled_after: float = 0.0) -> Row:
    """Return rates and times of what came after the first seconds, in which caches fill."""
    fleet, visits = simulation.fleet, simulation.visits
    begin = int(np.searchsorted(visits.seconds, settled_after))
    expect(begin < len(visits), "settled after", "less than the trace lasts", settled_after)
    servers = np.array(simulation.servers[begin:])
    is_hit = np.frombuffer(simulation.is_hit, np.bool_)[begin:]
    latencies = np.array(simulation.latencies[begin:])
    lasted = float(visits.seconds[-1] - visits.seconds[begin]) or 1.0
    taken = np.where(is_hit, fleet.warm_seconds, fleet.cold_seconds)
    requests = np.bincount(servers, minlength=fleet.servers)
    work = np.bincount(servers, taken, minlength=fleet.servers)
    own = simulation.alive
    return {
        "visits": len(servers),
        "hit_rate": float(is_hit.mean()),
        "hit_rates": [float(is_hit[servers == server].mean()) if requests[server] else None for server in own],
        "requests": [int(requests[server]) for server in own],
        "imbalance": float(requests[own].max() / requests[own].mean()),
        "work_imbalance": float(work[own].max() / work[own].mean()) if work[own].mean() else 1.0,
        "utilisation": float(work[own].mean() / lasted),
        "highest_utilisation": float(work[own].max() / lasted),
        "elsewhere": float((servers != np.array(simulation.homes[begin:])).mean()),
        "mean_seconds": float(latencies.mean()),
        "p50_seconds": float(np.percentile(latencies, 50)),
        "p99_seconds": float(np.percentile(latencies, 99)),
        "in_flight": float(latencies.sum() / lasted / len(own)),
        "full_caches": sum(simulation.caches[server].evictions > 0 for server in own),
    }


def count_moved(before: Ring, after: Ring, users: Ids) -> float:
    """Return the share of these users whose server is another."""
    return float((before.find_servers(users) != after.find_servers(users)).mean())


def follow_hits(simulation: Simulation, step: float) -> tuple[list[float], list[float]]:
    """Return the hit rate over time: the middle of each step, and the rate in it."""
    seconds = simulation.visits.seconds
    place = (seconds / step).astype(np.int64)
    asked = np.bincount(place)
    hits = np.bincount(place, np.frombuffer(simulation.is_hit, np.bool_))
    full = np.flatnonzero(asked)
    return [float(step * (each + 0.5)) for each in full], [float(hits[each] / asked[each]) for each in full]
