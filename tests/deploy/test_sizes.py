"""Sizes of one server: held against a real one under load, against the constants of other rooms, and as a patch."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from kvcast.client.transport import Call, GrpcTransport
from kvcast.contract.config import load_config
from kvcast.contract.tensors import CANDIDATES, HISTORY, MAX_BATCH_SIZE, RANKER, RANKER_RESIDENT, SCORES
from kvcast.deploy import sizes
from kvcast.deploy.sizes import STOP_SECONDS, Sizes, Wishes, compute_sizes
from kvcast.guard.passage import HELD_BYTES
from kvcast.perf.processes import read_shared_memory, read_uses
from kvcast.runtime import full_ranker, options, user_encoder
from kvcast.server import ServerError, TritonServer
from kvcast.server.repository import check_repository, count_shared_memory
from kvcast.server.stubs import list_stubs
from tests.conftest import make_settings
from tests.support import draw_rows

MODELS = (RANKER.name, RANKER_RESIDENT.name)
CACHE_MEGABYTES = 8
REQUESTS, CALLERS = 200, 8


@dataclass(frozen=True)
class Use:
    """What a server under load really takes, in bytes."""

    processes: dict[str, int]
    files: int
    shared_memory_at_start: int
    shared_memory: int


@pytest.fixture(scope="module")
def use(tiny_repository: Path) -> Use:
    """A server after requests of every size that the limits allow."""
    settings = dataclasses.replace(
        make_settings(tiny_repository), models=list(MODELS), parameters={options.CACHE_BUDGET: str(CACHE_MEGABYTES)}
    )
    with TritonServer(settings) as server:
        at_start = read_shared_memory(server)
        load(server)
        return Use(
            processes={name: each.memory_bytes for name, each in read_uses(server).items()},
            files=sum(read_file_pages(pid) for pid in (server.pid, server.guard_pid, *list_stubs(server.pid))),
            shared_memory_at_start=at_start,
            shared_memory=read_shared_memory(server),
        )


def load(server: TritonServer) -> None:
    config = load_config("tiny")

    def ask(turn: int) -> None:
        generator = np.random.default_rng(turn)
        users = MAX_BATCH_SIZE if turn % 4 == 0 else 1
        length, count = (
            int(generator.integers(1, most + 1)) for most in (config.limits.history, config.limits.candidates)
        )
        if turn % 4 == 0:
            length, count = config.limits.history, config.limits.candidates
        inputs = {
            HISTORY.name: draw_rows(config.schema.history_fields, (users, length), generator),
            CANDIDATES.name: draw_rows(config.schema.candidate_fields, (users, count), generator),
        }
        assert transport.infer(Call(MODELS[turn % 2], inputs, [SCORES.name]), 60)[SCORES.name].shape == (users, count)

    transport = GrpcTransport(server.grpc_address)
    try:
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(ask, range(REQUESTS)))
    finally:
        transport.close()


def read_file_pages(pid: int) -> int:
    """Return a process's share of the file pages that are mapped."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss_File:"))


@pytest.fixture(scope="module")
def computed(tiny_repository: Path) -> Sizes:
    return compute_sizes(tiny_repository, Wishes(models=MODELS, cache_megabytes=CACHE_MEGABYTES))


# -- against a real server


def test_every_process_stays_within_its_part(use, computed):
    parts: dict[str, int] = {}
    for part in computed.parts:
        name = part.name.partition(":")[0]  # with its cache
        parts[name] = parts.get(name, 0) + part.most
    assert set(use.processes) <= set(parts)
    for name, used in use.processes.items():
        assert used <= parts[name], f"{name}: {used / 1e6:.0f} MB"


def test_shared_memory_is_what_was_computed_at_the_start_and_stays_below_the_size(use, computed):
    # Triton adds a little for each region, and one region of its own.
    assert computed.shared_memory_start <= use.shared_memory_at_start <= 1.05 * computed.shared_memory_start
    assert use.shared_memory <= computed.shared_memory


def test_the_server_fits_and_the_sizes_are_not_absurdly_above(use, computed):
    """`tiny` comes to twice what is used: its weights and requests are nothing, so there is nothing but allowances.

    Most of those is code that is mapped from files, whose pages this machine's other processes share. Of the limit two
    parts cannot be seen here: requests that the guard holds for callers who overwhelm it, and a second release.
    """
    used = sum(use.processes.values()) + use.files + use.shared_memory
    assert used <= computed.memory_request <= 3 * used
    unseen = sizes.GUARD_HELD_BYTES + next(part.most for part in computed.parts if part.name == "a second release")
    assert used <= computed.memory_limit - unseen <= 3 * used


# -- against other rooms


