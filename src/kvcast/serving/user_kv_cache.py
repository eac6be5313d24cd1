"""User KV that outlives its request: found again by `kv_id` and content of the history, so it cannot be stale.

A user comes back within seconds with the same history: next page, next stage, another surface. What is cached is keyed
by everything that went into it, never by a user's name, so a corrected event, a slid window or other weights on the
user's side make another key.
Histories, bytes and time only; what encodes is handed in.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcast.protocol.report import CacheResult
from kvcast.serving.kv_memory import KVMemory, bytes_of

Ids = npt.NDArray[np.int64]
# One user's KV, as its model lays it out, each array with a batch axis of 1.
Arrays = tuple[npt.NDArray[np.float32], ...]
Shapes = Callable[[int], Sequence[tuple[int, ...]]]
# Encodes the users at these places of the histories, into the arrays given for each (None: into its own).
Encode = Callable[[list[int], list[Arrays | None]], list[Arrays]]

# What an entry costs beside its KV and its history: the objects that hold them, generously.
ENTRY_OVERHEAD_BYTES = 2048


class HistoryKey(NamedTuple):
    """What user KV depends on, in full. A dictionary compares it, so histories of equal hash do not meet."""

    kv_id: str
    content: bytes


class Found(NamedTuple):
    """One user's KV and where it came from."""

    arrays: Arrays
    cache: CacheResult


@dataclass
class Counts:
    """What has happened since the start. A user asked for is one hit or one miss, or belongs to a call that failed.

    hits: found, or made by another caller meanwhile (waits, a part of hits). misses: encoded by the asker; each ends as
    one of stored, refused (larger than the budget, or no room beside what is being read), failed.
    evictions: gave way to others. expirations: reached their time to live.
    """

    hits: int = 0
    misses: int = 0
    waits: int = 0
    stored: int = 0
    refused: int = 0
    failed: int = 0
    evictions: int = 0
    expirations: int = 0


class EncodingFailedError(Exception):
    """The encoding that other requests wait for has failed."""


@dataclass
class _Entry:
    arrays: Arrays
    size: int
    made: float


@dataclass
class _Flight:
    """An encoding under way. The future gives the arrays to the requests that wait for it."""

    size: int
    space: Arrays | None
    future: "Future[Arrays]" = field(default_factory=Future)


