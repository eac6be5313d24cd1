"""The `doc_fusion` model: user KV of this release and N candidates → N scores, the KV never copied over candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.contract.errors import InvalidRequestError
from kvcast.contract.tensors import (
    CANDIDATES,
    DOC_FUSION,
    RELEASE,
    SCORES,
    USER_KEYS,
    USER_VALUES,
    layer_tensor_name,
)
from kvcast.contract.validation import (
    check_candidates,
    check_release,
    check_same_users,
    check_user_kv,
)
from kvcast.runtime.packing import plan_runs, stack_padded
from kvcast.runtime.serve import ServedModel, Tensors
from kvcast.runtime.user_kv import UserKV, stack_user_kv

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# User slots, or item tokens where these are more, in one run. Packing users means copying their KV into one rectangle;
# for a long history that costs more than the run that it saves, so it stays alone and is read where it lies.
SLOTS_PER_CPU_RUN = 512
SLOTS_PER_GPU_RUN = 8192


@dataclass(frozen=True)
class FusionJob:
    """One request: the KV of its users and INT64 `[B, N, T]` candidates."""

    user_kv: UserKV
    candidates: Ids


class DocFusion(ServedModel[FusionJob]):
    """Scores the candidates of several requests, packed into as few runs as pay."""

    spec = DOC_FUSION

    def check(self, tensors: Tensors, wanted: Sequence[str]) -> FusionJob:  # noqa: ARG002 always scores
        """Check release, KV and candidates."""
        manifest = self.artefact.manifest
        keys, values = tensors[USER_KEYS.name], tensors[USER_VALUES.name]
        check_release(tensors[RELEASE.name], len(keys), manifest.release)
        check_user_kv(keys, values, manifest.user_kv, manifest.limits)
        candidates = check_candidates(tensors[CANDIDATES.name], manifest.candidate_fields, manifest.limits)
        check_same_users(USER_KEYS.name, len(keys), CANDIDATES.name, len(candidates))
        return FusionJob(UserKV(keys, values), candidates)

    def run(self, jobs: Sequence[FusionJob]) -> list[Tensors]:
        """Score all jobs."""
        return [{SCORES.name: scores} for scores in self.score(jobs)]

    def score(self, jobs: Sequence[FusionJob]) -> list[Floats]:
        """Return scores FP32 `[B, N]` of each job."""
        users = [(job, row) for job in jobs for row in range(job.user_kv.users)]
        limit = SLOTS_PER_GPU_RUN if self.artefact.is_on_gpu else SLOTS_PER_CPU_RUN
        scored: dict[int, Floats] = {}
        # A run is as wide as its longest history and as tall as its longest list of candidates.
        tokens = self.artefact.manifest.dims.candidate_tokens
        sizes = [max(job.user_kv.slots, job.candidates.shape[1] * tokens) for job, _ in users]
        for run in plan_runs(sizes, limit):
            parts = [users[index][0].user_kv.take(users[index][1], users[index][0].user_kv.slots) for index in run]
            candidates = [users[index][0].candidates[users[index][1]] for index in run]
            user_kv = stack_user_kv(parts, self.artefact.manifest.user_kv)
            scores = self._fuse(user_kv, stack_padded(candidates))
            for index, row, rows in zip(run, scores, candidates, strict=True):
                scored[index] = row[: len(rows)]
        in_order = iter(scored[index] for index in range(len(users)))
        return [np.stack([next(in_order) for _ in range(job.user_kv.users)]) for job in jobs]

    def make_warm_up(self) -> Tensors:
        """Return the expected number of candidates, and zeros of the expected length for user KV."""
        manifest = self.artefact.manifest
        length, count = manifest.workload.history, manifest.workload.candidates
        return {
            USER_KEYS.name: np.zeros((1, *manifest.user_kv.keys_shape(length)), np.float32),
            USER_VALUES.name: np.zeros((1, *manifest.user_kv.values_shape(length)), np.float32),
            RELEASE.name: np.frombuffer(bytes.fromhex(manifest.release), np.uint8)[None],
            CANDIDATES.name: np.ones((1, count, len(manifest.candidate_fields)), np.int64),
        }

    def _fuse(self, user_kv: UserKV, candidates: Ids) -> Floats:
        """Run the graph once: `[B, N]`. A layer of a single user's KV is a view, not a copy."""
        feeds: dict[str, npt.NDArray[np.generic]] = {CANDIDATES.name: np.ascontiguousarray(candidates)}
        for layer in range(self.artefact.manifest.user_kv.layers):
            feeds[layer_tensor_name(USER_KEYS, layer)] = user_kv.keys[:, layer]
            feeds[layer_tensor_name(USER_VALUES, layer)] = user_kv.values[:, layer]
        (scores,) = self.artefact.session.run([SCORES.name], feeds)
        if not np.isfinite(scores).all():
            # Our own encoder never gets here: its KV is far from overflow.
            raise InvalidRequestError(
                f"{USER_KEYS.name}, {USER_VALUES.name}: expected user KV as the encoder makes "
                "it, got numbers so large that scores overflow"
            )
        return np.asarray(scores)
