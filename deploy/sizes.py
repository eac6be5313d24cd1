"""What one server needs, computed from an exported repository: shared memory, memory, cores, time to stop.

The numbers are sums of what can be read (file sizes, the manifest's KV and limits, the cache's budget) and of a few
measured constants, each with its measurement. The module reads the repository and writes a patch for Kubernetes; it
does not know how many servers are needed, or how fast they are.
"""

import argparse
import dataclasses
import json
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from kvcast.contract.manifest import ONNX_FILE, Manifest
from kvcast.contract.tensors import DOC_FUSION, MAX_BATCH_SIZE, RANKER_RESIDENT, USER_ENCODER
from kvcast.server import ServerSettings
from kvcast.server.installation import ServerError
from kvcast.server.releases import ReleaseStore
from kvcast.server.repository import check_repository, count_shared_memory, expand_models
from kvcast.server.view import CONFIG_FILE

MEGABYTE = 1_000_000
# A model's process with its session open and no weights: Python, numpy, ONNX Runtime (measured: 40 to 46 MB). Weights
# come on top as ONNX Runtime packs them for its GEMMs: all of them at `seed`, all but the embeddings at `bench`.
PROCESS_BYTES = 48 * MEGABYTE
# Code of tritonserver, Python and ONNX Runtime that is read from files and shared by all processes.
CODE_BYTES = 200 * MEGABYTE
TRITONSERVER_BYTES = 64 * MEGABYTE
LAUNCHER_BYTES = 64 * MEGABYTE
GUARD_BYTES = 64 * MEGABYTE
# What the guard holds of requests at most (`HELD_BYTES` in guard/passage.py; a test compares them).
GUARD_HELD_BYTES = 512 << 20
# CUDA's runtime and libraries in a process's own memory. An allowance: not measured.
CUDA_BYTES = 1500 * MEGABYTE
# Memory of a run, in vectors of the model's width a token. One run of a new length takes 32; ONNX Runtime's arena,
# which gives nothing back, ends at up to 57 after runs of many lengths (measured at `bench`, one event to 4096).
VECTORS_PER_TOKEN = 64
# Scores of fusion's attention and their softmax: [heads, tokens, slots] twice.
SCORE_COPIES = 2
# The traditional scheme runs chunks of so many bytes of scores, of which several live at a time (measured: 461 MB).
FULL_SCORE_BYTES, FULL_SCORE_COPIES = 64 << 20, 8
# A region's room for requests without user KV (`count_shared_memory` in server/repository.py).
REQUESTS_REGION = 16 << 20
# Short histories are packed into runs of so many events (`EVENTS_PER_CPU_RUN` in runtime/user_encoder.py, and so on).
PACKED_EVENTS = 1024
# Free space between kept users of different lengths, on top of what they take.
CACHE_HOLES = 1.1
# A process that dies with a request leaves its region to Triton, which never lets go of it: room for so many of each
# until the next restart, or the process that replaces it finds none.
SPARE_REGIONS = 3
# `kvcast serve` takes up to that much beyond the time for requests that are there (guard, supervisor, Triton, log).
STOP_SECONDS = 20
CACHE_PARAMETER, THREADS_PARAMETER = "user_kv_cache_megabytes", "intra_op_threads"
ROUND_TO = 16 << 20


@dataclass(frozen=True)
class Wishes:
    """What an operator decides; None: as the repository says.

    users_kept: users whose KV each process keeps. history, candidates: what a usual request has. cores: of one server.
    """

    models: tuple[str, ...] = ("ranker",)
    users_kept: int | None = None
    cache_megabytes: int | None = None
    instances: int | None = None
    history: int | None = None
    candidates: int | None = None
    in_flight: int = ServerSettings.in_flight
    cores: int = 4
    drain_seconds: float = ServerSettings.drain_seconds
    pre_stop_seconds: float = 5
    device: str = "cpu"


@dataclass(frozen=True)
class Part:
    """Something that takes memory: bytes with usual requests, bytes at most, and how they come about.

    At most: one request as large as the limits allow, on top of the usual ones, at a switch to another release.
    """

    name: str
    usual: int
    most: int
    how: str


