"""The `ranker_resident` model: encoder, cache and fusion in one process, so that user KV never moves.

On a cache miss a user is encoded and scored in one run of one graph, which leaves the KV in the cache; on a hit the
candidates are only scored. Both are the same session, so every weight is in memory once.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from kvcast.protocol.errors import ServerFaultError
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.tensors import (
    CANDIDATES,
    ENCODE_REPORT,
    FUSE_REPORT,
    HISTORY,
    MANIFEST,
    PREFETCH_PARAMETER,
    RANKER_RESIDENT,
    REPORT_PARAMETER,
    SCORES,
    USE_PAST,
    USER_KEYS,
    USER_VALUES,
    layer_tensor_name,
    past_tensor_name,
)
from kvcast.protocol.validation import check_candidates, check_history, check_no_candidates, check_same_users
from kvcast.serving.artefact import Artefact, SessionOptions
from kvcast.serving.model import Request, ServedModel, Tensors, write_strings
from kvcast.serving.options import CACHE_OFF, CacheOptions
from kvcast.serving.packing import plan_groups, plan_runs, stack_padded, strip_padding
from kvcast.serving.user_kv import KVArrays, stack_user_kv
from kvcast.serving.user_kv_cache import Arrays, UserKVCache

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Each = TypeVar("Each")

# Rows (events, or slots, and item tokens) of one run; see `user_encoder` and `doc_fusion` for why so few.
COLD_ROWS_PER_CPU_RUN = 1024
WARM_ROWS_PER_CPU_RUN = 512
ROWS_PER_GPU_RUN = 16384


@dataclass(frozen=True)
class User:
    """One user of a request: a stripped history INT64 `[L, fields]` and candidates INT64 `[N, T]`; N = 0: only keep."""

    history: Ids
    candidates: Ids


@dataclass(frozen=True)
class ResidentJob:
    """One request."""

    users: list[User]
    wants_report: bool = False
    wants_manifest: bool = False


class Score(NamedTuple):
    """One user's scores FP32 `[N]`, and how they were made."""

    scores: Floats
    report: Report


class Timed(NamedTuple):
    """One user's scores FP32 `[N]`, and the seconds of the run that made them."""

    scores: Floats
    seconds: float


NOT_RUN = Timed(np.zeros(0, np.float32), 0.0)


