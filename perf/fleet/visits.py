"""Traces for the simulator of many servers: read from a file, or drawn.

Like `clicklog.Trace`, but of millions of visits at once, in time, and without the histories themselves: what matters of
a history is whether it is the same as before.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcast.perf.analyzer import PerfError
from kvcast.perf.fleet.capacity import Visitors, expect

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Visits:
    """Requests in order of time: when, whose (this decides the server), which history (this is what is found again)."""

    seconds: Floats
    users: Ids
    contents: Ids
    sizes: Floats | None = None  # of each history's KV; None: all 1

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.seconds)

    def check(self) -> None:
        """Check that they can be replayed.

        Raises:
            PerfError: they cannot.
        """
        expect(len(self) > 0, "visits", "at least one", 0)
        expect(bool((np.diff(self.seconds) >= 0).all()), "visits", "them in order of time", "time that goes back")


def space_visits(users: Sequence[int], rate: float) -> Visits:
    """Return requests of these users in order, at even times, with histories that never change."""
    ids = np.array(users, np.int64)
    return Visits(np.arange(len(ids)) / rate, ids, ids)


def read_visits(path: Path) -> Visits:
    """Read a trace: CSV with the columns `seconds`, `user`, and optionally `content` and `size`.

    Users and contents may be any text. Without `content` a user's history never changes.

    Raises:
        PerfError: it is not a trace.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        seconds = np.array([float(row["seconds"]) for row in rows])
        users = number([row["user"] for row in rows])
        contents = number([f"{row['user']} {row['content']}" for row in rows]) if "content" in rows[0] else users
        sizes = np.array([float(row["size"]) for row in rows]) if "size" in rows[0] else None
    except OSError as error:
        raise PerfError(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise PerfError(f"{path}: expected CSV with the columns seconds, user, [content], [size]: {error!r}") from error
    order = np.argsort(seconds, kind="stable")
    return Visits(seconds[order], users[order], contents[order], None if sizes is None else sizes[order])


def number(names: Sequence[str]) -> Ids:
    """Return a number for each name, the same for the same."""
    numbers: Ids = np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)
    return numbers


def draw_visits(visitors: Visitors, rate: float, seconds: float, seed: int) -> Visits:
    """Draw the requests of so many seconds, the same for the same seed.

    Visits begin at random times (Poisson), each by a user of Zipf's law, and go on page by page; at the next one the
    user's history is the same, or not. The first user is the most frequent.
    """
    visitors.check()
    expect(rate > 0, "requests a second", "more than 0", rate)
    draw = np.random.default_rng(seed)
    # Visits that began before the first second still go on: draw them, and leave out what is too early.
    before = 12 * visitors.page_seconds * visitors.returns / (1 - visitors.returns)
    count = draw.poisson(rate * (1 - visitors.returns) * (before + seconds))
    begun = np.sort(draw.uniform(-before, seconds, count))
    popularity = np.cumsum(np.arange(1, visitors.users + 1, dtype=np.float64) ** -visitors.exponent)
    expect(count > 0, "visits", "at least one in this time", 0)
    users = np.minimum(np.searchsorted(popularity, draw.uniform(0, popularity[-1], count)), visitors.users - 1)
    contents = number_contents(users, draw.random(count) < visitors.unchanged)
    pages = draw.geometric(1 - visitors.returns, count)
    whose = np.repeat(np.arange(count), pages)
    gaps = draw.exponential(visitors.page_seconds, len(whose))
    first = np.cumsum(pages) - pages  # place of each visit's first page
    since = np.cumsum(gaps)
    times = begun[whose] + since - since[first][whose]
    kept = np.flatnonzero((times >= 0) & (times < seconds))
    order = kept[np.argsort(times[kept], kind="stable")]
    return Visits(times[order], users[whose[order]].astype(np.int64), contents[whose[order]])


def number_contents(users: Ids, is_unchanged: npt.NDArray[np.bool_]) -> Ids:
    """Return a number for each visit's history: that of the user's visit before, where it is unchanged."""
    by_user = np.argsort(users, kind="stable")
    is_new = ~is_unchanged[by_user]
    is_new[0] = True
    is_new[1:] |= users[by_user][1:] != users[by_user][:-1]
    contents = np.empty(len(users), np.int64)
    contents[by_user] = np.cumsum(is_new)
    return contents
