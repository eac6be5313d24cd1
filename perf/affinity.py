"""Cache hit rates behind a real haproxy with several real servers, and which users move when a server goes or comes.

The proxy runs the shipped configuration, with nothing changed but addresses and, to compare, the way of balancing.
Caches are small and the visitors follow Zipf's law, so that the hit rate depends on routing. All of it runs on one
machine: times mean little here; hit rates and the shares of users who move do not depend on speed.
"""

import contextlib
import csv
import http.client
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil

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
from kvcast.synthetic.shop import zipf_shares
from perf.analyzer import PerfError
from perf.harness import Harness, Record, keep_sending
from perf.processes import Counters
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
CACHE_METRICS = [f"kvcast_user_kv_{kind}_total" for kind in ("hits", "misses", "waits")]

# Host and port of http, grpc and metrics.
Addresses = dict[str, str]
Members: TypeAlias = "dict[str, Member]"


def find_addresses() -> Addresses:
    """Return free ports of this machine, one for each kind of request."""
    return {
        kind: f"127.0.0.1:{port}" for kind, port in zip(("http", "grpc", "metrics"), find_free_ports(3), strict=True)
    }


@dataclass
class Member:
    """One server of the fleet: `kvcast serve` as a process of its own, which can be killed."""

    name: str
    repository: Path
    log: Path
    flags: Sequence[str] = ()
    process: subprocess.Popen[bytes] | None = None
    addresses: Addresses = field(default_factory=find_addresses)

    def start(self) -> None:
        """Start it, on the same ports each time, without waiting until it is ready."""
        command = [sys.executable, "-m", "kvcast.server", "--repository", str(self.repository), "--models", MODEL]
        for kind, address in self.addresses.items():
            command += [f"--{kind}-port", address.rpartition(":")[2]]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.flags], stdout=log, stderr=subprocess.STDOUT)

    def wait_until_ready(self) -> None:
        """Wait until it answers.

        Raises:
            ServerError: it has ended, or takes too long.
        """
        if self.process is None or not is_ready_within(STARTS_WITHIN_SECONDS, self.addresses, self.process):
            last = self.log.read_text(errors="replace").strip().rpartition("\n")[2]
            raise ServerError(f"server {self.name} did not start: {last or 'it wrote nothing'}")

    def kill(self) -> None:
        """Kill all its processes at once, like a loss of power."""
        if self.process is not None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            self.process.kill()
            self.process.wait()

    def stop(self) -> None:
        """Stop it cleanly."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


@contextlib.contextmanager
def serve_members(repository: Path, folder: Path, flags: Sequence[str] = ()) -> Iterator[Members]:
    """Serve a repository three times, each with room for KEPT_USERS users, and with a log in the folder."""
    megabytes = count_megabytes(read_manifest(repository / MODEL / "1"), KEPT_USERS)
    budget = ["--set", f"{CACHE_BUDGET}={megabytes:.6f}", "--set", "intra_op_threads=1"]
    members = {name: Member(name, repository, folder / f"{name}.log", [*budget, *flags]) for name in NAMES}
    try:
        for member in members.values():
            member.start()
        for member in members.values():
            member.wait_until_ready()
        yield members
    finally:
        with ThreadPoolExecutor(len(members)) as pool:
            list(pool.map(Member.stop, members.values()))


def count_megabytes(manifest: Manifest, users: int) -> float:
    """Return the cache budget that holds so many of the visitors, and not one more."""
    history_bytes = HISTORY_EVENTS * len(manifest.history_fields) * np.dtype(np.int64).itemsize
    entry = manifest.user_kv.bytes_of(HISTORY_EVENTS) + history_bytes + ENTRY_OVERHEAD_BYTES
    return float((users + 0.5) * entry / 1e6)


def count_all(members: Members, metric: str) -> dict[str, float]:
    """Return a counter of the model's, by member.

    Raises:
        PerfError: a member has no metrics of the model.
    """
    found = {}
    for name, member in members.items():
        counters = Counters(member.addresses["metrics"])
        if not counters.get(MODEL, "kvcast_user_kv_budget_bytes"):
            raise PerfError(f"server {name}: its metrics page has nothing of {MODEL}")
        found[name] = counters.get(MODEL, metric)
    return found


@contextlib.contextmanager
def run_proxy(command: Sequence[str], addresses: Addresses) -> Iterator[Addresses]:
    """Run a proxy before the members; the block gets where it listens, once a server behind it is ready.

    Raises:
        PerfError: it does not start.
    """
    process = subprocess.Popen(command, env=make_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        if not is_ready_within(NOTICED_WITHIN_SECONDS, addresses, process):
            raise PerfError(f"the proxy did not start: {' '.join(command)}")
        yield addresses
    finally:
        process.terminate()
        try:
            process.wait(ENDS_WITHIN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run_haproxy(
    members: Members, folder: Path, policy: str = "affinity"
) -> contextlib.AbstractContextManager[Addresses]:
    """Run haproxy with the shipped configuration: addresses changed, and the way of balancing if asked for.

    Raises:
        PerfError: haproxy is not installed, or the configuration has not what is to be changed.
    """
    program = find_program("haproxy")
    if program is None:
        raise PerfError(explain_absence("haproxy"))
    addresses = find_addresses()
    replacements = {f"127.0.0.1:900{place}": address for place, address in enumerate(addresses.values())}
    for place, member in enumerate(members.values(), start=1):
        replacements[f"10.0.0.1{place}:8000"] = member.addresses["http"]
        replacements[f"10.0.0.1{place}:8001"] = member.addresses["grpc"]
    path = folder / f"haproxy-{addresses['http'].rpartition(':')[2]}.cfg"
    path.write_text(replace_all(HAPROXY_CONFIG.read_text(), replacements | POLICIES[policy]))
    return run_proxy([str(program), "-f", str(path)], addresses)


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


def is_ready_within(seconds: float, addresses: Addresses, process: subprocess.Popen[bytes]) -> bool:
    """Wait for a process to say that it is ready; return whether it does, and has not ended."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection(addresses["http"], timeout=5)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == http.client.OK:
                return True
        time.sleep(0.05)
    return False


