"""The `ranker_full` model: the traditional scheme, every candidate in a full sequence of its own.

It exists to be compared with: same weights, same mask, no shared KV. Slow on purpose, and honest about it: it is run
in chunks that suit the machine, not one sequence at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.protocol.errors import ServerFaultError
from kvcast.protocol.tensors import CANDIDATES, HISTORY, RANKER_FULL, SCORES
from kvcast.protocol.validation import check_candidates, check_history, check_same_users
from kvcast.serving.model import Request, ServedModel, Tensors
from kvcast.serving.packing import strip_padding

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Bytes of one layer's attention scores in a chunk: bounds memory for any N, and fits the last-level cache.
SCORE_BYTES_PER_CHUNK = 64 << 20


@dataclass(frozen=True)
class FullJob:
    """One request: a stripped history per user and INT64 `[B, N, T]` candidates."""

    histories: list[Ids]
    candidates: Ids


class FullRanker(ServedModel[FullJob]):
    """Ranks by N full forwards."""

    spec = RANKER_FULL

    def check(self, request: Request) -> FullJob:
        """Check history and candidates."""
        manifest, tensors = self.artefact.manifest, request.tensors
        history = check_history(tensors[HISTORY.name], manifest.history_fields, manifest.limits)
        candidates = check_candidates(tensors[CANDIDATES.name], manifest.candidate_fields, manifest.limits)
        check_same_users(HISTORY.name, len(history), CANDIDATES.name, len(candidates))
        return FullJob([strip_padding(user) for user in history], candidates)

    def plan(self, jobs: Sequence[FullJob]) -> list[list[int]]:
        """Each alone, in turn."""
        return [[place] for place in range(len(jobs))]

    def run(self, jobs: Sequence[FullJob]) -> list[Tensors]:
        """Score every job, one user after the other."""
        return [
            {SCORES.name: np.stack([self.score(*user) for user in zip(job.histories, job.candidates, strict=True)])}
            for job in jobs
        ]

    def score(self, history: Ids, candidates: Ids, chunk: int | None = None) -> Floats:
        """Score one user's candidates INT64 `[N, T]` after a history INT64 `[L, fields]`: FP32 `[N]`.

        `chunk` sequences run at a time; by default as many as `SCORE_BYTES_PER_CHUNK` allows.
        """
        dims = self.artefact.manifest.dims
        sequence = len(history) + dims.candidate_tokens
        chunk = chunk or max(1, SCORE_BYTES_PER_CHUNK // (4 * dims.heads * sequence**2))
        scores = []
        for first in range(0, len(candidates), chunk):
            own = candidates[first : first + chunk, None]  # [n, 1, T]: every candidate its own sequence
            feeds = {HISTORY.name: np.repeat(history[None], len(own), axis=0), CANDIDATES.name: own}
            scores.append(self.artefact.session.run([SCORES.name], feeds)[0][:, 0])
        joined = np.concatenate(scores)
        if not np.isfinite(joined).all():
            raise ServerFaultError(f"{SCORES.name}: expected finite numbers, got {joined}")
        return np.asarray(joined, np.float32)

    def make_warm_up(self) -> Tensors:
        """Return one candidate, and a history of the expected length."""
        manifest = self.artefact.manifest
        return {
            HISTORY.name: np.ones((1, manifest.workload.history, len(manifest.history_fields)), np.int64),
            CANDIDATES.name: np.ones((1, 1, len(manifest.candidate_fields)), np.int64),
        }