@dataclass(frozen=True)
class ServedFolder:
    """A model as it lies in the repository: bytes of its weights, and what its `config.pbtxt` sets.

    cache_bytes: None for a model that has no cache. threads: 0 for the cores divided by the instances.
    """

    name: str
    weights: int
    instances: int
    cache_bytes: int | None
    threads: int

    @property
    def moves_kv(self) -> bool:
        """Whether user KV goes through its shared memory."""
        return self.name in (USER_ENCODER.name, DOC_FUSION.name)


@dataclass(frozen=True)
class Demand:
    """What requests ask of a server: usual ones, the largest that the limits allow, and how many at a time."""

    manifest: Manifest
    history: int
    candidates: int
    in_flight: int

    @property
    def kv(self) -> int:
        """Bytes of a usual user's KV."""
        return self.manifest.user_kv.bytes_of(self.history)

    @property
    def largest_kv(self) -> int:
        """Bytes of the KV of the largest request: several users of the longest history."""
        return MAX_BATCH_SIZE * self.manifest.user_kv.bytes_of(self.manifest.limits.history)

    @property
    def requests_in_flight(self) -> int:
        """Bytes of all requests that Triton holds, if every one is the largest."""
        limits, fields = self.manifest.limits, len(self.manifest.history_fields)
        ids = limits.history * fields + limits.candidates * self.manifest.dims.candidate_tokens
        return self.in_flight * MAX_BATCH_SIZE * ids * 8

    @property
    def kv_in_flight(self) -> int:
        """Bytes of the KV of all requests that Triton holds."""
        return self.in_flight * self.kv


@dataclass(frozen=True)
class Sizes:
    """What one server needs. parts: what takes memory, shared memory included; threads: of each model's sessions."""

    config: str
    release: str
    models: tuple[str, ...]
    parts: tuple[Part, ...]
    shared_memory_start: int
    shared_memory: int
    cores: int
    threads: dict[str, int]
    grace_seconds: int
    notes: tuple[str, ...]

    @property
    def memory_request(self) -> int:
        """Bytes that a server takes with usual requests, caches full."""
        return round_up(sum(part.usual for part in self.parts))

    @property
    def memory_limit(self) -> int:
        """Bytes that a server takes at most."""
        return round_up(sum(part.most for part in self.parts))