# ---- routing -------------------------------------------------------------------------------------------------------


def map_users(proxy: Addresses, users: Iterable[int]) -> dict[int, str]:
    """Return which server answers each user, asked over HTTP for the users of a log with two and four fields.

    Raises:
        PerfError: one is not answered.
    """
    history = {"name": HISTORY.name, "datatype": "INT64", "shape": [1, 1, 2], "data": [1, 1]}
    candidates = {"name": CANDIDATES.name, "datatype": "INT64", "shape": [1, 1, 4], "data": [1, 1, 1, 1]}
    body = json.dumps({"inputs": [history, candidates], "outputs": [{"name": SCORES.name}]})
    connection = http.client.HTTPConnection(proxy["http"], timeout=10)
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


def find_moves(before: dict[int, str], after: dict[int, str], server: str) -> Record:
    """Return which share of the users of a server moved, and of those of the others."""
    own = [user for user, name in before.items() if name == server]
    moved = {user for user in before if before[user] != after[user]}
    return {
        "users": len(before),
        "share_of_server": len(own) / len(before),
        "moved_of_server": len(moved.intersection(own)) / max(1, len(own)),
        "moved_of_others": len(moved.difference(own)) / max(1, len(before) - len(own)),
    }


def wait_for_servers(proxy: Addresses, names: set[str]) -> None:
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


# ---- hit rates ---------------------------------------------------------------------------------------------------


