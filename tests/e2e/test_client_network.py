"""The client and everyday networks, before a real server: wrong ports, dropped connections, proxies, many users."""

import asyncio
import contextlib
import gc
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest

from kvcast.client import (
    AddressError,
    AsyncRankerClient,
    DeadlineExceededError,
    InvalidRequestError,
    RankerClient,
    Ranking,
    TryAgainError,
)
from kvcast.client.__main__ import main
from kvcast.client.probe import main as probe
from kvcast.protocol.config import load_config
from kvcast.server import TritonServer
from tests.parity.reference import score_candidates
from tests.processes import read_until, run_serve, wait_until
from tests.relay import Relay
from tests.support import EXPORTED_TOML, TOLERANCE, draw_request, make_network

CONFIG = load_config(str(EXPORTED_TOML))
PROTOCOLS = ("grpc", "http")
MODES = ("sync", "async")
OTHER = {"grpc": "http", "http": "grpc"}


def address_of(server: TritonServer, protocol: str) -> str:
    return server.grpc_address if protocol == "grpc" else server.http_address


class Driver:
    """Makes the calls of a client of either kind in place."""

    def __init__(self, client: Any, run: Callable[[Any], Any]) -> None:
        self._client, self._run = client, run

    def __getattr__(self, name: str) -> Any:
        """Return a method of the client."""
        return lambda *arguments, **options: self._run(getattr(self._client, name)(*arguments, **options))


@contextlib.contextmanager
def drive(mode: str, *arguments: Any, **settings: Any) -> Iterator[Any]:
    """Open a client, sync or async, and make its calls in place."""
    if mode == "sync":
        with RankerClient(*arguments, **settings) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        driver = Driver(AsyncRankerClient(*arguments, **settings), runner.run)
        yield driver
        driver.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_port_of_the_other_protocol_is_told(server, protocol, mode):
    address = address_of(server, OTHER[protocol])
    with drive(mode, address, protocol=protocol) as client, pytest.raises(AddressError) as caught:
        client.get_manifest()
    assert str(caught.value).startswith(f"{address}: this port does not speak ")
    assert not isinstance(caught.value, TryAgainError)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_line_tells_it_too(server, protocol, tmp_path, capsys):
    path = tmp_path / "request.json"
    path.write_text("{}")
    for run, arguments in ((main, [str(path)]), (probe, ["--wait", "20"])):
        assert run([*arguments, "--protocol", protocol, "--address", address_of(server, OTHER[protocol])]) == 2
        assert f"--protocol {OTHER[protocol]}" in capsys.readouterr().err


def test_http_takes_a_url(server):
    history, candidates = draw_request(CONFIG, 20, 5, seed=1)
    with RankerClient(f"http://{server.http_address}", protocol="http") as client:
        assert client.rank(history, candidates).scores.shape == (5,)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_silently_dropped_connections_cost_one_deadline(server, protocol, mode):
    """Of several that were kept, over HTTP, the next call finds none of the dead ones."""
    pairs = [draw_request(CONFIG, 10 + index, 4, seed=index) for index in range(8)]
    with Relay(address_of(server, protocol)) as relay, drive(mode, relay.address, protocol=protocol) as client:
        right = [ranking.scores for ranking in client.rank_many(pairs, concurrency=4)]
        for round_ in range(2):
            before = relay.count
            relay.drop()
            with pytest.raises(DeadlineExceededError):
                client.rank(*pairs[0], deadline=1)
            again = client.rank_many(pairs, concurrency=4, deadline=20)
            assert relay.count > before, f"a new connection, round {round_}"
            for ranking, expected in zip(again, right, strict=True):
                np.testing.assert_allclose(ranking.scores, expected, rtol=0, atol=TOLERANCE)


def test_keepalive_finds_a_dropped_connection_within_a_call(server):
    history, candidates = draw_request(CONFIG, 12, 4, seed=3)
    with Relay(server.grpc_address) as relay, RankerClient(relay.address, keepalive_seconds=5, deadline=60) as client:
        right = client.rank(history, candidates).scores
        relay.drop()
        again = client.rank(history, candidates)
    np.testing.assert_allclose(again.scores, right, rtol=0, atol=TOLERANCE)
    assert again.attempts > 1, "sent again before its deadline"


