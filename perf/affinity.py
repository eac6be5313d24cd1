"""Several real servers behind a real haproxy: are users found again, who moves when a server goes or comes?

The proxy runs the shipped configuration, with nothing changed but addresses and, to compare, the way of balancing.
Caches are small and the visitors follow Zipf's law, so that what is found depends on who is sent where. All of it runs
on one machine, so times mean little here; hit rates and the shares of users who move do not depend on speed.
"""

import contextlib
import csv
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from kvcast.client import RankerClient, RetryPolicy
from kvcast.client.clients import DEFAULT_RETRY
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.errors import KvcastError
from kvcast.protocol.manifest import Manifest, read_manifest
from kvcast.protocol.request import RankRequest
from kvcast.protocol.routing import ROUTING_HEADER, hash_user
from kvcast.protocol.tensors import CANDIDATES, HISTORY, RANKER_RESIDENT, SCORE_TOLERANCE, SCORES
from kvcast.server import ServerError
from kvcast.server.repository import find_free_ports
from kvcast.serving.options import CACHE_BUDGET
from kvcast.serving.user_kv_cache import ENTRY_OVERHEAD_BYTES
from kvcast.synthetic import ClickLog
from kvcast.synthetic.stock import zipf_shares
from perf.analyzer import PerfError
from perf.counters import Counters
from perf.experiments import Row
from perf.programs import explain_absence, find_program, make_environment

HAPROXY_CONFIG = Path(__file__).resolve().parents[1] / "deploy" / "haproxy" / "haproxy.cfg"
NAMES = ("one", "two", "three")
SERVER_HEADER = "x-kvcast-server"
BALANCING = f"balance hash req.hdr({ROUTING_HEADER})"
BOUND = "hash-balance-factor 400"
# How the proxy balances, as replacements in its configuration.
POLICIES: dict[str, dict[str, str]] = {
    "affinity": {},
    "affinity, bound 200": {BOUND: "hash-balance-factor 200"},
    "affinity, bound 125": {BOUND: "hash-balance-factor 125"},
    "round robin": {BALANCING: "balance roundrobin", BOUND: ""},
}
MODEL = RANKER_RESIDENT.name
STARTS_WITHIN_SECONDS = 120
NOTICED_WITHIN_SECONDS = 20
ENDS_WITHIN_SECONDS = 5
# Small, so that three servers keep some of the visitors and not all.
KEPT_USERS, USERS, EXPONENT = 24, 400, 0.9
IN_FLIGHT = 4
HISTORY_EVENTS, CANDIDATE_COUNT = 40, 10
MAPPED_USERS = 300
SETTLED_SECONDS = 1.0


@dataclass(frozen=True)
class Visitors:
    """Whose each visit is, in order. seed: of their histories, and of what else is drawn; said: for people."""

    users: list[int]
    seed: int
    said: str