def test_constants_are_those_of_the_rooms_that_they_describe(tiny_repository):
    assert sizes.GUARD_HELD_BYTES == HELD_BYTES
    assert sizes.PACKED_EVENTS == user_encoder.EVENTS_PER_CPU_RUN
    assert sizes.FULL_SCORE_BYTES == full_ranker.SCORE_BYTES_PER_CHUNK
    assert sizes.CACHE_PARAMETER == options.CACHE_BUDGET
    assert sizes.THREADS_PARAMETER in options.SESSION_PARAMETERS
    manifest = check_repository(tiny_repository, [RANKER_RESIDENT.name], None)
    assert count_shared_memory(manifest, [RANKER_RESIDENT.name]) == sizes.REQUESTS_REGION


# -- what an operator decides


@pytest.mark.parametrize(
    "more",
    [
        {"models": (*MODELS, "ranker_full")},
        {"cache_megabytes": 4000},
        {"users_kept": 1_000_000},
        {"instances": 2},
        {"history": 96},
        {"in_flight": 4000},
        {"device": "gpu"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_more_of_anything_needs_more_memory(tiny_repository, computed, more):
    larger = compute_sizes(tiny_repository, dataclasses.replace(Wishes(models=MODELS), **more))
    assert larger.memory_request > computed.memory_request
    assert larger.memory_limit >= larger.memory_request


def test_users_kept_become_a_budget_that_holds_them(tiny_repository):
    wishes = Wishes(models=(RANKER_RESIDENT.name,), users_kept=10_000)
    found = compute_sizes(tiny_repository, wishes)
    (cache,) = [part for part in found.parts if part.name.endswith("cache")]
    manifest = check_repository(tiny_repository, [RANKER_RESIDENT.name], None)
    assert cache.usual >= 10_000 * manifest.user_kv.bytes_of(manifest.workload.history)
    assert f"--set {options.CACHE_BUDGET}={cache.usual // 1_000_000} " in found.notes[0]


def test_threads_share_the_cores_among_instances(tiny_repository):
    found = compute_sizes(tiny_repository, Wishes(models=(RANKER_RESIDENT.name,), cores=8, instances=4))
    assert found.threads == {RANKER_RESIDENT.name: 2}
    assert any("instance_group" in note for note in found.notes)


def test_the_grace_period_is_longer_than_leaving_and_draining(tiny_repository):
    found = compute_sizes(tiny_repository, Wishes(drain_seconds=60, pre_stop_seconds=15))
    assert found.grace_seconds == 60 + 15 + STOP_SECONDS


def test_a_repository_without_models_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ServerError, match="run `make export` first"):
        compute_sizes(tmp_path, Wishes())


# -- the command


@pytest.fixture
def run(tiny_repository: Path) -> Iterator[list[str]]:
    return [sys.executable, "-m", "kvcast", "deploy", "size", "--repository", str(tiny_repository)]


def test_the_patch_says_what_was_computed_and_how_it_was_made(run, tiny_repository, tmp_path):
    file = tmp_path / "sizes.yaml"
    command = [*run, "--models", "ranker ranker_resident", "--cores", "6", "--kustomize", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = compute_sizes(tiny_repository, Wishes(models=MODELS, cores=6))
    assert re.search(rf"^grace period +{found.grace_seconds} s$", done.stdout, re.MULTILINE)
    text = file.read_text()
    assert shlex.split(text.splitlines()[0].removeprefix("# Made by: ")) == ["kvcast", *command[3:]]
    patch = yaml.safe_load(text)
    assert (patch["apiVersion"], patch["kind"], patch["metadata"]) == ("apps/v1", "Deployment", {"name": "kvcast"})
    pod = patch["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == found.grace_seconds
    (container,), (volume,) = pod["containers"], pod["volumes"]
    assert container["name"] == "kvcast"
    assert container["resources"] == {
        "requests": {"cpu": "6", "memory": f"{found.memory_request >> 20}Mi"},
        "limits": {"cpu": "6", "memory": f"{found.memory_limit >> 20}Mi"},
    }
    memory = {"medium": "Memory", "sizeLimit": f"{found.shared_memory >> 20}Mi"}
    assert volume == {"name": "shared-memory", "emptyDir": memory}


def test_json_holds_the_same_numbers(run, tiny_repository):
    done = subprocess.run([*run, "--json"], capture_output=True, text=True, check=True)
    table, found = json.loads(done.stdout), compute_sizes(tiny_repository, Wishes())
    assert table["memory_limit"] == found.memory_limit == sizes.round_up(sum(part.most for part in found.parts))
    assert table["shared_memory"] == found.shared_memory
    assert [part["name"] for part in table["parts"]] == [part.name for part in found.parts]
