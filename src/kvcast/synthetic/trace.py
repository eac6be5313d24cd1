"""Requests of returning users in order of time, for tests and measurements of the user KV cache.

A few users return often and most rarely (Zipf's law). A visit has several pages: the next request, between those of
other users, has the same history. Between visits histories grow, and the window of events that a model gets moves on.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvcast.protocol.request import RankRequest
from kvcast.synthetic.generator import ClickLog
from kvcast.synthetic.shop import zipf_shares

Ids = npt.NDArray[np.int64]

# A user's events are drawn this many at a time.
STREAM_EVENTS = 256


@dataclass(frozen=True)
class Traffic:
    """The parameters that determine how often a history is requested again.

    history, candidates: the window of events, and the candidates, of a request. shortest: users start with `shortest`
    to `history` events, uniformly. users: their number. exponent: of Zipf's law over them. return_probability: that the
    next request is another page of a recent visitor, whose history is unchanged. recent: the number of recent visitors.
    growth: mean number of events between two visits of a user.
    """

    history: int
    candidates: int
    shortest: int
    users: int = 10_000
    exponent: float = 1.1
    return_probability: float = 0.5
    recent: int = 32
    growth: float = 3.0


class Visit(NamedTuple):
    """A request and its user."""

    user: int
    request: RankRequest


class Trace:
    """An endless sequence of visits, the same for the same seed."""

    def __init__(self, log: ClickLog, traffic: Traffic, seed: int) -> None:
        self._log, self._traffic = log, traffic
        self._generator = np.random.default_rng(seed)
        self._popularity = zipf_shares(traffic.users, traffic.exponent)  # [users]
        self._events: dict[int, Ids] = {}  # all events of each user, as far as drawn
        self._ends: dict[int, int] = {}  # how many of them are in the past
        self._recent: deque[int] = deque(maxlen=traffic.recent)

    def __iter__(self) -> Iterator[Visit]:
        """Draw visits without end."""
        while True:
            user = self._draw_user()
            events = self._events[user][: self._ends[user]]
            candidates = self._log.draw_candidates(self._traffic.candidates)
            yield Visit(user, RankRequest(events[-self._traffic.history :], candidates))

    def _draw_user(self) -> int:
        draw, traffic = self._generator, self._traffic
        if self._recent and draw.random() < traffic.return_probability:
            return self._recent[int(draw.integers(len(self._recent)))]
        user = int(draw.choice(traffic.users, p=self._popularity))
        if user in self._ends:
            self._ends[user] += 1 + int(draw.poisson(max(0.0, traffic.growth - 1)))
        else:
            self._ends[user] = int(draw.integers(traffic.shortest, traffic.history + 1))
            self._events[user] = self._log.draw_history(self._ends[user] + STREAM_EVENTS)
        while len(self._events[user]) < self._ends[user]:
            self._events[user] = np.concatenate([self._events[user], self._log.draw_history(STREAM_EVENTS)])
        if user in self._recent:
            self._recent.remove(user)
        self._recent.append(user)
        return user