@dataclass
class Member:
    """One server of the fleet: `kvcast serve` as a process of its own, which can be killed."""

    name: str
    repository: Path
    log: Path
    flags: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    ports: list[int] = field(default_factory=lambda: find_free_ports(3))

    @property
    def http_address(self) -> str:
        """Host and port of HTTP."""
        return f"127.0.0.1:{self.ports[0]}"

    @property
    def grpc_address(self) -> str:
        """Host and port of gRPC."""
        return f"127.0.0.1:{self.ports[1]}"

    @property
    def metrics_address(self) -> str:
        """Host and port of the metrics page."""
        return f"127.0.0.1:{self.ports[2]}"

    def start(self) -> None:
        """Start it, on the same ports each time; it is ready later."""
        names = ("--http-port", "--grpc-port", "--metrics-port")
        ports = itertools.chain.from_iterable(zip(names, map(str, self.ports), strict=True))
        command = [sys.executable, "-m", "kvcast.server", "--repository", str(self.repository)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--models", MODEL, *ports, *self.flags], stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            ServerError: it has ended, or takes too long.
        """
        deadline = time.monotonic() + STARTS_WITHIN_SECONDS
        while read_status(self.http_address, "/v2/health/ready") != http.client.OK:
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
                raise ServerError(f"server {self.name} did not start: {last or 'it wrote nothing'}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill everything of it at once, as a machine that loses its power."""
        if self.process is not None:
            for pid in [self.process.pid, *find_descendants(self.process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        """Stop it cleanly."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


class Members:
    """Servers that are started together and stopped together; a context manager."""

    def __init__(self, members: Iterable[Member]) -> None:
        self.members = list(members)

    def __enter__(self) -> Self:
        """Start all, and wait until they are ready."""
        try:
            for member in self.members:
                member.start()
            for member in self.members:
                member.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ignored: object) -> None:
        """Stop all."""
        with ThreadPoolExecutor(len(self.members)) as pool:
            list(pool.map(Member.stop, self.members))

    def __getitem__(self, name: str) -> Member:
        """Return the member of a name."""
        return next(member for member in self.members if member.name == name)

    def count(self, metric: str) -> dict[str, float]:
        """Return a counter of the model's, by member.

        Raises:
            PerfError: a member does not tell.
        """
        found = {}
        for member in self.members:
            counters = Counters(member.metrics_address)
            if not counters.get(MODEL, "kvcast_user_kv_budget_bytes"):
                raise PerfError(f"server {member.name}: its metrics page has nothing of {MODEL}")
            found[member.name] = counters.get(MODEL, metric)
        return found


class Proxy:
    """A proxy process before the members, on ports of its own; a context manager.

    Where it knows every member to be ready, or not, is asked of the members' health by the proxy itself.
    """

    def __init__(self, command: Sequence[str], addresses: dict[str, str]) -> None:
        """Take note of the command, and of where it will listen: `http` and `grpc`."""
        self.addresses = addresses
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it, and wait until a server behind it is ready."""
        self._process = subprocess.Popen(
            self._command, env=make_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *ignored: object) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(ENDS_WITHIN_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + NOTICED_WITHIN_SECONDS
        while read_status(self.addresses["http"], "/v2/health/ready") != http.client.OK:
            if process.poll() is not None or time.monotonic() > deadline:
                raise PerfError(f"the proxy did not start: {' '.join(self._command)}")
            time.sleep(0.05)


def make_haproxy(members: Sequence[Member], folder: Path, policy: str = "affinity") -> Proxy:
    """Return haproxy with the shipped configuration: addresses changed, and the way of balancing if asked for.

    Raises:
        PerfError: haproxy is not installed, or the configuration has not what is to be changed.
    """
    program = find_program("haproxy")
    if program is None:
        raise PerfError(explain_absence("haproxy"))
    text = HAPROXY_CONFIG.read_text()
    http_port, grpc_port, metrics_port = find_free_ports(3)
    replacements = {"127.0.0.1:9000": f"127.0.0.1:{http_port}", "127.0.0.1:9001": f"127.0.0.1:{grpc_port}"}
    replacements |= {"127.0.0.1:9002": f"127.0.0.1:{metrics_port}"} | POLICIES[policy]
    for place, member in enumerate(members, start=1):
        replacements[f"10.0.0.1{place}:8000"] = member.http_address
        replacements[f"10.0.0.1{place}:8001"] = member.grpc_address
    path = folder / f"haproxy-{http_port}.cfg"
    path.write_text(replace_all(text, replacements))
    return Proxy([str(program), "-f", str(path)], {"http": f"127.0.0.1:{http_port}", "grpc": f"127.0.0.1:{grpc_port}"})


def replace_all(text: str, replacements: dict[str, str]) -> str:
    """Return the text with other words.

    Raises:
        PerfError: a word is not in it.
    """
    for old, new in replacements.items():
        if old not in text:
            raise PerfError(f"the proxy's configuration: expected {old!r} in it")
        text = text.replace(old, new)
    return text


def read_status(address: str, path: str) -> int:
    """Return the status of a GET, 0 if there is no answer."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def find_descendants(pid: int) -> list[int]:
    """Return the process ids of all that a process has started, and they."""
    found: list[int] = []
    for path in Path("/proc").glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *find_descendants(child)]
    return found


# ---- who is sent where ----------------------------------------------------------------------------------------------


def map_users(proxy: Proxy, users: Iterable[int]) -> dict[int, str]:
    """Return which server answers each user, asked over HTTP for the users of a log with two and four fields.

    Raises:
        PerfError: one is not answered.
    """
    body = json.dumps(
        {
            "inputs": [
                {"name": HISTORY.name, "datatype": "INT64", "shape": [1, 1, 2], "data": [1, 1]},
                {"name": CANDIDATES.name, "datatype": "INT64", "shape": [1, 1, 4], "data": [1, 1, 1, 1]},
            ],
            "outputs": [{"name": SCORES.name}],
        }
    )
    connection = http.client.HTTPConnection(proxy.addresses["http"], timeout=10)
    found = {}
    for user in users:
        connection.request("POST", f"/v2/models/{MODEL}/infer", body, {ROUTING_HEADER: hash_user(user)})
        reply = connection.getresponse()
        text = reply.read()
        if reply.status != http.client.OK:
            raise PerfError(f"user {user}: {reply.status} {text.decode(errors='replace')}")
        found[user] = reply.headers[SERVER_HEADER]
    connection.close()
    return found


def find_moves(before: dict[int, str], after: dict[int, str], server: str) -> Row:
    """Return which share of the users of a server moved, and of those of the others."""
    own = [user for user, name in before.items() if name == server]
    others = [user for user, name in before.items() if name != server]
    moved = {user for user in before if before[user] != after[user]}
    return {
        "users": len(before),
        "share_of_server": len(own) / len(before),
        "moved_of_server": len(moved.intersection(own)) / max(1, len(own)),
        "moved_of_others": len(moved.intersection(others)) / max(1, len(others)),
    }


def wait_for_servers(proxy: Proxy, names: set[str]) -> None:
    """Wait until the proxy sends users to exactly these servers.

    Raises:
        PerfError: it does not.
    """
    deadline, found = time.monotonic() + NOTICED_WITHIN_SECONDS, "nobody was answered"
    while time.monotonic() < deadline:
        try:
            servers = set(map_users(proxy, range(40)).values())
        except (PerfError, OSError, http.client.HTTPException) as error:
            found = str(error)
        else:
            if servers == names:
                return
            found = f"it sends them to {', '.join(sorted(servers))}"
        time.sleep(0.1)
    raise PerfError(f"the proxy does not send users to {', '.join(sorted(names))}: {found}")


# ---- who is found again ---------------------------------------------------------------------------------------------


def choose_visitors(trace: Path | None, visits: int, seed: int) -> Visitors:
    """Return those of a trace, or, without one, so many that are drawn.

    Raises:
        PerfError: the trace cannot be read.
    """
    if trace is not None:
        users = read_trace(trace)
        return Visitors(users, seed, f"{len(set(users))} users of the trace {trace.name}")
    said = f"{USERS} users who come by Zipf's law (exponent {EXPONENT}, seed {seed})"
    return Visitors(draw_visitors(visits, seed), seed, said)


def read_trace(path: Path) -> list[int]:
    """Return whose each visit is, in order of time: a number for each name in the column `user`.

    Raises:
        PerfError: it is not a trace.
    """
    try:
        with path.open(newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: float(row["seconds"]))
        numbers: dict[str, int] = {}
        users = [numbers.setdefault(row["user"], len(numbers)) for row in rows]
    except OSError as error:
        raise PerfError(f"{path}: cannot be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise PerfError(f"{path}: expected CSV with the columns seconds, user: {error!r}") from error
    if not users:
        raise PerfError(f"{path}: expected CSV with the columns seconds, user, and at least one visit")
    return users


def draw_visitors(visits: int, seed: int, users: int = USERS, exponent: float = EXPONENT) -> list[int]:
    """Return whose each visit is: few users come often, most come rarely (Zipf's law)."""
    drawn = np.random.default_rng(seed).choice(users, size=visits, p=zipf_shares(users, exponent))
    return [int(user) for user in drawn]


def draw_requests(config: ModelConfig, users: Iterable[int], seed: int) -> dict[int, RankRequest]:
    """Return one request a user, each with a history of its own that does not change."""
    log = ClickLog(config.schema, seed=seed)
    return {user: log.draw_request(HISTORY_EVENTS, CANDIDATE_COUNT) for user in sorted(set(users))}


class Load:
    """Visits sent by several callers in order: their scores, what went wrong, the longest wait."""

    def __init__(
        self,
        proxy: Proxy,
        protocol: Any,
        requests: dict[int, RankRequest],
        retry: RetryPolicy = DEFAULT_RETRY,
    ) -> None:
        address = proxy.addresses[protocol]
        self._client = RankerClient(address, protocol=protocol, model=MODEL, deadline=20, retry=retry)
        self._requests = requests
        # Appended to by all callers: user, scores or the name of an error, seconds.
        self._answers: list[tuple[int, Any, float]] = []

    @property
    def slowest(self) -> float:
        """Seconds of the longest request."""
        return max((seconds for _, _, seconds in self._answers), default=0.0)

    def send(self, user: int) -> None:
        """Send one visit."""
        request, begun = self._requests[user], time.monotonic()
        answer: Any
        try:
            answer = self._client.rank(request.history, request.candidates, user_id=user).scores
        except KvcastError as error:
            answer = type(error).__name__
        self._answers.append((user, answer, time.monotonic() - begun))

    def send_all(self, visits: Sequence[int], in_flight: int = IN_FLIGHT) -> None:
        """Send visits, so many at a time."""
        with ThreadPoolExecutor(in_flight) as pool:
            list(pool.map(self.send, visits))

    def count(self, expected: dict[int, Any]) -> dict[str, int]:
        """Return how many answers were right, and what became of the others."""
        outcomes = Counter({"right": 0, "wrong": 0})
        for user, answer, _ in self._answers:
            if isinstance(answer, str):
                outcomes[answer] += 1
            else:
                outcomes["right" if np.abs(answer - expected[user]).max() <= SCORE_TOLERANCE else "wrong"] += 1
        return dict(outcomes)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


@contextlib.contextmanager
def keep_sending(loads: Collection[Load], visits: Sequence[int], in_flight: int = IN_FLIGHT) -> Iterator[None]:
    """Send visits over and over, so many at a time over all, as long as the block runs and a moment around it."""
    stop = threading.Event()

    def work(load: Load, start: int) -> None:
        for user in itertools.islice(itertools.cycle(visits), start, None):
            if stop.is_set():
                return
            load.send(user)

    with ThreadPoolExecutor(in_flight) as pool:
        sending = itertools.islice(itertools.cycle(loads), in_flight)
        working = [pool.submit(work, load, place) for place, load in enumerate(sending)]
        try:
            time.sleep(SETTLED_SECONDS)
            yield
            time.sleep(SETTLED_SECONDS)
        finally:
            stop.set()
        for each in working:
            each.result()


def record_scores(member: Member, requests: dict[int, RankRequest]) -> dict[int, Any]:
    """Return what one server alone answers each user."""
    with RankerClient(member.grpc_address, model=MODEL) as client:
        return {user: client.rank(each.history, each.candidates).scores for user, each in requests.items()}


def measure_hit_rate(
    members: Members,
    proxy: Proxy,
    protocol: str,
    visits: Sequence[int],
    requests: dict[int, RankRequest],
    in_flight: int = IN_FLIGHT,
) -> Row:
    """Send visits; return how many found their user kept, how they spread over the servers, what was answered."""
    names = {kind: f"kvcast_user_kv_{kind}_total" for kind in ("hits", "misses", "waits")}
    before = {kind: members.count(name) for kind, name in names.items()}
    with contextlib.closing(Load(proxy, protocol, requests)) as load:
        load.send_all(visits, in_flight)
    counts = {
        kind: {server: value - before[kind][server] for server, value in members.count(name).items()}
        for kind, name in names.items()
    }
    answered = [sum(counts[kind][server] for kind in names) for server in counts["hits"]]
    # Asked only now, so that nobody was kept because of it.
    outcomes = load.count(record_scores(members.members[0], requests))
    return {
        "protocol": protocol,
        "visits": len(visits),
        "outcomes": outcomes,
        "hit_rate": sum(counts["hits"].values()) / max(1.0, sum(answered)),
        "busiest_to_mean": max(answered) * len(answered) / max(1.0, sum(answered)),
    }


# ---- the experiment -------------------------------------------------------------------------------------------------


def count_megabytes(manifest: Manifest, users: int) -> float:
    """Return the cache budget that holds so many of the visitors, and not one more."""
    history_bytes = HISTORY_EVENTS * len(manifest.history_fields) * np.dtype(np.int64).itemsize
    entry = manifest.user_kv.bytes_of(HISTORY_EVENTS) + history_bytes + ENTRY_OVERHEAD_BYTES
    return float((users + 0.5) * entry / 1e6)


def make_members(repository: Path, folder: Path, flags: Sequence[str] = ()) -> Members:
    """Return servers on one repository, each with room for KEPT_USERS users, and with a log in the folder."""
    manifest = read_manifest(repository / MODEL / "1")
    budget = ["--set", f"{CACHE_BUDGET}={count_megabytes(manifest, KEPT_USERS):.6f}", "--set", "intra_op_threads=1"]
    return Members(Member(name, repository, folder / f"{name}.log", [*budget, *flags]) for name in NAMES)


def run_affinity(repository: Path, config: ModelConfig, visitors: Visitors, say: Any) -> Row:
    """Measure hit rates by policy and protocol, then lose a server under load and take it back.

    Args:
        repository: an exported repository.
        config: what is exported there.
        visitors: who comes, under each policy over each protocol.
        say: is told how it goes.
    """
    with tempfile.TemporaryDirectory() as name, make_members(repository, Path(name)) as members:
        rows = measure_policies(members, Path(name), config, visitors, say)
        with make_haproxy(members.members, Path(name)) as proxy:
            lost = lose_a_server(members, proxy, config, visitors.seed, say)
    return {
        "visitors": visitors.said, "servers": len(NAMES), "kept_users": KEPT_USERS, "in_flight": IN_FLIGHT,
        "policies": rows, "lost": lost,
    }  # fmt: skip


def measure_policies(members: Members, folder: Path, config: ModelConfig, visitors: Visitors, say: Any) -> list[Row]:
    """Send the same sequence of visits under every policy, over both protocols; histories are new each time."""
    rows = []
    for place, (policy, protocol) in enumerate(itertools.product(POLICIES, ("grpc", "http"))):
        requests = draw_requests(config, visitors.users, seed=1000 * visitors.seed + place)
        with make_haproxy(members.members, folder, policy) as proxy:
            row = measure_hit_rate(members, proxy, protocol, visitors.users, requests)
        rows.append({"policy": policy} | row)
        say(f"    {policy}, {protocol}: {100 * row['hit_rate']:.1f}% found, busiest {row['busiest_to_mean']:.2f}× mean")
    return rows


def lose_a_server(members: Members, proxy: Proxy, config: ModelConfig, seed: int, say: Any) -> Row:
    """Kill one server under load, see who moves; start it again, see who comes back."""
    users, victim = range(MAPPED_USERS), NAMES[-1]
    visitors = draw_visitors(MAPPED_USERS, seed)
    requests = draw_requests(config, visitors, seed=1000 * seed + 500)
    loads = {protocol: Load(proxy, protocol, requests) for protocol in ("grpc", "http")}
    # Users are mapped without load: a server that has too much to do passes users on for as long.
    before = map_users(proxy, users)
    with keep_sending(loads.values(), visitors):
        say(f"    server {victim} is killed under load")
        members[victim].kill()
        wait_for_servers(proxy, set(NAMES) - {victim})
    without = map_users(proxy, users)
    with keep_sending(loads.values(), visitors):
        say(f"    server {victim} is started again")
        members[victim].start()
        members[victim].wait_until_ready()
        wait_for_servers(proxy, set(NAMES))
    after = map_users(proxy, users)
    expected = record_scores(members.members[0], requests)
    for load in loads.values():
        load.close()
    return {
        "killed": find_moves(before, without, victim),
        "added": find_moves(after, without, victim),
        "came_back": sum(before[user] == after[user] for user in users) / len(users),
        "load": {
            name: {"outcomes": load.count(expected), "slowest_seconds": load.slowest} for name, load in loads.items()
        },
    }
