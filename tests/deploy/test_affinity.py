"""User affinity for real: three tritonservers behind haproxy with the shipped configuration."""

import asyncio
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2

from kvcast.client import NO_RETRIES, AsyncRankerClient, CacheResult, RankerClient
from kvcast.protocol.config import load_config
from kvcast.protocol.routing import ROUTING_HEADER, hash_user
from kvcast.protocol.tensors import CANDIDATES, HISTORY, SCORES
from kvcast.server.repository import find_free_ports
from perf import affinity
from perf.affinity import KEPT_USERS, MODEL, NAMES, SERVER_HEADER, Addresses, Load, Members
from tests.deploy.tools import require_tool, run_tool

ROOT = Path(__file__).parents[2]
VISITS = int(os.environ.get("KVCAST_AFFINITY_VISITS", "240"))
SEED = int(os.environ.get("KVCAST_AFFINITY_SEED", "5"))
LEAVE_SECONDS = 3


@pytest.fixture(scope="module")
def members(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Members]:
    """Three servers."""
    require_tool("haproxy")
    folder = tmp_path_factory.mktemp("servers")
    with affinity.serve_members(tiny_repository, folder, ["--leave-seconds", str(LEAVE_SECONDS)]) as running:
        yield running


@pytest.fixture
def proxy(members: Members, tmp_path: Path) -> Iterator[Addresses]:
    """The proxy before them."""
    with affinity.run_haproxy(members, tmp_path) as running:
        affinity.wait_for_servers(running, set(NAMES))
        yield running


def test_haproxy_accepts_its_configuration_without_warnings():
    done = run_tool("haproxy", "-c", "-f", affinity.HAPROXY_CONFIG)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert affinity.HAPROXY_CONFIG.read_text().count(affinity.BOUND) == 2


def test_the_clusters_haproxy_checks_readiness_and_passes_both_protocols(members, tmp_path):
    """Its servers come from DNS: here one server with a fixed address, checked as the file says."""
    member, config = members[NAMES[0]], ROOT / "deploy" / "kubernetes" / "haproxy" / "haproxy.cfg"
    http_port, grpc_port, metrics_port = find_free_ports(3)
    words = {f":{old}\n": f"127.0.0.1:{new}\n" for old, new in ((9000, http_port), (9002, metrics_port))}
    words[":9001 "] = f"127.0.0.1:{grpc_port} "
    found = " resolvers cluster resolve-prefer ipv4 init-addr none"
    for port, address in ((8000, member.addresses["http"]), (8001, member.addresses["grpc"])):
        name = f'server-template kvcast 32 "kvcast-servers.${{NAMESPACE}}.svc.cluster.local:{port}" check{found}'
        words[name] = f"server one {address} check"
    words["http-check connect port 8000"] = f"http-check connect port {member.addresses['http'].rpartition(':')[2]}"
    path = tmp_path / "haproxy.cfg"
    path.write_text(affinity.replace_all(config.read_text(), words))
    addresses = {"http": f"127.0.0.1:{http_port}", "grpc": f"127.0.0.1:{grpc_port}"}
    with affinity.run_proxy([str(require_tool("haproxy")), "-f", str(path)], addresses):
        time.sleep(2)  # by then each backend has asked more often than it takes to call a server down
        for protocol, address in addresses.items():
            with RankerClient(address, protocol=protocol, model=MODEL, retry=NO_RETRIES) as client:
                assert len(client.rank([[1, 1]], [[1, 1, 1, 1]]).scores) == 1


def map_users_over_grpc(proxy: Addresses, users: range) -> dict[int, str]:
    message = service_pb2.ModelInferRequest(model_name=MODEL)
    for name, shape in ((HISTORY.name, [1, 1, 2]), (CANDIDATES.name, [1, 1, 4])):
        message.inputs.add(name=name, datatype="INT64", shape=shape).contents.int64_contents.extend([1] * shape[-1])
    message.outputs.add(name=SCORES.name)
    with grpc.insecure_channel(proxy["grpc"]) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        found = {}
        for user in users:
            metadata = [(ROUTING_HEADER, hash_user(user))]
            _, done = call.with_call(message.SerializeToString(), metadata=metadata, timeout=10)
            found[user] = dict(done.initial_metadata())[SERVER_HEADER]
    return found


def test_a_user_has_one_server_over_both_protocols_and_each_server_has_users(proxy):
    users = range(150)
    first, over_grpc, again = (
        affinity.map_users(proxy, users),
        map_users_over_grpc(proxy, users),
        affinity.map_users(proxy, users),
    )
    assert first == again == over_grpc
    counts = Counter(first.values())
    assert set(counts) == set(NAMES)
    assert max(counts.values()) < 2 * len(users) / len(NAMES), counts


