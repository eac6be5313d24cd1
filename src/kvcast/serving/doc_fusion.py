"""The `doc_fusion` model: user KV of this `kv_id` and N candidates → N scores, the KV never copied over candidates."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.tensors import (
    CANDIDATES,
    DOC_FUSION,
    FUSE_REPORT,
    KV_ID,
    KV_ORIGIN,
    REPORT_PARAMETER,
    SCORES,
    USER_KEYS,
    USER_VALUES,
    layer_tensor_name,
)
from kvcast.protocol.validation import (
    check_candidates,
    check_kv_id,
    check_same_users,
    check_user_kv,
)
from kvcast.serving.kv_origin import is_own_kv
from kvcast.serving.model import Request, ServedModel, Tensors, write_strings
from kvcast.serving.packing import plan_groups, plan_runs, stack_padded
from kvcast.serving.user_kv import KVArrays, stack_user_kv

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# User slots, or item tokens where these are more, in one run. Packing users means copying their KV into one rectangle;
# for a long history that costs more than the run that it saves, so it stays alone and is read where it lies.
SLOTS_PER_CPU_RUN = 512
SLOTS_PER_GPU_RUN = 8192


@dataclass(frozen=True)
class FusionJob:
    """One request: the KV of its users and INT64 `[B, N, T]` candidates."""

    user_kv: KVArrays
    candidates: Ids
    wants_report: bool = False


class DocFusion(ServedModel[FusionJob]):
    """Scores the candidates of several requests, packed into as few runs as pay."""

    spec = DOC_FUSION

    def check(self, request: Request) -> FusionJob:
        """Check `kv_id`, KV and candidates."""
        manifest, tensors = self.artefact.manifest, request.tensors
        keys, values = tensors[USER_KEYS.name], tensors[USER_VALUES.name]
        check_kv_id(tensors[KV_ID.name], len(keys), manifest.kv_id)
        is_own = is_own_kv(tensors.get(KV_ORIGIN.name))
        check_user_kv(keys, values, manifest.user_kv, manifest.limits, is_own=is_own)
        candidates = check_candidates(tensors[CANDIDATES.name], manifest.candidate_fields, manifest.limits)
        check_same_users(USER_KEYS.name, len(keys), CANDIDATES.name, len(candidates))
        return FusionJob(KVArrays(keys, values), candidates, request.asks_for(REPORT_PARAMETER))

    def plan(self, jobs: Sequence[FusionJob]) -> list[list[int]]:
        """Each in turn, packed where that pays."""
        sizes = [job.user_kv.users * self._measure(job) for job in jobs]
        return plan_groups(sizes, self._slots_per_run)

    def run(self, jobs: Sequence[FusionJob]) -> list[Tensors]:
        """Score all jobs."""
        outputs = []
        for job, (scores, seconds) in zip(jobs, self._score_timed(jobs), strict=True):
            tensors: Tensors = {SCORES.name: scores}
            if job.wants_report:
                tensors[FUSE_REPORT.name] = write_strings(json.dumps({"fuse_seconds": each}) for each in seconds)
            outputs.append(tensors)
        return outputs

    def score(self, jobs: Sequence[FusionJob]) -> list[Floats]:
        """Return scores FP32 `[B, N]` of each job."""
        return [scores for scores, _ in self._score_timed(jobs)]

    @property
    def _slots_per_run(self) -> int:
        return SLOTS_PER_GPU_RUN if self.artefact.is_on_gpu else SLOTS_PER_CPU_RUN

    def _measure(self, job: FusionJob) -> int:
        """A run is as wide as its longest history and as tall as its longest list of candidates."""
        return max(job.user_kv.slots, job.candidates.shape[1] * self.artefact.manifest.dims.candidate_tokens)

    def _score_timed(self, jobs: Sequence[FusionJob]) -> list[tuple[Floats, list[float]]]:
        """Return, for each job, scores FP32 `[B, N]` and the seconds of each user's run."""
        users = [(job, row) for job in jobs for row in range(job.user_kv.users)]
        scored: dict[int, tuple[Floats, float]] = {}
        for run in plan_runs([self._measure(job) for job, _ in users], self._slots_per_run):
            started = time.perf_counter()
            parts = [users[index][0].user_kv.take(users[index][1], users[index][0].user_kv.slots) for index in run]
            candidates = [users[index][0].candidates[users[index][1]] for index in run]
            user_kv = stack_user_kv(parts, self.artefact.manifest.user_kv)
            scores = self._fuse(user_kv, stack_padded(candidates))
            spent = time.perf_counter() - started
            self.stopwatch.fuse.append(spent)
            scored.update(
                (index, (row[: len(own)], spent)) for index, row, own in zip(run, scores, candidates, strict=True)
            )
        in_order = iter(scored[index] for index in range(len(users)))
        by_job = [[next(in_order) for _ in range(job.user_kv.users)] for job in jobs]
        return [(np.stack([scores for scores, _ in own]), [seconds for _, seconds in own]) for own in by_job]

    def make_warm_up(self) -> Tensors:
        """Return the expected number of candidates, and zeros of the expected length for user KV."""
        manifest = self.artefact.manifest
        length, count = manifest.workload.history, manifest.workload.candidates
        return {
            USER_KEYS.name: np.zeros((1, *manifest.user_kv.keys_shape(length)), np.float32),
            USER_VALUES.name: np.zeros((1, *manifest.user_kv.values_shape(length)), np.float32),
            KV_ID.name: np.frombuffer(bytes.fromhex(manifest.kv_id), np.uint8)[None],
            CANDIDATES.name: np.ones((1, count, len(manifest.candidate_fields)), np.int64),
        }

    def _fuse(self, user_kv: KVArrays, candidates: Ids) -> Floats:
        """Run the graph once: `[B, N]`. A layer of a single user's KV is a view, not a copy."""
        feeds: dict[str, npt.NDArray[np.generic]] = {CANDIDATES.name: np.ascontiguousarray(candidates)}
        for layer in range(self.artefact.manifest.user_kv.layers):
            feeds[layer_tensor_name(USER_KEYS, layer)] = user_kv.keys[:, layer]
            feeds[layer_tensor_name(USER_VALUES, layer)] = user_kv.values[:, layer]
        scores = self.artefact.run([SCORES.name], feeds)[SCORES.name]
        if not np.isfinite(scores).all():
            # Our own encoder never gets here: its KV is far from overflow.
            raise InvalidRequestError(
                f"{USER_KEYS.name}, {USER_VALUES.name}: expected user KV as the encoder makes "
                "it, got numbers so large that scores overflow"
            )
        return np.asarray(scores)
