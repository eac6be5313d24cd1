"""The `user_encoder` model: a user's history → per-layer KV, its `kv_id`, and the manifest on request.

A request for `kv_id` alone is a prefetch: the user is encoded and cached, and no KV leaves the process.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.tensors import (
    ENCODE_REPORT,
    HISTORY,
    KV_ID,
    KV_ORIGIN,
    MANIFEST,
    REPORT_PARAMETER,
    USER_ENCODER,
    USER_KEYS,
    USER_VALUES,
)
from kvcast.protocol.validation import check_history
from kvcast.serving.artefact import Artefact
from kvcast.serving.kv_origin import make_kv_origin
from kvcast.serving.model import Request, ServedModel, Tensors, write_strings
from kvcast.serving.options import CACHE_OFF, CacheOptions
from kvcast.serving.packing import plan_groups, plan_runs, stack_padded, strip_padding
from kvcast.serving.user_kv import KVArrays, stack_user_kv
from kvcast.serving.user_kv_cache import Arrays, UserKVCache

Ids = npt.NDArray[np.int64]

# Padded events in one run. On a CPU a GEMM of a thousand rows is as fast a row as any, and a long history alone is
# neither padded nor copied; a GPU wants more rows at once.
EVENTS_PER_CPU_RUN = 1024
EVENTS_PER_GPU_RUN = 32768


@dataclass(frozen=True)
class EncodeJob:
    """One request: a stripped history per user, the outputs that are wanted, and whether to say how they were made."""

    histories: list[Ids]
    wanted: frozenset[str]
    wants_report: bool = False

    @property
    def wants_kv(self) -> bool:
        """Whether user KV has to leave the process."""
        return bool(self.wanted & {USER_KEYS.name, USER_VALUES.name})

    @property
    def is_prefetch(self) -> bool:
        """Whether user KV has to be made, to be cached."""
        return KV_ID.name in self.wanted and not self.wants_kv


class UserEncoder(ServedModel[EncodeJob]):
    """Encodes histories of several requests, packed into as few runs as pay; recent users are found in the cache."""

    spec = USER_ENCODER
    cache: UserKVCache

    def __init__(self, artefact: Artefact, cache: CacheOptions = CACHE_OFF) -> None:
        super().__init__(artefact)
        manifest, layout = artefact.manifest, artefact.manifest.user_kv
        self._kv_id = np.frombuffer(bytes.fromhex(manifest.kv_id), np.uint8)
        self._manifest = np.array([manifest.to_json().encode()], np.object_)
        self._events_per_run = EVENTS_PER_GPU_RUN if artefact.is_on_gpu else EVENTS_PER_CPU_RUN
        self.cache = UserKVCache(
            manifest.kv_id,
            lambda length: [(1, *layout.keys_shape(length)), (1, *layout.values_shape(length))],
            cache.budget_bytes,
            cache.time_to_live,
        )

    def check(self, request: Request) -> EncodeJob:
        """Check the history. A request for the manifest alone may hold any history, which is not read."""
        history, manifest, wanted = request.tensors[HISTORY.name], self.artefact.manifest, frozenset(request.wanted)
        wants_report = request.asks_for(REPORT_PARAMETER)
        if wanted == {MANIFEST.name}:
            return EncodeJob([np.zeros((1, 0), np.int64)] * len(history), wanted)
        ids = check_history(history, manifest.history_fields, manifest.limits)
        return EncodeJob([strip_padding(user) for user in ids], wanted, wants_report)

    def plan(self, jobs: Sequence[EncodeJob]) -> list[list[int]]:
        """Cache hits first, each request alone; then misses in turn, packed where that pays."""
        slow = [place for place, job in enumerate(jobs) if any(self._is_missing(job, user) for user in job.histories)]
        sizes = [sum(len(history) for history in jobs[place].histories) for place in slow]
        runs = plan_groups(sizes, self._events_per_run)
        return [[place] for place in range(len(jobs)) if place not in slow] + [
            [slow[each] for each in run] for run in runs
        ]

    def run(self, jobs: Sequence[EncodeJob]) -> list[Tensors]:
        """Encode the users of all jobs, as far as they are not cached."""
        users = [
            (place, row)
            for place, job in enumerate(jobs)
            for row, history in enumerate(job.histories)
            if self._is_needed(job, history)
        ]
        histories = [jobs[place].histories[row] for place, row in users]
        seconds: dict[tuple[int, int], float] = {}

        def encode(places: list[int], spaces: list[Arrays | None]) -> list[Arrays]:
            rooms = [None if space is None else KVArrays(*space) for space in spaces]
            encoded, spent = self._encode([histories[place] for place in places], rooms)
            seconds.update((users[place], each) for place, each in zip(places, spent, strict=True))
            return list(encoded)

        found = dict(zip(users, self.cache.fetch(histories, encode), strict=True))
        outputs = []
        for place, job in enumerate(jobs):
            keys = [(place, row) for row in range(len(job.histories))]
            kv = [KVArrays(*found[key].arrays) for key in keys if key in found]
            caches = [found[key].cache if key in found else CacheResult.OFF for key in keys]
            reports = [Report(cache, seconds.get(key, 0.0)) for key, cache in zip(keys, caches, strict=True)]
            outputs.append(self._reply(job, kv, reports))
        return outputs

    def encode(self, histories: Sequence[Ids]) -> list[KVArrays]:
        """Encode stripped histories INT64 `[L, fields]`, each L at least 1, into `KVArrays` a user; cache nothing."""
        return self._encode(histories, [None] * len(histories))[0]

    def make_warm_up(self) -> Tensors:
        """Return a history of the expected length."""
        manifest = self.artefact.manifest
        return {HISTORY.name: np.ones((1, manifest.workload.history, len(manifest.history_fields)), np.int64)}

    def _encode(
        self, histories: Sequence[Ids], spaces: Sequence[KVArrays | None]
    ) -> tuple[list[KVArrays], list[float]]:
        """Encode, into the space of each user that has one; return also the seconds of each user's run."""
        layout = self.artefact.manifest.user_kv
        lengths = [len(history) for history in histories]
        encoded: dict[int, KVArrays] = {}
        seconds: dict[int, float] = {}
        for run in plan_runs(lengths, self._events_per_run):
            started = time.perf_counter()
            feeds = {HISTORY.name: stack_padded([histories[user] for user in run])}  # [users, L, fields]
            space = spaces[run[0]] if len(run) == 1 else None
            into = {} if space is None else {USER_KEYS.name: space.keys, USER_VALUES.name: space.values}
            made = self.artefact.run([USER_KEYS.name, USER_VALUES.name], feeds, into)
            user_kv = KVArrays(made[USER_KEYS.name], made[USER_VALUES.name])
            for row, user in enumerate(run):
                own = user_kv if len(run) == 1 else user_kv.take(row, layout.slots(lengths[user]))
                encoded[user] = own if len(run) == 1 else own.copy_into(spaces[user])
            spent = time.perf_counter() - started
            self.stopwatch.encode.append(spent)
            seconds.update(dict.fromkeys(run, spent))
        users = range(len(histories))
        return [encoded[user] for user in users], [seconds[user] for user in users]

    def _is_needed(self, job: EncodeJob, history: Ids) -> bool:
        """Whether a user's KV has to be there: for the reply, or to be cached where it can be."""
        return job.wants_kv or (job.is_prefetch and self.cache.fits(history))

    def _is_missing(self, job: EncodeJob, history: Ids) -> bool:
        return self._is_needed(job, history) and not self.cache.holds(history)

    def _reply(self, job: EncodeJob, users: list[KVArrays], reports: list[Report]) -> Tensors:
        """Return the tensors that a job wants."""
        count = len(job.histories)
        tensors: Tensors = {}
        if KV_ID.name in job.wanted:
            tensors[KV_ID.name] = np.tile(self._kv_id, (count, 1))
        if KV_ORIGIN.name in job.wanted:
            tensors[KV_ORIGIN.name] = make_kv_origin(count, job.wanted)
        if MANIFEST.name in job.wanted:
            tensors[MANIFEST.name] = np.tile(self._manifest, (count, 1))
        if job.wants_kv:
            user_kv = stack_user_kv(users, self.artefact.manifest.user_kv)
            by_name = {USER_KEYS.name: user_kv.keys, USER_VALUES.name: user_kv.values}
            tensors |= {name: array for name, array in by_name.items() if name in job.wanted}
        if job.wants_report:
            tensors[ENCODE_REPORT.name] = write_strings(report.to_json() for report in reports)
        return tensors