def test_clients_share_the_cache_entry_of_a_user(proxy):
    """Each of twelve users is encoded once, whichever client asks: by chance that happens once in half a million."""
    requests = affinity.draw_requests(load_config("tiny"), range(12), seed=time.monotonic_ns())

    async def rank_all(protocol) -> list[CacheResult]:
        async with AsyncRankerClient(proxy[protocol], protocol=protocol, model=MODEL) as client:
            return [(await ask(client, user)).report.cache for user in requests]

    def ask(client, user):
        return client.rank(requests[user].history, requests[user].candidates, user_id=user, report=True)

    with RankerClient(proxy["grpc"], model=MODEL) as client:
        for user, each in requests.items():
            assert client.prefetch(each.history, user_id=user).cache == CacheResult.MISS
        assert {ask(client, user).report.cache for user in requests} == {CacheResult.HIT}
    with RankerClient(proxy["http"], protocol="http", model=MODEL) as client:
        assert {ask(client, user).report.cache for user in requests} == {CacheResult.HIT}
    for protocol in ("grpc", "http"):
        assert set(asyncio.run(rank_all(protocol))) == {CacheResult.HIT}


def test_without_a_user_id_requests_are_routed_by_history(proxy):
    requests = affinity.draw_requests(load_config("tiny"), range(12), seed=time.monotonic_ns())
    with RankerClient(proxy["grpc"], model=MODEL) as client:
        for expected in (CacheResult.MISS, CacheResult.HIT):
            asked = [client.rank(each.history, each.candidates, report=True) for each in requests.values()]
            assert {each.report.cache for each in asked} == {expected}


def test_only_the_users_of_a_lost_server_move_and_no_request_fails(members, proxy):
    result = affinity.lose_a_server(members, proxy, load_config("tiny"), seed=SEED, say=print)
    for moves in (result["killed"], result["added"]):
        assert moves["moved_of_server"] == 1
        assert moves["moved_of_others"] == 0
        assert 1 / 6 < moves["share_of_server"] < 1 / 2  # about a third
    assert result["came_back"] == 1
    for protocol, load in result["load"].items():
        outcomes = load["outcomes"]
        assert set(outcomes) == {"right", "wrong"}, f"{protocol}: {outcomes}"
        assert outcomes["wrong"] == 0
        assert outcomes["right"] > 50


def test_a_stopping_server_gets_no_requests_before_it_rejects_any(members, proxy):
    """Without one retry of the client's: the proxy has seen the readiness go while the server still answered."""
    member = members[NAMES[1]]
    requests = affinity.draw_requests(load_config("tiny"), range(40), seed=SEED)
    loads = [Load(proxy, protocol, requests, NO_RETRIES) for protocol in ("grpc", "http")]
    try:
        with affinity.keep_visiting(loads, list(requests)):
            stopping = threading.Thread(target=member.stop)
            stopping.start()
            affinity.wait_for_servers(proxy, set(NAMES) - {member.name})
            stopping.join()
    finally:
        member.start()
        member.wait_until_ready()
        affinity.wait_for_servers(proxy, set(NAMES))
    expected = affinity.record_scores(members[NAMES[0]], requests)
    outcomes = [load.count(expected) for load in loads]
    for load in loads:
        load.close()
    assert all(set(each) == {"right", "wrong"} and each["wrong"] == 0 for each in outcomes), outcomes


def test_affinity_hits_more_than_round_robin_and_as_often_as_a_simulated_lru(members, tmp_path):
    config, visitors = load_config("tiny"), affinity.draw_visitors(VISITS, SEED)
    rates = {}
    for place, policy in enumerate(("affinity", "affinity, bound 200", "round robin")):
        requests = affinity.draw_requests(config, visitors, seed=1000 * SEED + place)
        with affinity.run_haproxy(members, tmp_path, policy) as proxy:
            affinity.wait_for_servers(proxy, set(NAMES))
            # One at a time, what is found can be said beforehand.
            in_flight = 1 if policy == "affinity" else affinity.IN_FLIGHT
            row = affinity.measure_hit_rate(members, proxy, "http", visitors, requests, in_flight)
            assert row.outcomes == {"right": VISITS, "wrong": 0}
            rates[policy] = row.hit_rate
            if policy == "affinity":
                expected = replay(visitors, affinity.map_users(proxy, sorted(set(visitors))))
                assert row.hit_rate == pytest.approx(expected, abs=1e-9)
    assert rates["affinity"] > rates["round robin"] + 0.05, rates
    assert rates["affinity"] > rates["affinity, bound 200"] > rates["round robin"] - 0.02, rates


def replay(visitors: list[int], servers: dict[int, str]) -> float:
    """Return the share of visits that find their user, each server a plain LRU of its users."""
    caches: dict[str, OrderedDict[int, None]] = {name: OrderedDict() for name in NAMES}
    hits = 0
    for user in visitors:
        cache = caches[servers[user]]
        hits += user in cache
        cache[user] = None
        cache.move_to_end(user)
        if len(cache) > KEPT_USERS:
            cache.popitem(last=False)
    return hits / len(visitors)