class UserKVCache:
    """Keeps the KV of recent users within a budget of bytes; safe to use from several threads.

    Least recently used goes first. Concurrent requests for one history encode it once (*single flight*): the first one
    claims it, the others wait. A caller finishes its own claims before it waits for another's, so no two can wait for
    each other.
    """

    def __init__(
        self,
        kv_id: str,
        shapes: Shapes,
        budget_bytes: int,
        time_to_live: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty cache.

        Args:
            kv_id: that of the release that encodes.
            shapes: the shapes of one user's arrays, for a history of L events.
            budget_bytes: for KV, histories and bookkeeping together; 0 turns the cache off.
            time_to_live: seconds after which an entry is encoded again; 0 for no limit.
            clock: seconds from any start, never going back.
        """
        self.kv_id = kv_id
        self.budget_bytes = budget_bytes
        self.time_to_live = time_to_live
        self.counts = Counts()
        self._shapes = shapes
        self._clock = clock
        self._memory = KVMemory(budget_bytes)
        self._lock = threading.Lock()
        self._entries: OrderedDict[HistoryKey, _Entry] = OrderedDict()  # least recently used first
        self._ages: OrderedDict[HistoryKey, None] = OrderedDict()  # oldest first
        self._flights: dict[HistoryKey, _Flight] = {}
        self._bytes = 0

    @property
    def is_on(self) -> bool:
        """Whether anything can be cached."""
        return self.budget_bytes > 0

    @property
    def bytes_held(self) -> int:
        """Bytes of the entries and of what is being made, never more than the budget."""
        return self._bytes

    @property
    def entries(self) -> int:
        """Users in the cache."""
        return len(self._entries)

    def fits(self, history: Ids) -> bool:
        """Whether this history's KV is small enough to be cached."""
        return self._size(len(history), history.nbytes) <= self.budget_bytes

    def holds(self, history: Ids) -> bool:
        """Whether this history's KV would be found now. Asking is not using: order and counts stay."""
        key = HistoryKey(self.kv_id, history.tobytes())
        with self._lock:
            return key in self._entries and not self._is_expired(key)

    def fetch(self, histories: Sequence[Ids], encode: Encode) -> list[Found]:
        """Return the KV of every user, in order; what is not cached is encoded, each history once.

        Args:
            histories: stripped histories, INT64 `[L, history_fields]` each.
            encode: makes the KV of some of them. What it raises, this call raises, and nothing is cached.
        """
        if not self.is_on:
            places = list(range(len(histories)))
            return [Found(arrays, CacheResult.OFF) for arrays in _encode_all(encode, places, [None] * len(places))]
        keys = [HistoryKey(self.kv_id, history.tobytes()) for history in histories]
        claims: dict[int, _Flight] = {}
        try:
            with self._lock:
                self._expire()
                # Hits first, so that a claim evicts no entry that is asked for here.
                found = {place: self._hit(key) for place, key in enumerate(keys) if key in self._entries}
                waiting = self._claim_missing(keys, histories, found, claims)
            made = _encode_all(encode, list(claims), [flight.space for flight in claims.values()])
        except BaseException:
            self._give_up(keys, claims)
            raise
        self._land(keys, claims, made)
        found |= {place: Found(arrays, CacheResult.MISS) for place, arrays in zip(claims, made, strict=True)}
        found |= self._wait(waiting, histories, encode)
        return [found[place] for place in range(len(histories))]

    def forget(self) -> None:
        """Forget every user and every count, as if nothing had happened; not while anything is being encoded."""
        with self._lock:
            while self._entries:
                self._drop(next(iter(self._entries)))
            self.counts = Counts()

    def check(self) -> None:
        """Check that nothing got lost or counted twice.

        Raises:
            AssertionError: something was; this is a fault of this module.
        """
        with self._lock:
            counts = self.counts
            sizes = [entry.size for entry in self._entries.values()]
            reserved = [flight.size for flight in self._flights.values() if flight.space is not None]
            problems = {
                "bytes": self._bytes != sum(sizes) + sum(reserved),
                "budget": self._bytes > self.budget_bytes,
                "ages": set(self._ages) != set(self._entries),
                "misses": counts.misses != counts.stored + counts.refused + counts.failed + len(self._flights),
                "entries": counts.stored != len(self._entries) + counts.evictions + counts.expirations,
                "memory": self._memory.size - self._memory.count_free()
                < sum(bytes_of([array.shape for array in entry.arrays]) for entry in self._entries.values()),
                "waits": counts.waits > counts.hits,
            }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise AssertionError(f"user KV cache: {', '.join(wrong)} do not add up: {counts}, {self._bytes} bytes")

    def _size(self, length: int, content_bytes: int) -> int:
        return bytes_of(self._shapes(length)) + content_bytes + ENTRY_OVERHEAD_BYTES

    def _hit(self, key: HistoryKey) -> Found:
        self._entries.move_to_end(key)
        self.counts.hits += 1
        return Found(self._entries[key].arrays, CacheResult.HIT)

    def _claim_missing(
        self, keys: list[HistoryKey], histories: Sequence[Ids], found: dict[int, Found], claims: dict[int, _Flight]
    ) -> dict[int, _Flight]:
        """Claim, into `claims`, what is neither cached nor under way; return the flights of the others."""
        waiting = {}
        for place, key in enumerate(keys):
            if place in found:
                continue
            if key in self._flights:
                waiting[place] = self._flights[key]
            else:
                own = {keys[found_place] for found_place in found}
                claims[place] = self._flights[key] = self._claim(key, len(histories[place]), own)
                self.counts.misses += 1
        return waiting

    def _claim(self, key: HistoryKey, length: int, asked: set[HistoryKey]) -> _Flight:
        """Make room for a user's KV: no entry that is asked for is evicted, and none for a user who is too large.

        Where room does not come, because what was evicted is still being read, the user is encoded and not cached.
        """
        size, shapes = self._size(length, len(key.content)), self._shapes(length)
        if size > self.budget_bytes:
            return _Flight(0, None)
        space = self._evict_oldest(size, shapes, asked)
        if space is None and self._evict_neighbours(bytes_of(shapes), asked):
            space = self._evict_oldest(size, shapes, asked)
        if space is None:
            return _Flight(0, None)
        self._bytes += size
        return _Flight(size, space)

    def _evict_oldest(self, size: int, shapes: Sequence[tuple[int, ...]], asked: set[HistoryKey]) -> Arrays | None:
        """Return room, after evicting the least recently used as far as their bytes are needed."""
        evicted = 0
        while True:
            fits = self._bytes + size <= self.budget_bytes
            space = self._memory.allocate(shapes) if fits else None
            if space is not None:
                return space
            oldest = next((each for each in self._entries if each not in asked), None)
            if oldest is None or (fits and evicted >= size):
                return None  # enough bytes are free, but apart
            evicted += self._entries[oldest].size
            self._evict(oldest)

    def _evict_neighbours(self, length: int, asked: set[HistoryKey]) -> bool:
        """Evict entries that lie side by side over `length` bytes; of all such, those not used for longest."""
        ages = {key: age for age, key in enumerate(self._entries)}  # 0: least recently used
        blocks = [(*self._memory.locate(entry.arrays), key) for key, entry in self._entries.items() if key not in asked]
        spans = sorted(
            [*blocks, *((start, end, None) for start, end in self._memory.list_free())], key=lambda span: span[0]
        )
        best: tuple[int, list[HistoryKey]] | None = None
        for first, (start, _, _) in enumerate(spans):
            youngest, reached, keys = -1, start, []
            for begin, end, key in (spans[at] for at in range(first, len(spans))):
                if begin != reached or reached - start >= length:
                    break
                reached = end
                if key is not None:
                    keys.append(key)
                    youngest = max(youngest, ages[key])
            if reached - start >= length and (best is None or youngest < best[0]):
                best = youngest, keys
        for key in best[1] if best else []:
            self._evict(key)
        return best is not None

    def _give_up(self, keys: list[HistoryKey], claims: dict[int, _Flight]) -> None:
        """Cache nothing of a call that failed, and wake the requests that wait for it: they encode themselves."""
        with self._lock:
            for place, flight in claims.items():
                del self._flights[keys[place]]
                self._bytes -= flight.size
                flight.space = None
                self.counts.failed += 1
        for flight in claims.values():
            # Not the error itself: it holds the frames that hold the claims, and memory would wait for the collector.
            flight.future.set_exception(EncodingFailedError())

    def _land(self, keys: list[HistoryKey], claims: dict[int, _Flight], made: list[Arrays]) -> None:
        """Cache what was encoded into our memory, and hand everything to the requests that wait."""
        with self._lock:
            for (place, flight), arrays in zip(claims.items(), made, strict=True):
                key = keys[place]
                del self._flights[key]
                if flight.space is None:
                    self.counts.refused += 1
                    continue
                self._entries[key] = _Entry(arrays, flight.size, self._clock())
                self._ages[key] = None
                self.counts.stored += 1
        for flight, arrays in zip(claims.values(), made, strict=True):
            flight.future.set_result(arrays)

    def _wait(self, waiting: dict[int, _Flight], histories: Sequence[Ids], encode: Encode) -> dict[int, Found]:
        """Return what others made meanwhile; encode where they failed, perhaps for reasons of their own."""
        done = {place: flight.future for place, flight in waiting.items() if flight.future.exception() is None}
        with self._lock:
            self.counts.hits += len(done)
            self.counts.waits += len(done)
        found = {place: Found(future.result(), CacheResult.HIT) for place, future in done.items()}
        again = [place for place in waiting if place not in done]
        if again:
            retried = self.fetch(
                [histories[place] for place in again],
                lambda places, spaces: encode([again[place] for place in places], spaces),
            )
            found |= dict(zip(again, retried, strict=True))
        return found

    def _is_expired(self, key: HistoryKey) -> bool:
        return 0 < self.time_to_live <= self._clock() - self._entries[key].made

    def _expire(self) -> None:
        """Forget what has reached its time to live."""
        while self._ages and self._is_expired(next(iter(self._ages))):
            self._drop(next(iter(self._ages)))
            self.counts.expirations += 1

    def _evict(self, key: HistoryKey) -> None:
        self._drop(key)
        self.counts.evictions += 1

    def _drop(self, key: HistoryKey) -> None:
        """Forget one user. Its memory is free when the last reader of its arrays is done."""
        self._bytes -= self._entries.pop(key).size
        del self._ages[key]


def _encode_all(encode: Encode, places: list[int], spaces: list[Arrays | None]) -> list[Arrays]:
    made = encode(places, spaces) if places else []
    if len(made) != len(places):
        raise RuntimeError(f"{len(places)} histories were encoded into {len(made)} KV")
    return made