def compute_sizes(repository: Path, wishes: Wishes) -> Sizes:
    """Return what one server of this repository needs.

    Raises:
        ServerError: models are not exported, or a wish cannot be had.
    """
    models = list(wishes.models)
    manifest = check_repository(repository, models, None)
    workload = manifest.workload
    demand = Demand(
        manifest, wishes.history or workload.history, wishes.candidates or workload.candidates, wishes.in_flight
    )
    configured = read_folders(repository, models)
    folders = [apply_wishes(folder, demand, wishes) for folder in configured]
    region, processes = count_shared_memory(manifest, models), sum(folder.instances for folder in folders)
    shared = size_shared_memory(demand, folders, region)
    parts = [part for folder in folders for part in size_model(folder, demand, wishes.device)]
    parts += [*size_servers(demand, folders), shared, size_second_release(demand, folders, wishes.device, region)]
    return Sizes(
        config=manifest.config,
        release=manifest.release,
        models=wishes.models,
        parts=tuple(parts),
        shared_memory_start=region * processes,
        shared_memory=round_up(shared.most),
        cores=wishes.cores,
        threads={each.name: each.threads or max(1, wishes.cores // each.instances) for each in folders},
        grace_seconds=round(wishes.pre_stop_seconds + wishes.drain_seconds + STOP_SECONDS),
        notes=tuple(find_notes(configured, folders, wishes)),
    )


def read_folders(repository: Path, models: list[str]) -> list[ServedFolder]:
    """Return the models with artefacts that have to be loaded, as they are configured."""
    store, names = ReleaseStore(repository), expand_models(models)
    number = store.find_served(names)
    return [read_folder(repository / name, store.find_folder(name, number)) for name in names]


def read_folder(model: Path, artefact: Path) -> ServedFolder:
    """Return one model as it is configured.

    Raises:
        ServerError: its configuration cannot be read.
    """
    try:
        config = text_format.Parse((model / CONFIG_FILE).read_text(), model_config_pb2.ModelConfig())
        numbers = {
            name: float(config.parameters[name].string_value)
            for name in (CACHE_PARAMETER, THREADS_PARAMETER)
            if name in config.parameters
        }
    except (OSError, ValueError, text_format.ParseError) as error:
        raise ServerError(f"{model / CONFIG_FILE}: cannot be read ({error})") from error
    return ServedFolder(
        name=model.name,
        weights=sum(file.stat().st_size for file in artefact.glob(f"{ONNX_FILE}*")),
        instances=max(1, sum(group.count or 1 for group in config.instance_group)),
        cache_bytes=int(numbers[CACHE_PARAMETER] * MEGABYTE) if CACHE_PARAMETER in numbers else None,
        threads=int(numbers.get(THREADS_PARAMETER, 0)),
    )


def apply_wishes(folder: ServedFolder, demand: Demand, wishes: Wishes) -> ServedFolder:
    """Return a model as it would be with the operator's instances and cache."""
    cache = folder.cache_bytes
    if cache is not None and wishes.users_kept is not None:
        cache = MEGABYTE * math.ceil(wishes.users_kept * demand.kv * CACHE_HOLES / MEGABYTE)
    elif cache is not None and wishes.cache_megabytes is not None:
        cache = MEGABYTE * wishes.cache_megabytes
    return dataclasses.replace(folder, cache_bytes=cache, instances=wishes.instances or folder.instances)


def size_model(folder: ServedFolder, demand: Demand, device: str) -> list[Part]:
    """Return what the processes of one model take."""
    usual, most = size_process(folder, demand, device), size_process(folder, make_largest(demand), device)
    count = f"{folder.instances} × " if folder.instances > 1 else ""
    how = f"{count}(process, {megabytes(folder.weights)} of packed weights, a run's memory)"
    how = how if count else how.strip("()")
    parts = [Part(folder.name, folder.instances * usual, folder.instances * most, how)]
    if folder.cache_bytes:
        total, users = folder.instances * folder.cache_bytes, int(folder.cache_bytes / (demand.kv * CACHE_HOLES))
        how = f"{count}{megabytes(folder.cache_bytes)}, some {users} users of {megabytes(demand.kv)}"
        parts.append(Part(f"{folder.name}: user KV cache", total, total, how))
    return parts


def make_largest(demand: Demand) -> Demand:
    """Return the demand if every request is the largest that the limits allow."""
    limits = demand.manifest.limits
    return dataclasses.replace(demand, history=limits.history, candidates=limits.candidates)


def size_process(folder: ServedFolder, demand: Demand, device: str) -> int:
    """Return bytes of one process: itself, the weights as ONNX Runtime packs them for its GEMMs, and a run's memory."""
    own = PROCESS_BYTES + (CUDA_BYTES if device == "gpu" else 0)
    return own + folder.weights + size_run(folder.name, demand)


def size_run(model: str, demand: Demand) -> int:
    """Return bytes that one run takes, and its answer."""
    dims = demand.manifest.dims
    user_kv, token = demand.kv, VECTORS_PER_TOKEN * 4 * dims.width
    events, items = max(demand.history, PACKED_EVENTS), demand.candidates * dims.candidate_tokens
    # fusion: [heads, tokens of candidates, slots]
    scores = SCORE_COPIES * 4 * dims.heads * items * demand.manifest.user_kv.slots(demand.history)
    # The largest request has several users, each with an answer.
    users = MAX_BATCH_SIZE if demand == make_largest(demand) else 1
    if model == USER_ENCODER.name:
        # As made, stacked, and what the arena keeps beside (measured at `seed`: 1.1 GB, with 308 MB of KV).
        return token * events + 3 * users * user_kv
    if model == DOC_FUSION.name:
        return token * items + scores + user_kv
    if model == RANKER_RESIDENT.name:
        return token * (events + items) + scores + users * user_kv
    sequence = demand.history + dims.candidate_tokens
    chunk = max(FULL_SCORE_BYTES, 4 * dims.heads * sequence**2)
    return FULL_SCORE_COPIES * chunk


def size_servers(demand: Demand, folders: Sequence[ServedFolder]) -> list[Part]:
    """Return what tritonserver, guard and launcher take, and the files that everybody maps."""
    moves_kv = any(folder.moves_kv for folder in folders)
    usual = demand.kv_in_flight if moves_kv else 0
    most = max(demand.kv_in_flight, demand.largest_kv) if moves_kv else 0
    files = sum(folder.weights for folder in folders)
    kv = f", {demand.in_flight} users' KV between the steps" if moves_kv else ""
    return [
        Part("tritonserver", TRITONSERVER_BYTES + usual, TRITONSERVER_BYTES + most, f"process{kv}"),
        Part(
            "guard", GUARD_BYTES, GUARD_BYTES + GUARD_HELD_BYTES, f"process; {megabytes(GUARD_HELD_BYTES)} of requests"
        ),
        Part("launcher", LAUNCHER_BYTES, LAUNCHER_BYTES, "process, and a probe's"),
        Part("files", CODE_BYTES + files, CODE_BYTES + files, "code, and weights as they lie in files (page cache)"),
    ]


def size_shared_memory(demand: Demand, folders: Sequence[ServedFolder], region: int) -> Part:
    """Return what lies in `/dev/shm`: a region a process, which grows by what no hole in it is large enough for.

    It never shrinks. So the largest request comes on top of what usual ones have left (measured at `bench`: 34 MB at
    the start, 50 MB after usual requests, 328 MB after the largest).
    """
    usual = most = 0
    for folder in folders:
        kv = (demand.kv_in_flight, demand.largest_kv) if folder.moves_kv else (0, 0)
        usual += folder.instances * max(region, REQUESTS_REGION + kv[0])
        most += folder.instances * ((1 + SPARE_REGIONS) * region + demand.requests_in_flight + sum(kv))
    how = f"a region a process, {megabytes(region)} at the start, and {SPARE_REGIONS} of processes that died"
    return Part("shared memory", usual, most, how)


def size_second_release(demand: Demand, folders: Sequence[ServedFolder], device: str, region: int) -> Part:
    """Return what the next release takes while the old one finishes: all but a full cache.

    The old one goes when it has answered what Triton held when the traffic moved; meanwhile the new one keeps about
    as many users.
    """
    most = sum(
        folder.weights + folder.instances * (size_process(folder, demand, device) + region) for folder in folders
    )
    most += sum(folder.instances * min(folder.cache_bytes or 0, demand.kv_in_flight) for folder in folders)
    return Part("a second release", 0, most, "processes, files and regions, while a switch lasts")


def find_notes(configured: Iterable[ServedFolder], wanted: Iterable[ServedFolder], wishes: Wishes) -> Iterator[str]:
    """Say what has to be set for these sizes to be true: flags of `kvcast serve`, or lines of `config.pbtxt`."""
    pairs = list(zip(configured, wanted, strict=True))
    flags = []
    for before, after in pairs:
        if after.instances != before.instances:
            yield f"instances: set count to {after.instances} in the instance_group of {before.name}/{CONFIG_FILE}"
    caches = {after.cache_bytes for before, after in pairs if after.cache_bytes != before.cache_bytes}
    flags += [f"--set {CACHE_PARAMETER}={(size or 0) // MEGABYTE}" for size in caches]
    threads = [max(1, wishes.cores // after.instances) for before, after in pairs if not before.threads]
    flags += [f"--set {THREADS_PARAMETER}={min(threads)}"] if threads else []
    if wishes.in_flight != Wishes.in_flight:
        flags.append(f"--in-flight {wishes.in_flight}")
    if wishes.drain_seconds != Wishes.drain_seconds:
        flags.append(f"--drain-seconds {wishes.drain_seconds:g}")
    if flags:
        yield f"serve with {' '.join(flags)}"


def round_up(size: int) -> int:
    """Return bytes in whole units of a size that people can read."""
    return -(-size // ROUND_TO) * ROUND_TO


def megabytes(size: float) -> str:
    """Return a size for people."""
    return f"{size / MEGABYTE:.0f} MB"


def mebibytes(size: int) -> str:
    """Return a size as Kubernetes takes it."""
    return f"{size >> 20}Mi"


def describe(sizes: Sizes) -> str:
    """Return the sizes as a table for people."""
    width = max(len(part.name) for part in sizes.parts)
    rows = [("memory", "usual", "at most", "")]
    rows += [(each.name, megabytes(each.usual), megabytes(each.most), each.how) for each in sizes.parts]
    usual, most = sum(each.usual for each in sizes.parts), sum(each.most for each in sizes.parts)
    rows.append(("sum", megabytes(usual), megabytes(most), ""))
    threads = ", ".join(f"{model} {count}" for model, count in sizes.threads.items())
    results = [
        ("memory request", mebibytes(sizes.memory_request)),
        ("memory limit", mebibytes(sizes.memory_limit)),
        ("shared memory", f"{mebibytes(sizes.shared_memory)}, {megabytes(sizes.shared_memory_start)} at the start"),
        ("cores", f"{sizes.cores}; threads a session: {threads}"),
        ("grace period", f"{sizes.grace_seconds} s"),
    ]
    lines = [
        f"{sizes.config}, release {sizes.release[:12]}, serving {' '.join(sizes.models)}",
        "",
        *(f"{name:<{width}}  {usual:>8}  {most:>8}  {how}".rstrip() for name, usual, most, how in rows),
        "",
        *(f"{name:<{width}}  {value}" for name, value in results),
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in sizes.notes)])


def to_json(sizes: Sizes) -> str:
    """Return the sizes as JSON."""
    table = dataclasses.asdict(sizes) | {
        "memory_request": sizes.memory_request,
        "memory_limit": sizes.memory_limit,
    }
    return json.dumps(table, indent=2)


def to_patch(sizes: Sizes, command: str) -> str:
    """Return a strategic merge patch for the Deployment, as YAML."""
    notes = "".join(f"# note: {note}\n" for note in sizes.notes)
    return f"""\
# Made by: {command}
# from {sizes.config}, release {sizes.release[:12]}. Make it again rather than edit it.
{notes}apiVersion: apps/v1
kind: Deployment
metadata:
  name: kvcast
spec:
  template:
    spec:
      terminationGracePeriodSeconds: {sizes.grace_seconds}
      containers:
        - name: kvcast
          resources:
            requests:
              cpu: "{sizes.cores}"
              memory: {mebibytes(sizes.memory_request)}
            limits:
              cpu: "{sizes.cores}"
              memory: {mebibytes(sizes.memory_limit)}
      volumes:
        - name: shared-memory
          emptyDir:
            medium: Memory
            sizeLimit: {mebibytes(sizes.shared_memory)}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), metavar="DIR")
    parser.add_argument("--models", default="ranker", help="as for `kvcast serve` (%(default)s)")
    cache = parser.add_mutually_exclusive_group()
    cache.add_argument("--users-kept", type=int, metavar="N", help="users whose KV each process keeps")
    cache.add_argument("--cache-megabytes", type=int, metavar="MB", help="budget of each process's user KV cache")
    parser.add_argument("--instances", type=int, metavar="N", help="processes of each model")
    parser.add_argument("--history", type=int, metavar="L", help="events of a usual user (as the export was told)")
    parser.add_argument("--candidates", type=int, metavar="N", help="candidates of a usual request (likewise)")
    parser.add_argument("--in-flight", type=int, default=Wishes.in_flight, metavar="N", help="as for `kvcast serve`")
    parser.add_argument("--cores", type=int, default=Wishes.cores, metavar="N", help="of one server (%(default)s)")
    parser.add_argument("--drain-seconds", type=float, default=Wishes.drain_seconds, metavar="S")
    parser.add_argument("--pre-stop-seconds", type=float, default=Wishes.pre_stop_seconds, metavar="S")
    parser.add_argument("--device", choices=("cpu", "gpu"), default=Wishes.device)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--kustomize", type=Path, metavar="FILE.yaml", help="write a patch for the Deployment")


def run(arguments: argparse.Namespace) -> int:
    """Print the sizes, and write the patch if one is wanted."""
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Wishes)}
    wishes = Wishes(**given | {"models": tuple(arguments.models.split())})
    sizes = compute_sizes(arguments.repository, wishes)
    print(to_json(sizes) if arguments.json else describe(sizes))
    if arguments.kustomize is not None:
        arguments.kustomize.write_text(to_patch(sizes, shlex.join(["kvcast", "deploy", *arguments.words])))
    return 0
