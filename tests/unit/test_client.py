"""The client without a server: rankings, errors by whose move it is, the command line's exit statuses."""

import asyncio
import contextlib
import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pytest

from kvcast.client import (
    AsyncRankerClient,
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    RankerClient,
    Ranking,
    ServerFaultError,
    TlsOptions,
    TryAgainError,
    grpc_transport,
    http_transport,
)
from kvcast.client.__main__ import main
from kvcast.client.address import Address
from kvcast.client.clients import Conversation
from kvcast.client.retry import Answer
from kvcast.client.transport import Call, make_error, open_transport
from kvcast.protocol.errors import ExpiredError
from kvcast.protocol.manifest import read_manifest
from kvcast.protocol.routing import hash_user
from tests.support import find_free_ports


def test_top_is_sorted_and_keeps_the_callers_order_of_equals():
    ranking = Ranking(np.array([0.5, 2.0, 0.5, -1.0], np.float32), np.array([[10], [11], [12], [13]]), 0.1)
    assert [(each.index, each.item, each.score) for each in ranking.top(3)] == [
        (1, 11, 2.0),
        (0, 10, 0.5),
        (2, 12, 0.5),
    ]
    assert len(ranking.top(99)) == 4
    assert ranking.top(0) == []
    with pytest.raises(ValueError, match="k: expected 0 or more, got -1"):
        ranking.top(-1)


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        ("INVALID_ARGUMENT", "", InvalidRequestError),
        (400, "", InvalidRequestError),
        ("UNAVAILABLE", "", TryAgainError),
        (503, "", TryAgainError),
        ("DEADLINE_EXCEEDED", "", DeadlineExceededError),
        (504, "", DeadlineExceededError),
        ("INTERNAL", "", ServerFaultError),
        (500, "", ServerFaultError),
        (418, "", ServerFaultError),
        ("RESOURCE_EXHAUSTED", "", InvalidRequestError),
        ("RESOURCE_EXHAUSTED", "BUSY", BusyError),
        (503, "BUSY", BusyError),
        (503, "UNAVAILABLE", TryAgainError),
        (504, "DEADLINE_EXCEEDED", DeadlineExceededError),
        ("INVALID_ARGUMENT", "INVALID_ARGUMENT", InvalidRequestError),
        ("NOT_FOUND", "NOT_FOUND", ServerFaultError),
        (413, "RESOURCE_EXHAUSTED", InvalidRequestError),
    ],
)
def test_status_and_reason_say_whose_move_it_is(status, reason, kind):
    assert type(make_error(status, reason, "message", "here:1", 2.0)) is kind


def test_who_missed_a_deadline_is_told():
    own = make_error("DEADLINE_EXCEEDED", "", "Deadline Exceeded", "here:1", 2.0)
    servers = make_error("DEADLINE_EXCEEDED", "EXPIRED", "not computed", "here:1", 2.0)
    assert (type(own), str(own)) == (DeadlineExceededError, "here:1: no answer within the deadline of 2 s")
    assert (type(servers), str(servers)) == (ExpiredError, "here:1: not computed")


def test_other_failures_say_whose_move_it_is():
    assert type(http_transport.translate(TimeoutError(), "here:1", 2.0)[0]) is DeadlineExceededError
    assert type(http_transport.translate(ConnectionRefusedError(111, "refused"), "here:1", 2.0)[0]) is TryAgainError
    for translate in (http_transport.translate, grpc_transport.translate):
        assert type(translate(KeyError("x"), "here:1", 2.0)[0]) is ServerFaultError
    unknown = "Request for unknown model: 'x' is not found"
    assert "MODELS" in str(make_error("NOT_FOUND", "NOT_FOUND", unknown, "here:1", 2.0))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"error": "no", "reason": "BUSY"}', ("no", "BUSY")),
        (b'{"error": "no"}', ("no", "")),
        (b"<html>503</html>", ("<html>503</html>", "")),
        (b'{"error": 5}', ('{"error": 5}', "")),
        (b"", ("", "")),
    ],
)
def test_an_error_over_http_is_read_whatever_it_is(content, expected):
    assert http_transport.read_error(content) == expected