def read_trace(path: Path) -> list[int]:
    """Return the user of each visit, in order of time: a number for each name in the column `user`.

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


def draw_visitors(visits: int, seed: int) -> list[int]:
    """Return the user of each visit: a few return often, most rarely (Zipf's law)."""
    drawn = np.random.default_rng(seed).choice(USERS, size=visits, p=zipf_shares(USERS, EXPONENT))
    return [int(user) for user in drawn]


def draw_requests(config: ModelConfig, users: Iterable[int], seed: int) -> dict[int, RankRequest]:
    """Return one request a user, each with a history of its own that does not change."""
    log = ClickLog(config.schema, seed=seed)
    return {user: log.draw_request(HISTORY_EVENTS, CANDIDATE_COUNT) for user in sorted(set(users))}


class Load:
    """Visits sent by several threads in order: their scores or errors, and the longest latency."""

    def __init__(
        self, proxy: Addresses, protocol: Any, requests: dict[int, RankRequest], retry: RetryPolicy = DEFAULT_RETRY
    ) -> None:
        self._client = RankerClient(proxy[protocol], protocol=protocol, model=MODEL, deadline=20, retry=retry)
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
        """Return how many answers were right, and the outcomes of the others."""
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
def keep_visiting(loads: Collection[Load], visits: Sequence[int]) -> Iterator[None]:
    """Send visits over and over, as long as the block runs and a moment around it."""
    items = itertools.cycle(itertools.product(visits, loads))
    with keep_sending(items, lambda item: item[1].send(item[0]), IN_FLIGHT):
        time.sleep(SETTLED_SECONDS)
        yield
        time.sleep(SETTLED_SECONDS)


def record_scores(member: Member, requests: dict[int, RankRequest]) -> dict[int, Any]:
    """Return the scores of one server alone for each user."""
    with RankerClient(member.addresses["grpc"], model=MODEL) as client:
        return {user: client.rank(each.history, each.candidates).scores for user, each in requests.items()}


@dataclass(frozen=True)
class HitRate:
    """The share of visits over one protocol that were cache hits, and their spread over the servers."""

    protocol: str
    visits: int
    outcomes: dict[str, int]
    hit_rate: float
    busiest_to_mean: float


def measure_hit_rate(
    members: Members,
    proxy: Addresses,
    protocol: str,
    visits: Sequence[int],
    requests: dict[int, RankRequest],
    in_flight: int = IN_FLIGHT,
) -> HitRate:
    """Send visits; return the hit rate, their spread over the servers and the outcomes."""
    before = [count_all(members, metric) for metric in CACHE_METRICS]
    with contextlib.closing(Load(proxy, protocol, requests)) as load:
        load.send_all(visits, in_flight)
    after = [count_all(members, metric) for metric in CACHE_METRICS]
    counts = [[now[name] - then[name] for name in members] for now, then in zip(after, before, strict=True)]
    answered = [sum(each) for each in zip(*counts, strict=True)]  # by each server
    # Only now, because these requests fill a cache too.
    outcomes = load.count(record_scores(members[NAMES[0]], requests))
    total = max(1.0, sum(answered))
    spread = max(answered) * len(answered) / total
    return HitRate(protocol, len(visits), outcomes, hit_rate=sum(counts[0]) / total, busiest_to_mean=spread)


# ---- the experiment -------------------------------------------------------------------------------------------------


def run_affinity(harness: Harness) -> Record:
    """Measure hit rates by policy and protocol, then kill a server under load and start it again."""
    plan = harness.plan
    if plan.trace is None:
        visitors = draw_visitors(plan.visits, plan.seed)
        said = f"{USERS} users who come by Zipf's law (exponent {EXPONENT}, seed {plan.seed})"
    else:
        visitors = read_trace(plan.trace)
        said = f"{len(set(visitors))} users of the trace {plan.trace.name}"
    with tempfile.TemporaryDirectory() as name, serve_members(harness.settings.repository, Path(name)) as members:
        rows = measure_policies(harness, members, Path(name), visitors)
        with run_haproxy(members, Path(name)) as proxy:
            lost = lose_a_server(members, proxy, harness.config, plan.seed, harness.say)
    return {
        "visitors": said,
        "servers": len(NAMES),
        "kept_users": KEPT_USERS,
        "in_flight": IN_FLIGHT,
        "policies": rows,
        "lost": lost,
    }


def measure_policies(harness: Harness, members: Members, folder: Path, visitors: list[int]) -> list[Record]:
    """Send the same sequence of visits under every policy, over both protocols; histories are new each time."""
    rows: list[Record] = []
    for place, (policy, protocol) in enumerate(itertools.product(POLICIES, ("grpc", "http"))):
        requests = draw_requests(harness.config, visitors, seed=1000 * harness.plan.seed + place)
        with run_haproxy(members, folder, policy) as proxy:
            row = measure_hit_rate(members, proxy, protocol, visitors, requests)
        rows.append({"policy": policy, **vars(row)})
        found, spread = f"{100 * row.hit_rate:.1f}% hits", f"busiest {row.busiest_to_mean:.2f}× mean"
        harness.say(f"    {policy}, {protocol}: {found}, {spread}")
    return rows


def lose_a_server(
    members: Members, proxy: Addresses, config: ModelConfig, seed: int, say: Callable[[str], None]
) -> Record:
    """Kill one server under load and start it again; return which users moved and which came back."""
    users, victim = range(MAPPED_USERS), members[NAMES[-1]]
    visitors = draw_visitors(MAPPED_USERS, seed)
    requests = draw_requests(config, visitors, seed=1000 * seed + 500)
    loads = {protocol: Load(proxy, protocol, requests) for protocol in ("grpc", "http")}
    # Users are mapped without load: an overloaded server passes users on to others.
    before = map_users(proxy, users)
    with keep_visiting(loads.values(), visitors):
        say(f"    server {victim.name} is killed under load")
        victim.kill()
        wait_for_servers(proxy, set(NAMES) - {victim.name})
    without = map_users(proxy, users)
    with keep_visiting(loads.values(), visitors):
        say(f"    server {victim.name} is started again")
        victim.start()
        victim.wait_until_ready()
        wait_for_servers(proxy, set(NAMES))
    after = map_users(proxy, users)
    expected = record_scores(members[NAMES[0]], requests)
    for load in loads.values():
        load.close()
    return {
        "killed": find_moves(before, without, victim.name),
        "added": find_moves(after, without, victim.name),
        "came_back": sum(before[user] == after[user] for user in users) / len(users),
        "load": {
            name: {"outcomes": load.count(expected), "slowest_seconds": load.slowest} for name, load in loads.items()
        },
    }