class ResidentRanker(ServedModel[ResidentJob]):
    """Ranks for users of several requests, recent ones from the cache."""

    spec = RANKER_RESIDENT
    cache: UserKVCache

    def __init__(self, artefact: Artefact, cache: CacheOptions = CACHE_OFF) -> None:
        super().__init__(artefact)
        manifest, layout = artefact.manifest, artefact.manifest.user_kv
        self._layers = layout.layers
        self._layer_names = [
            (layer_tensor_name(USER_KEYS, layer), layer_tensor_name(USER_VALUES, layer))
            for layer in range(layout.layers)
        ]
        self._no_slots = (layout.keys_shape(0)[1:], layout.values_shape(0)[1:])
        self._manifest = np.array([manifest.to_json().encode()], np.object_)

        def shape_user(length: int) -> tuple[tuple[int, ...], ...]:
            keys, values = (1, *layout.keys_shape(length)[1:]), (1, *layout.values_shape(length)[1:])
            return flatten([(keys, values)] * layout.layers)

        self.cache = UserKVCache(manifest.kv_id, shape_user, cache.budget_bytes, cache.time_to_live)

    @classmethod
    def open(cls, folder: Path, options: SessionOptions, cache: CacheOptions = CACHE_OFF) -> Self:
        """Open the exported artefact in `folder`; alone on its cores, its threads may spin while a run lasts."""
        return super().open(folder, replace(options, spins=options.instances == 1), cache)

    def check(self, request: Request) -> ResidentJob:
        """Check history and candidates. A request for the manifest alone may hold any, which are not read."""
        manifest, tensors = self.artefact.manifest, request.tensors
        if set(request.wanted) == {MANIFEST.name}:
            return ResidentJob([User(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.int64))], wants_manifest=True)
        history = check_history(tensors[HISTORY.name], manifest.history_fields, manifest.limits)
        check = check_no_candidates if request.asks_for(PREFETCH_PARAMETER) else check_candidates
        candidates = check(tensors[CANDIDATES.name], manifest.candidate_fields, manifest.limits)
        check_same_users(HISTORY.name, len(history), CANDIDATES.name, len(candidates))
        users = [User(strip_padding(events), rows) for events, rows in zip(history, candidates, strict=True)]
        return ResidentJob(users, request.asks_for(REPORT_PARAMETER))

    def plan(self, jobs: Sequence[ResidentJob]) -> list[list[int]]:
        """Cache hits first, then misses; each in turn, packed where that pays."""
        groups = []
        slow = {
            place
            for place, job in enumerate(jobs)
            if not job.wants_manifest and not all(self.cache.holds(user.history) for user in job.users)
        }
        for places, rows_per_run in (
            ([place for place in range(len(jobs)) if place not in slow], WARM_ROWS_PER_CPU_RUN),
            (sorted(slow), COLD_ROWS_PER_CPU_RUN),
        ):
            sizes = [
                sum(len(user.history) + self._count_item_rows(user) for user in jobs[place].users) for place in places
            ]
            groups += [[places[index] for index in run] for run in plan_groups(sizes, self._limit(rows_per_run))]
        return groups

    def run(self, jobs: Sequence[ResidentJob]) -> list[Tensors]:
        """Score the candidates of all jobs, and keep their users."""
        scored = iter(self.rank([user for job in jobs if not job.wants_manifest for user in job.users]))
        outputs = []
        for job in jobs:
            if job.wants_manifest:
                outputs.append({MANIFEST.name: self._manifest[None]})
                continue
            own = [next(scored) for _ in job.users]
            tensors: Tensors = {SCORES.name: np.stack([each.scores for each in own])}
            if job.wants_report:
                tensors[ENCODE_REPORT.name] = tensors[FUSE_REPORT.name] = write_strings(
                    each.report.to_json() for each in own
                )
            outputs.append(tensors)
        return outputs

    def rank(self, users: Sequence[User]) -> list[Score]:
        """Return the scores of every user, FP32 `[N]`, and how they were made."""
        # A prefetch that cannot be cached is not worth a run.
        asked = [place for place, user in enumerate(users) if len(user.candidates) or self.cache.fits(user.history)]
        cold: dict[int, Timed] = {}

        def encode(indices: list[int], spaces: list[Arrays | None]) -> list[Arrays]:
            places = [asked[index] for index in indices]
            made, timed = self._rank_cold([users[place] for place in places], spaces)
            cold.update(zip(places, timed, strict=True))
            return made

        found = dict(zip(asked, self.cache.fetch([users[place].history for place in asked], encode), strict=True))
        cached = [place for place in asked if place not in cold and len(users[place].candidates)]
        timed = self._rank_warm([users[place] for place in cached], [found[place].arrays for place in cached])
        warm = dict(zip(cached, timed, strict=True))
        scored = []
        for place in range(len(users)):
            cache = found[place].cache if place in found else CacheResult.OFF
            encoded, fused = cold.get(place, NOT_RUN), warm.get(place, NOT_RUN)
            scores = encoded.scores if place in cold else fused.scores
            scored.append(Score(scores, Report(cache, encoded.seconds, fused.seconds)))
        return scored

    def make_warm_up(self) -> Tensors:
        """Return a request of the expected size."""
        manifest = self.artefact.manifest
        length, count = manifest.workload.history, manifest.workload.candidates
        return {
            HISTORY.name: np.ones((1, length, len(manifest.history_fields)), np.int64),
            CANDIDATES.name: np.ones((1, count, len(manifest.candidate_fields)), np.int64),
        }

    def _rank_cold(self, users: Sequence[User], spaces: Sequence[Arrays | None]) -> tuple[list[Arrays], list[Timed]]:
        """Encode and score in the same runs, into the space of each user that has one; return the user KV of each."""
        made: dict[int, Arrays] = {}
        timed: dict[int, Timed] = {}
        sizes = [len(user.history) + self._count_item_rows(user) for user in users]
        for run in plan_runs(sizes, self._limit(COLD_ROWS_PER_CPU_RUN)):
            started = time.perf_counter()
            histories = stack_padded([users[index].history for index in run])  # [users, L, fields]
            nothing = [KVArrays(*(np.zeros((len(run), *shape), np.float32) for shape in self._no_slots))] * self._layers
            space = spaces[run[0]] if len(run) == 1 else None
            outputs = self._run(histories, [users[index].candidates for index in run], nothing, space, use_past=False)
            layers = [KVArrays(outputs[keys], outputs[values]) for keys, values in self._layer_names]
            for row, index in enumerate(run):
                own = layers if len(run) == 1 else self._copy_user(layers, row, users[index], spaces[index])
                made[index] = flatten(own)
            spent = time.perf_counter() - started
            self.stopwatch.encode.append(spent)
            timed.update(self._split_scores(outputs[SCORES.name], run, users, spent))
        return [made[index] for index in range(len(users))], [timed[index] for index in range(len(users))]

    def _rank_warm(self, users: Sequence[User], past: Sequence[Arrays]) -> list[Timed]:
        """Score only, with cached user KV."""
        layout, fields = self.artefact.manifest.user_kv, len(self.artefact.manifest.history_fields)
        timed: dict[int, Timed] = {}
        sizes = [max(layout.slots(len(user.history)), self._count_item_rows(user)) for user in users]
        for run in plan_runs(sizes, self._limit(WARM_ROWS_PER_CPU_RUN)):
            started = time.perf_counter()
            by_user = [unflatten(past[index]) for index in run]
            layers = [stack_user_kv(list(parts), layout) for parts in zip(*by_user, strict=True)]
            no_event = np.zeros((len(run), 1, fields), np.int64)  # [users, 1, fields]
            outputs = self._run(no_event, [users[index].candidates for index in run], layers, None, use_past=True)
            spent = time.perf_counter() - started
            self.stopwatch.fuse.append(spent)
            timed.update(self._split_scores(outputs[SCORES.name], run, users, spent))
        return [timed[index] for index in range(len(users))]

    def _run(
        self, histories: Ids, candidates: list[Ids], past: list[KVArrays], space: Arrays | None, *, use_past: bool
    ) -> Tensors:
        """Run the graph once. User KV comes out, into `space` if it is given, unless it was given (`use_past`)."""
        # A run needs a candidate: for a user without any, one unknown item, whose score is not read.
        unknown = np.zeros((1, len(self.artefact.manifest.candidate_fields)), np.int64)
        rows = stack_padded([each if len(each) else unknown for each in candidates])  # [users, N, T]
        feeds: Tensors = {
            HISTORY.name: histories,
            CANDIDATES.name: np.ascontiguousarray(rows),
            USE_PAST: np.array(use_past),
        }
        for layer, user_kv in enumerate(past):
            feeds[past_tensor_name(USER_KEYS, layer)] = user_kv.keys
            feeds[past_tensor_name(USER_VALUES, layer)] = user_kv.values
        names = [] if use_past else flatten(self._layer_names)
        into = dict(zip(names, space, strict=True)) if space else None
        outputs = self.artefact.run([SCORES.name, *names], feeds, into)
        if not np.isfinite(outputs[SCORES.name]).all():
            raise ServerFaultError(f"{SCORES.name}: expected finite numbers, got {outputs[SCORES.name]}")
        return outputs

    def _copy_user(self, layers: list[KVArrays], row: int, user: User, space: Arrays | None) -> list[KVArrays]:
        """Take one user out of a run that several shared."""
        slots = self.artefact.manifest.user_kv.slots(len(user.history))
        rooms = unflatten(space) if space else [None] * len(layers)
        return [layer.take(row, slots).copy_into(room) for layer, room in zip(layers, rooms, strict=True)]

    @staticmethod
    def _split_scores(scores: Floats, run: list[int], users: Sequence[User], seconds: float) -> dict[int, Timed]:
        return {
            index: Timed(row[: len(users[index].candidates)], seconds) for index, row in zip(run, scores, strict=True)
        }

    def _count_item_rows(self, user: User) -> int:
        return len(user.candidates) * self.artefact.manifest.dims.candidate_tokens

    def _limit(self, rows_per_cpu_run: int) -> int:
        return ROWS_PER_GPU_RUN if self.artefact.is_on_gpu else rows_per_cpu_run


def flatten(layers: Sequence[tuple[Each, Each]]) -> tuple[Each, ...]:
    """Return the keys of every layer, then the values of every layer."""
    return (*(keys for keys, _ in layers), *(values for _, values in layers))


def unflatten(arrays: Arrays) -> list[KVArrays]:
    """Return the layers again."""
    half = len(arrays) // 2
    return [KVArrays(keys, values) for keys, values in zip(arrays[:half], arrays[half:], strict=True)]
