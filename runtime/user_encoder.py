"""The `user_encoder` model: a user's history → per-layer KV, the release that made it, and the manifest on request."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.contract.tensors import HISTORY, MANIFEST, RELEASE, USER_ENCODER, USER_KEYS, USER_VALUES
from kvcast.contract.validation import check_history
from kvcast.runtime.artefact import Artefact
from kvcast.runtime.packing import plan_runs, stack_padded, strip_padding
from kvcast.runtime.serve import ServedModel, Tensors
from kvcast.runtime.user_kv import UserKV, stack_user_kv

Ids = npt.NDArray[np.int64]

# Padded events in one run. On a CPU a GEMM of a thousand rows is as fast a row as any, and a long history alone is
# neither padded nor copied; a GPU wants more rows at once.
EVENTS_PER_CPU_RUN = 1024
EVENTS_PER_GPU_RUN = 32768


@dataclass(frozen=True)
class EncodeJob:
    """One request: a stripped history per user, and the outputs that are wanted."""

    histories: list[Ids]
    wanted: frozenset[str]

    @property
    def wants_kv(self) -> bool:
        """Whether anything has to be encoded."""
        return bool(self.wanted & {USER_KEYS.name, USER_VALUES.name})


class UserEncoder(ServedModel[EncodeJob]):
    """Encodes histories of several requests, packed into as few runs as pay."""

    spec = USER_ENCODER

    def __init__(self, artefact: Artefact) -> None:
        super().__init__(artefact)
        manifest = artefact.manifest
        self._release = np.frombuffer(bytes.fromhex(manifest.release), np.uint8)
        self._manifest = np.array([manifest.to_json().encode()], np.object_)
        self._events_per_run = EVENTS_PER_GPU_RUN if artefact.is_on_gpu else EVENTS_PER_CPU_RUN

    def check(self, tensors: Tensors, wanted: Sequence[str]) -> EncodeJob:
        """Check the history. A request for the manifest alone may hold any history, which is not read."""
        history, manifest = tensors[HISTORY.name], self.artefact.manifest
        if set(wanted) == {MANIFEST.name}:
            return EncodeJob([np.zeros((1, 0), np.int64)] * len(history), frozenset(wanted))
        ids = check_history(history, manifest.history_fields, manifest.limits)
        return EncodeJob([strip_padding(user) for user in ids], frozenset(wanted))

    def run(self, jobs: Sequence[EncodeJob]) -> list[Tensors]:
        """Encode the users of all jobs that want KV."""
        encoded = iter(self.encode([history for job in jobs if job.wants_kv for history in job.histories]))
        outputs = []
        for job in jobs:
            users = len(job.histories)
            tensors: Tensors = {}
            if RELEASE.name in job.wanted:
                tensors[RELEASE.name] = np.tile(self._release, (users, 1))
            if MANIFEST.name in job.wanted:
                tensors[MANIFEST.name] = np.tile(self._manifest, (users, 1))
            if job.wants_kv:
                user_kv = stack_user_kv([next(encoded) for _ in range(users)], self.artefact.manifest.user_kv)
                by_name = {USER_KEYS.name: user_kv.keys, USER_VALUES.name: user_kv.values}
                tensors |= {name: array for name, array in by_name.items() if name in job.wanted}
            outputs.append(tensors)
        return outputs

    def encode(self, histories: Sequence[Ids]) -> list[UserKV]:
        """Encode stripped histories INT64 `[L, fields]`, each L at least 1, into one `UserKV` a user."""
        layout = self.artefact.manifest.user_kv
        lengths = [len(history) for history in histories]
        encoded: dict[int, UserKV] = {}
        for run in plan_runs(lengths, self._events_per_run):
            feeds = {HISTORY.name: stack_padded([histories[user] for user in run])}  # [users, L, fields]
            keys, values = self.artefact.session.run([USER_KEYS.name, USER_VALUES.name], feeds)
            for row, user in enumerate(run):
                encoded[user] = UserKV(keys, values).take(row, layout.slots(lengths[user]))
        return [encoded[user] for user in range(len(histories))]

    def make_warm_up(self) -> Tensors:
        """Return a history of the expected length."""
        manifest = self.artefact.manifest
        return {HISTORY.name: np.ones((1, manifest.workload.history, len(manifest.history_fields)), np.int64)}
