"""The client without a server: rankings, errors by whose move it is, the command line's exit statuses."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

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
)
from kvcast.client.__main__ import main
from kvcast.client.clients import Conversation
from kvcast.client.retry import Answer
from kvcast.client.transport import Call, HttpTransport, translate
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
    ("status", "kind"),
    [
        ("StatusCode.INVALID_ARGUMENT", InvalidRequestError),
        ("400", InvalidRequestError),
        ("StatusCode.UNAVAILABLE", TryAgainError),
        ("503", TryAgainError),
        ("StatusCode.DEADLINE_EXCEEDED", DeadlineExceededError),
        ("499", DeadlineExceededError),
        ("StatusCode.INTERNAL", ServerFaultError),
        ("500", ServerFaultError),
        (None, ServerFaultError),
    ],
)
def test_a_status_says_whose_move_it_is(status, kind):
    assert type(translate(InferenceServerException("message", status), "here:1", 2.0)) is kind


def test_other_failures_say_whose_move_it_is():
    assert type(translate(TimeoutError(), "here:1", 2.0)) is DeadlineExceededError
    assert type(translate(ConnectionRefusedError(111, "refused"), "here:1", 2.0)) is TryAgainError
    assert type(translate(KeyError("x"), "here:1", 2.0)) is ServerFaultError
    unknown = InferenceServerException("Request for unknown model: 'x' is not found", "StatusCode.NOT_FOUND")
    assert "MODELS" in str(translate(unknown, "here:1", 2.0))


@pytest.mark.parametrize(
    ("message", "grpc", "http"),
    [
        ("Stub process 'ranker_resident_0_0' is not healthy.", "INTERNAL", "500"),
        ("in ensemble 'ranker', Stub process 'user_encoder_0_0' is not healthy.", "INTERNAL", "500"),
        ("Request for unknown model: 'ranker' has no available versions", "NOT_FOUND", "404"),
        ("Request for unknown model: 'ranker' version 1 is not at ready state", "UNAVAILABLE", "503"),
        ("Request for unknown model: 'ranker' version 1 is not at ready state", "NOT_FOUND", "404"),
        ("Model 'ranker' is not ready", "INTERNAL", "500"),
        ("Server is stopping, scheduler for model has stopped accepting new inference requests", "UNAVAILABLE", "503"),
        ("failed to connect to all addresses; last error: refused", "UNAVAILABLE", "503"),
    ],
)
def test_a_model_that_is_dead_or_being_replaced_is_try_again(message, grpc, http):
    for status in (f"StatusCode.{grpc}", http):
        error = translate(InferenceServerException(message, status), "here:1", 2.0)
        assert type(error) is TryAgainError
        assert message in str(error)


@pytest.mark.parametrize(
    "words", ["busy: 5 requests are waiting already", "not computed: the caller's deadline passed"]
)
@pytest.mark.parametrize("prefix", ["", "in ensemble 'ranker', "])
def test_too_much_to_do_is_told_from_away(words, prefix):
    for status in ("StatusCode.UNAVAILABLE", "503"):
        assert type(translate(InferenceServerException(prefix + words, status), "here:1", 2.0)) is BusyError
    assert type(translate(InferenceServerException(prefix + words, "500"), "here:1", 2.0)) is ServerFaultError


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
    with pytest.raises(ValueError, match="tls: expected protocol grpc, got http"):
        RankerClient(protocol="http", tls=TlsOptions())
    assert TlsOptions().to_arguments() == {"ssl": True}
    assert TlsOptions(file, file, str(file)).to_arguments() == {
        "ssl": True,
        "root_certificates": str(file),
        "certificate_chain": str(file),
        "private_key": str(file),
    }


def test_deadlines_of_http_need_no_new_connection(silent_address):
    with contextlib.closing(HttpTransport(silent_address)) as transport:
        client = transport._get_client()
        assert transport._get_client() is client
        for deadline in (0.2, 0.1):
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError, match=f"{deadline} s"):
                transport.infer(Conversation.ask_manifest("ranker"), deadline)
            assert deadline <= time.monotonic() - started < deadline + 0.5
        assert transport._get_client() is not client, "a late answer would be the next caller's"


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


def test_threads_of_one_http_client_have_connections_of_their_own():
    with RankerClient(f"127.0.0.1:{find_free_ports(1)[0]}", protocol="http") as client:
        transport = client._transport
        clients = []
        threads = [threading.Thread(target=lambda: clients.append(transport._get_client())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(each) for each in clients}) == 4


def test_the_command_without_a_server(tmp_path, capsys):
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"history": [], "candidates": []}))
    address = f"127.0.0.1:{find_free_ports(1)[0]}"
    assert main([str(path), "--address", address, "--retry", "0"]) == 3
    assert "attempts" not in capsys.readouterr().err
    assert main([str(path), "--address", address, "--retry", "0.3"]) == 3
    assert re.search(r"try again later: .*no connection .* \(\d+ attempts\)$", capsys.readouterr().err.strip())
    assert main([str(tmp_path / "missing.json"), "--address", address]) == 2
    assert "missing.json: cannot be read" in capsys.readouterr().err
    for arguments, words in (
        (["--deadline", "-1"], "deadline"),
        (["--retry", "-1"], "retry"),
        (["--tls-ca", str(tmp_path / "missing.pem")], "missing.pem"),
        (["--tls-ca", str(path), "--protocol", "http"], "tls: expected protocol grpc"),
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