@pytest.mark.parametrize("module", ["kvcast.client.grpc_transport", "tritonclient.grpc"])
def test_a_caller_of_http_imports_no_grpc(module):
    code = (
        "import sys; from kvcast.client import RankerClient\n"
        f"with RankerClient(protocol='http'): assert {module!r} not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_server_is_try_again(protocol):
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    with RankerClient(address, protocol=protocol, deadline=0.3) as client, pytest.raises(TryAgainError, match=address):
        client.get_manifest()

    async def ask() -> None:
        async with AsyncRankerClient(address, protocol=protocol, deadline=0.3) as other:
            await other.get_manifest()

    with pytest.raises(TryAgainError, match=address):
        asyncio.run(ask())


@pytest.fixture
def silent_address():
    """An address that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_silent_server_misses_the_deadline(silent_address, protocol):
    started = time.monotonic()
    with RankerClient(silent_address, protocol=protocol) as client, pytest.raises(TryAgainError):
        client.get_manifest(deadline=0.3)

    async def ask() -> None:
        async with AsyncRankerClient(silent_address, protocol=protocol, deadline=0.3) as other:
            await other.get_manifest()

    with pytest.raises(TryAgainError):
        asyncio.run(ask())
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"protocol": "smtp"}, "expected grpc or http"),
        ({"deadline": 0}, "positive"),
        ({"deadline": float("inf")}, "positive"),
        ({"keepalive_seconds": 1}, "keepalive_seconds: expected 5 or more"),
        ({"keepalive_seconds": float("nan")}, "keepalive_seconds: expected 5 or more"),
    ],
)
def test_wrong_settings_are_refused_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        RankerClient(**arguments)


def test_tls_options_are_checked_at_once(tmp_path):
    file = tmp_path / "own.pem"
    file.touch()
    with pytest.raises(ValueError, match=r"expected ca_file to be a file, got '.*missing\.pem'"):
        TlsOptions(ca_file=tmp_path / "missing.pem")
    for one in ({"certificate_file": file}, {"key_file": file}):
        with pytest.raises(ValueError, match="certificate_file and key_file together"):
            TlsOptions(**one)
    with pytest.raises(ValueError, match="tls: expected PEM files"):
        TlsOptions(ca_file=file)
    with pytest.raises(ValueError, match="tls: expected https://"):
        RankerClient("http://here:1", protocol="http", tls=TlsOptions())


class Server(http.server.BaseHTTPRequestHandler):
    """Answers each POST with 503; one that says `slow`, byte by byte."""

    protocol_version = "HTTP/1.1"
    connections: ClassVar[set[int]] = set()

    def do_POST(self) -> None:
        self.connections.add(self.client_address[1])
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Content-Length", "30")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(30):
                self.wfile.write(b"x")
                time.sleep(0.1 if b"slow" in body else 0)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def http_address():
    Server.connections.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_deadline_of_http_is_that_of_the_whole_answer(http_address):
    """A connection whose answer was late is not used again: the rest would be the next caller's."""
    with contextlib.closing(open_transport(Address.parse(http_address, "http"))) as transport:
        for _ in range(2):
            with pytest.raises(TryAgainError, match="xxx"):
                transport.infer(Conversation.ask_manifest("ranker"), 5)
        assert len(Server.connections) == 1, "a connection is used again"
        with pytest.raises(DeadlineExceededError, match=r"0\.3 s"):
            transport.infer(Call("ranker", {}, ["slow"]), 0.3)
        with pytest.raises(TryAgainError, match="xxx"):
            transport.infer(Conversation.ask_manifest("ranker"), 5)
        assert len(Server.connections) == 2


@pytest.fixture
def conversation(tiny_repository):
    return Conversation(read_manifest(tiny_repository / "user_encoder" / "1"))


@pytest.mark.parametrize(
    ("history", "candidates", "words"),
    [
        ([[1, 2], [3]], [[1, 1, 1, 1]], "history: expected a rectangular array"),
        ([[1, 2]], [], "candidates: expected N = 1 to 64 candidates, got 0"),
        ([[1, 2]], [[1, 1, 1]], "candidates: expected 4 fields (item, category, brand, price_bucket) per candidate"),
        ([[1.0, 2.0]], [[1, 1, 1, 1]], "history: expected dtype INT64, got float64"),
        ([[1, float("nan")]], [[1, 1, 1, 1]], "history: expected dtype INT64, got float64"),
        ([1, 2], [[1, 1, 1, 1]], "history: expected rank 3"),
        ([[], []], [[1, 1, 1, 1]], "history: expected 2 fields (item, action) per event, got 0"),
        ([["a", "b"]], [[1, 1, 1, 1]], "history: expected dtype INT64"),
        ([[1, 2]], [[500, 1, 1, 1]], "candidates: expected field 'item' within 0..499, got 500 at candidate 0"),
    ],
)
def test_wrong_requests_are_refused_before_sending(conversation, history, candidates, words):
    with pytest.raises(InvalidRequestError) as caught:
        conversation.ask_scores(history, candidates)
    assert words in str(caught.value)


@pytest.mark.parametrize("scores", [np.zeros((1, 2)), np.zeros(3), np.full((1, 3), np.nan)])
def test_scores_that_cannot_be_used_are_the_servers_fault(scores):
    call = Call("ranker", {"candidates": np.ones((1, 3, 4), np.int64)}, ["scores"])
    with pytest.raises(ServerFaultError, match="scores: expected 3 finite numbers"):
        Conversation.conclude(call, Answer({"scores": scores}, 1, 0.1))


def test_the_command_without_a_server(tmp_path, capsys):
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"history": [], "candidates": []}))
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    assert main([str(path), "--address", address, "--retry", "0"]) == 2
    assert "attempts" not in capsys.readouterr().err
    assert main([str(path), "--address", address, "--retry", "0.3"]) == 2
    expected = rf"kvcast rank: {address}: no server \(Connection refused\): is it up, .* \(\d+ attempts\)"
    assert re.fullmatch(expected, capsys.readouterr().err.strip())
    assert main([str(tmp_path / "missing.json"), "--address", address]) == 2
    assert "missing.json: cannot be read" in capsys.readouterr().err
    for arguments, words in (
        (["--deadline", "-1"], "deadline"),
        (["--retry", "-1"], "retry"),
        (["--tls-ca", str(tmp_path / "missing.pem")], "missing.pem"),
        (["--tls-ca", str(path), "--protocol", "http"], "tls: expected PEM files"),
        (["--header", "authorization"], "--header: expected NAME:VALUE, got 'authorization'"),
        (["--header", "content-length: 5"], "content-length is the protocol's or the client's own"),
        (["--address", "http://127.0.0.1:1"], "address: expected host:port without a scheme over gRPC"),
    ):
        assert main([str(path), *arguments]) == 2
        assert words in capsys.readouterr().err


