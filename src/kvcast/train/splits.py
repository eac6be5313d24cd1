"""Splits of requests into training, validation and test by time, and held-out users.

No request with a row at or after the first cut is in the training part. Later requests keep the events before them in
their histories, as when served.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from kvcast.train.log import LogError
from kvcast.train.requests import Requests


@dataclass(frozen=True)
class Split:
    """Three parts in order of time.

    validation_from, test_from: the times from which on requests are in the later parts. left_out: requests with rows on
    both sides of a cut, which are in no part.
    """

    training: Requests
    validation: Requests
    test: Requests
    validation_from: int
    test_from: int
    left_out: int

    def describe(self) -> str:
        """Return the sizes in one line."""
        parts = (("training", self.training), ("validation", self.validation), ("test", self.test))
        sizes = [f"{name} {len(part)} requests, {part.candidate_counts.sum()} rows" for name, part in parts]
        cuts = f"cut at times {self.validation_from} and {self.test_from}"
        return "; ".join([*sizes, cuts, f"{self.left_out} requests across a cut left out"])


def split_by_shares(requests: Requests, validation: float = 0.1, test: float = 0.1) -> Split:
    """Cut where the last `test` of the requests start, and the `validation` before them.

    Requests of the time of a cut are all in the later part, so the shares are met as closely as times allow.

    Raises:
        LogError: the shares leave nothing for training, or there is no request.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise LogError(f"split: expected shares that leave something to train on, got {validation} and {test}")
    if not len(requests):
        raise LogError("split: expected at least one request, got none")
    times = np.sort(requests.time)
    after = int(times[-1]) + 1

    def find_cut(share: float) -> int:
        first = round(len(times) * (1 - share))
        return int(times[first]) if first < len(times) else after

    return split_by_times(requests, find_cut(validation + test), find_cut(test))


def split_by_times(requests: Requests, validation_from: int, test_from: int) -> Split:
    """Cut at these times: requests at the time of a cut are in the later part.

    Raises:
        LogError: the cuts are not in order.
    """
    if validation_from > test_from:
        raise LogError(f"split: expected the cuts in order of time, got {validation_from} and {test_from}")
    cuts = np.array([validation_from, test_from])
    part = np.searchsorted(cuts, requests.time, side="right")
    across = part != np.searchsorted(cuts, requests.last_time, side="right")
    training, validation, test = (requests.select((part == number) & ~across) for number in range(3))
    return Split(training, validation, test, validation_from, test_from, int(across.sum()))


def hold_out_users(requests: Requests, share: float, seed: int = 0) -> tuple[Requests, Requests]:
    """Return the requests of most users, and those of a share of users that is held out.

    Whether a user is held out depends on name and seed alone, so it is the same in every log.

    Raises:
        LogError: the share is not between 0 and 1.
    """
    if not 0 <= share <= 1:
        raise LogError(f"held-out users: expected a share between 0 and 1, got {share}")
    held = np.array([_draw(user, seed) < share for user in requests.users], bool)
    is_held = held[requests.user]
    return requests.select(~is_held), requests.select(is_held)


def _draw(user: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on the user's name and the seed."""
    digest = hashlib.blake2b(user.encode(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(digest, "little") / 2**64