def test_a_call_that_is_late_does_not_end_those_beside_it(server):
    """The connection is given up, and closed only after the last call on it."""
    slow = draw_request(CONFIG, 96, 64, seed=1)
    with RankerClient(server.grpc_address) as client, ThreadPoolExecutor(8) as pool:
        client.get_manifest()
        beside = [pool.submit(client.rank, *slow) for _ in range(8)]
        for _ in range(20):
            with pytest.raises(DeadlineExceededError):
                client.rank(*slow, deadline=1e-4)
        assert all(np.isfinite(each.result().scores).all() for each in beside)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_users_at_once_are_each_their_own(server, protocol, mode):
    pairs = [draw_request(CONFIG, length, count, seed=length) for length, count in [(0, 3), (40, 64), (96, 1), (7, 30)]]
    pairs.insert(2, (np.full((3, 2), 999), pairs[0][1]))
    pairs.append(([[1, 2], [3]], pairs[0][1]))
    with drive(mode, address_of(server, protocol), protocol=protocol, model="ranker_resident") as client:
        many = client.rank_many(pairs, user_ids=range(6), concurrency=3, report=True)
        for place, words in ((2, "expected field 'item' within 0..499, got 999"), (5, "expected a rectangular array")):
            assert isinstance(many[place], InvalidRequestError)
            assert words in str(many[place])
        for place in (0, 1, 3, 4):
            alone = client.rank(*pairs[place])
            np.testing.assert_allclose(many[place].scores, alone.scores, rtol=0, atol=TOLERANCE)
            np.testing.assert_array_equal(many[place].candidates, pairs[place][1])
            assert many[place].report is not None
        assert client.rank_many([]) == []
        with pytest.raises(ValueError, match="user_ids: expected 6, one a pair, got 1"):
            client.rank_many(pairs, user_ids=[1])
        with pytest.raises(ValueError, match="concurrency: expected 1 or more, got 0"):
            client.rank_many(pairs, concurrency=0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("model", ["ranker", "ranker_resident"])
def test_candidates_above_the_limit_score_as_they_do_in_any_other_company(server, protocol, model):
    history, candidates = draw_request(CONFIG, 50, 200, seed=5)
    with RankerClient(address_of(server, protocol), protocol=protocol, model=model) as client:
        limit = client.get_manifest().limits.candidates
        assert limit < 200
        ranking = client.rank(history, candidates, report=True)
        chunks = [client.rank(history, candidates[start : start + 50]).scores for start in range(0, 200, 50)]
        just_above = client.rank(history, candidates[: limit + 1])
    np.testing.assert_allclose(ranking.scores, np.concatenate(chunks), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(just_above.scores, ranking.scores[: limit + 1], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(ranking.candidates, candidates)
    assert ranking.report is not None
    assert isinstance(ranking, Ranking)
    weights = {name: value.numpy() for name, value in make_network(CONFIG, seed=0).state_dict().items()}
    some = [0, 63, 64, 126, 199]
    reference = score_candidates(weights, CONFIG, history, candidates[some])
    np.testing.assert_allclose(ranking.scores[some], reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_a_long_history_is_refused_or_truncated_to_its_newest_events(server, mode):
    history, candidates = draw_request(CONFIG, 150, 5, seed=6)
    history = np.maximum(history, 1)  # no event is padding
    padded = np.insert(history, [3, 100, 149], 0, axis=0)
    with drive(mode, server.grpc_address) as client:
        with pytest.raises(
            InvalidRequestError, match=r"at most L = 96 events, got 150: send the newest \(truncate=True"
        ):
            client.rank(history, candidates)
        newest = client.rank(history[-96:], candidates)
        for long in (history, padded):
            np.testing.assert_array_equal(client.rank(long, candidates, truncate=True).scores, newest.scores)
        (many,) = client.rank_many([(history, candidates)], truncate=True)
        np.testing.assert_array_equal(many.scores, newest.scores)
        assert client.prefetch(history, truncate=True).cache == "hit"
        oldest = client.rank(history[:96], candidates)
    assert np.abs(oldest.scores - newest.scores).max() > 1e-4, "which end is kept must matter"


def count_resources() -> tuple[int, int]:
    """Return the open descriptors and the threads of this process."""
    gc.collect()
    process = psutil.Process()
    return process.num_fds(), process.num_threads()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_short_lived_threads_leave_nothing_behind(server, protocol):
    pair = draw_request(CONFIG, 10, 4, seed=7)

    def run_threads(client: RankerClient, count: int) -> None:
        for _ in range(count):
            with ThreadPoolExecutor(8) as pool:  # its threads end with it
                list(pool.map(lambda _: client.rank(*pair), range(8)))

    with RankerClient(address_of(server, protocol), protocol=protocol) as client:
        run_threads(client, 3)
        descriptors, threads = count_resources()
        run_threads(client, 25)
        after = count_resources()
        # What 8 threads at a time may keep: connections of one pool, and gRPC's own few.
        assert after[0] <= descriptors + 8
        assert after[1] <= threads + 4


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_short_lived_clients_leave_nothing_behind(server, protocol):
    pair = draw_request(CONFIG, 10, 4, seed=7)

    def run_clients(count: int) -> None:
        for _ in range(count):
            with RankerClient(address_of(server, protocol), protocol=protocol) as client:
                client.rank_many([pair] * 4)

    run_clients(3)
    descriptors, threads = count_resources()
    run_clients(20)
    wait_until(lambda: count_resources() <= (descriptors + 1, threads + 1), 10)


def test_neither_server_nor_client_nor_commands_use_the_environments_proxy(tiny_repository, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            for each in (name, name.upper()):
                monkeypatch.setenv(each, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        process = run_serve(tiny_repository, "--models", "ranker_resident")
        try:
            line = read_until(process, "Ctrl-C")
            addresses = dict(zip(PROTOCOLS, _find_addresses(process), strict=True))
            assert line
            pair = draw_request(CONFIG, 10, 4, seed=8)
            for protocol, address in addresses.items():
                for mode in MODES:
                    with drive(mode, address, protocol=protocol, model="ranker_resident") as client:
                        assert client.rank(*pair).scores.shape == (4,)
            command = [sys.executable, "-c", _READ_STATE, addresses["http"]]
            state = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert state["is_ready"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        proxy.settimeout(0.1)
        with pytest.raises(TimeoutError):
            proxy.accept()


_READ_STATE = (
    "import json, sys; from kvcast.server.release import read_state; print(json.dumps(read_state(sys.argv[1])))"
)


def _find_addresses(process: subprocess.Popen[str]) -> list[str]:
    """Return where a `kvcast serve` listens, gRPC first."""
    ports = [process.args[process.args.index(flag) + 1] for flag in ("--grpc-port", "--http-port")]  # type: ignore[union-attr,index,attr-defined]
    return [f"127.0.0.1:{port}" for port in ports]
