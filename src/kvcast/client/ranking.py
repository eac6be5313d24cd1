"""The answer to a ranking request."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.protocol.report import Report


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate in its place: `index` in the caller's order, the id of its target token, its score."""

    index: int
    item: int
    score: float


@dataclass(frozen=True)
class Ranking:
    """Scores in the caller's order.

    scores: FP32 `[N]`, higher is better; candidates: INT64 `[N, T]` as sent; seconds: from sending to having them,
    from the first sending if there were several. report: how the server made them, if that was asked for.
    attempts: how many times they were asked for. Of candidates that were sent in parts, `seconds` is that of all, the
    report that of the first, `attempts` the most that one part took.
    """

    scores: npt.NDArray[np.float32]
    candidates: npt.NDArray[np.int64]
    seconds: float
    report: Report | None = None
    attempts: int = 1

    def top(self, k: int) -> list[RankedCandidate]:
        """Return the `k` best (all, if there are fewer), best first; equal scores keep the caller's order."""
        if k < 0:
            raise ValueError(f"k: expected 0 or more, got {k}")
        order = np.argsort(-self.scores, kind="stable")[:k]
        return [
            RankedCandidate(int(index), int(self.candidates[index, 0]), float(self.scores[index])) for index in order
        ]