def test_a_user_is_routed_by_a_hash_of_the_id():
    keys = [hash_user(user) for user in ("ann", "bob", 7, 8)]
    assert all(re.fullmatch("[0-9a-f]{32}", key) for key in keys)
    assert len(set(keys)) == len(keys)
    assert hash_user(7) == hash_user("7")
    assert "ann" not in hash_user("ann")
    assert hash_user("ann") == "fb3b98983d3f9bcf0cc3be60699c4489", (
        "users would move to other servers with a new version of the client"
    )


def test_who_has_no_id_is_routed_by_the_history_and_who_has_none_by_nothing(tiny_repository):
    talk = Conversation(read_manifest(tiny_repository / "user_encoder" / "1"), "ranker_resident")
    history, candidates = [[3, 1], [4, 1]], [[1, 1, 1, 1]]
    rank, prefetch = talk.ask_scores(history, candidates), talk.ask_prefetch(history)
    assert rank.routing_key == prefetch.routing_key is not None
    assert talk.ask_scores(history[:1], candidates).routing_key != rank.routing_key
    assert talk.ask_scores([], candidates).routing_key is None
    assert talk.ask_scores([], candidates, user_id=5).routing_key == hash_user(5)
    assert talk.ask_prefetch(history, user_id=5).routing_key == hash_user(5)
