"""The client and everyday networks, without Triton: addresses, headers, connections, event loops, proxies."""

import asyncio
import contextlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc
import pytest

from kvcast.client import (
    NO_RETRIES,
    AddressError,
    AsyncRankerClient,
    DeadlineExceededError,
    InvalidRequestError,
    NoServerError,
    RankerClient,
    RetryPolicy,
    ServerFaultError,
    TryAgainError,
)
from kvcast.client.__main__ import main
from kvcast.client.address import Address, Protocol
from kvcast.client.transport import Call, ConnectionHolder, check_headers, open_transport
from kvcast.protocol.errors import REASON_METADATA
from tests.support import find_free_ports

PROTOCOLS: tuple[Protocol, ...] = ("grpc", "http")
ANSWER = "answered by the stand-in"


def ask(mode: str, address: str | None, protocol: Protocol, **settings: Any) -> None:
    """Ask for the manifest with a client of its own, sync or async."""
    if mode == "sync":
        with RankerClient(address, protocol=protocol, **settings) as client:
            client.get_manifest()
        return

    async def run() -> None:
        async with AsyncRankerClient(address, protocol=protocol, **settings) as client:
            await client.get_manifest()

    asyncio.run(run())


class StandIn:
    """Notes the headers of every inference, and answers that it is broken."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []
        self.addresses: dict[str, str] = {}


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    stand_in = StandIn()

    class OverHttp(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            stand_in.seen.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": ANSWER, "reason": "INTERNAL"}).encode()
            self.send_response(500)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    class OverGrpc(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
        def service(self, details: Any) -> Any:
            def answer(message: bytes, rpc: Any) -> bytes:
                stand_in.seen.append(dict(rpc.invocation_metadata()))
                rpc.set_trailing_metadata(((REASON_METADATA, "INTERNAL"),))
                rpc.abort(grpc.StatusCode.INTERNAL, ANSWER)
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    over_grpc = grpc.server(futures.ThreadPoolExecutor(4), handlers=(OverGrpc(),))
    stand_in.addresses["grpc"] = f"127.0.0.1:{over_grpc.add_insecure_port('127.0.0.1:0')}"
    over_grpc.start()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), OverHttp) as over_http:
        stand_in.addresses["http"] = f"127.0.0.1:{over_http.server_port}"
        threading.Thread(target=over_http.serve_forever, daemon=True).start()
        yield stand_in
        over_http.shutdown()
    over_grpc.stop(None).wait()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:99999", "127.0.0.1:0", "127.0.0.1", "host:abc", "a b:1", "::1:8001", ":8001", "host:1/path"),
        *("user@host:1", "host:1?x", "ftp://host:1", "grpc://host:1", "://host:1"),
    ],
)
def test_what_is_no_address_is_refused_at_once(address, protocol):
    for kind in (RankerClient, AsyncRankerClient):
        with pytest.raises(ValueError, match="address: expected host:port") as caught:
            kind(address, protocol=protocol)
        assert repr(address) in str(caught.value)


def test_http_understands_urls_and_grpc_says_what_it_wants():
    parse = Address.parse
    assert parse("http://host:81/", "http").netloc == "host:81"
    assert parse("http://host", "http").port == 80
    secure = parse("https://[::1]", "http")
    assert (secure.netloc, secure.tls is not None) == ("[::1]:443", True)
    assert parse("[::1]:8001", "grpc").netloc == "[::1]:8001"
    with pytest.raises(ValueError, match=r"without a scheme over gRPC.*'http://host:8000': .* needs protocol='http'"):
        parse("http://host:8000", "grpc")


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_server_at_first_use_is_told_soon_and_is_nobody_elses_mistake(protocol, mode):
    """With a deadline of half a minute and all retries: what ends it is that nobody was ever reached."""
    refused = f"127.0.0.1:{find_free_ports(1)[0]}"
    for address, why in ((refused, "Connection refused"), ("nobody.invalid:8001", "[Nn]ame")):
        with pytest.raises(NoServerError, match=rf"^{address}: no server \(.*{why}.*\): is it up") as caught:
            ask(mode, address, protocol)
        assert isinstance(caught.value, InvalidRequestError)
        assert isinstance(caught.value, TryAgainError), "it may only be starting"


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_port_of_the_other_protocol_is_told(stand_in, protocol, mode):
    other = "http" if protocol == "grpc" else "grpc"
    with pytest.raises(AddressError, match=rf"this port does not speak .*protocol='{other}'") as caught:
        ask(mode, stand_in.addresses[other], protocol)
    assert not isinstance(caught.value, TryAgainError)


def test_a_server_that_was_reached_once_is_waited_for(stand_in):
    """Only at first use a refused connection is the caller's mistake."""
    port = find_free_ports(1)[0]
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler) as own:
        threading.Thread(target=own.serve_forever, daemon=True).start()
        with RankerClient(f"127.0.0.1:{port}", protocol="http", deadline=2, retry=RetryPolicy(seconds=1.5)) as client:
            with pytest.raises(ServerFaultError, match="501"):
                client.get_manifest()
            own.shutdown()
            own.server_close()
            with pytest.raises(TryAgainError, match="no connection") as caught:
                client.get_manifest()
    assert not isinstance(caught.value, AddressError)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_headers_of_client_and_call_arrive(stand_in, protocol, mode):
    headers = {"Authorization": "Bearer a:b c", "x-team": "search"}
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "X-Team": "ads"}
    stand_in.seen.clear()

    async def call() -> None:
        async with AsyncRankerClient(stand_in.addresses[protocol], protocol=protocol, headers=headers) as client:
            await client.get_manifest(headers=trace)

    def call_sync() -> None:
        with RankerClient(stand_in.addresses[protocol], protocol=protocol, headers=headers) as client:
            client.get_manifest(headers=trace)

    with pytest.raises(ServerFaultError, match=ANSWER):
        asyncio.run(call()) if mode == "async" else call_sync()
    (seen,) = stand_in.seen
    expected = {"authorization": "Bearer a:b c", "x-team": "ads", "traceparent": trace["traceparent"]}
    assert expected.items() <= seen.items()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_command_line_passes_headers(stand_in, protocol, tmp_path, capsys):
    path = tmp_path / "request.json"
    path.write_text("{}")
    stand_in.seen.clear()
    address = stand_in.addresses[protocol]
    headers = ["--header", "Authorization: Bearer a:b", "--header", "x-team:ads"]
    assert main([str(path), "--protocol", protocol, "--address", address, *headers]) == 4
    assert ANSWER in capsys.readouterr().err
    assert {"authorization": "Bearer a:b", "x-team": "ads"}.items() <= stand_in.seen[0].items()


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"x y": "1"}, "expected names of letters"),
        ({"": "1"}, "expected names of letters"),
        ({"x\n": "1"}, "expected names of letters"),
        ({"x": "a\r\nb: c"}, "expected x to be printable ASCII"),
        ({"x": "ü"}, "expected x to be printable ASCII"),
        ({"x": " a"}, "without spaces around it"),
        ({"x": 1}, "got int"),
        ({"Content-Length": "1"}, "content-length is the protocol's or the client's own"),
        ({"grpc-timeout": "1S"}, "grpc-timeout is the protocol's"),
        ({"x-bin": "1"}, "x-bin is the protocol's"),
        ({"x-kvcast-user": "1"}, "x-kvcast-user is the protocol's or the client's own"),
    ],
)
def test_headers_that_cannot_be_are_refused_and_their_values_not_repeated(headers, words):
    with pytest.raises(ValueError, match=words):
        RankerClient(headers=headers)
    with RankerClient() as client, pytest.raises(ValueError, match=words):
        client.get_manifest(headers=headers)
    with pytest.raises(ValueError, match="printable") as caught:
        check_headers({"authorization": "secret\n"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_environments_proxy_is_not_used(stand_in, protocol, mode, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"):
            for each in (name, name.upper()):
                monkeypatch.setenv(each, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for each in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
            monkeypatch.delenv(each, raising=False)
        with pytest.raises(ServerFaultError, match=ANSWER):
            ask(mode, stand_in.addresses[protocol], protocol)
        proxy.settimeout(0.1)
        with pytest.raises(TimeoutError):
            proxy.accept()


class Closes:
    """A session that can be closed."""


def test_a_connection_is_replaced_after_a_silent_deadline_and_closed_by_its_last_call():
    holder = ConnectionHolder(Closes)
    missed = DeadlineExceededError("late")
    first, other = holder.acquire(), holder.acquire()
    assert first is other
    assert holder.release(first, 1.0, missed, answered=False) is None, "another call is still on it"
    fresh = holder.acquire()
    assert fresh is not first
    assert holder.release(other, 1.0, None, answered=True) is first.session
    assert holder.release(fresh, 1.0, missed, answered=False) is fresh.session
    busy, slow = holder.acquire(), holder.acquire()
    holder.release(busy, 1.0, None, answered=True)
    assert holder.release(slow, 1.0, missed, answered=False) is None
    assert holder.acquire() is slow, "others were answered on it: the server is slow, the connection is there"
    assert holder.close() is slow.session
    assert holder.close() is None
    assert holder.release(slow, 1.0, missed, answered=False) is None, "closed already"
    with pytest.raises(RuntimeError, match="this client is closed"):
        holder.acquire()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_cancelled_call_is_no_sign_of_life(protocol):
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            transport = open_transport(
                Address.parse(f"127.0.0.1:{silent.getsockname()[1]}", protocol), "AsyncTransport"
            )
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(transport.infer(Call("ranker", {}, ["scores"]), 20), 0.2)
            assert not transport.connections.was_reached
            await transport.close()

    asyncio.run(run())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_closing_twice_and_using_after(stand_in, protocol):
    with RankerClient(stand_in.addresses[protocol], protocol=protocol) as client:
        with pytest.raises(ServerFaultError):
            client.get_manifest()
        client.close()
    client.close()
    with pytest.raises(RuntimeError, match="this client is closed: make a new one"):
        client.get_manifest()

    async def run() -> None:
        async with AsyncRankerClient(stand_in.addresses[protocol], protocol=protocol) as other:
            with pytest.raises(ServerFaultError):
                await other.get_manifest()
            await other.close()
        await other.close()
        with pytest.raises(RuntimeError, match="this client is closed: make a new one"):
            await other.get_manifest()

    asyncio.run(run())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_asyncio_client_is_made_anywhere_and_stays_in_one_loop(stand_in, protocol):
    client = AsyncRankerClient(stand_in.addresses[protocol], protocol=protocol)

    async def call() -> None:
        with pytest.raises(ServerFaultError, match=ANSWER):
            await client.get_manifest()

    with asyncio.Runner() as first:
        first.run(call())
        with futures.ThreadPoolExecutor(1) as other:
            called = other.submit(asyncio.run, client.get_manifest())
        with pytest.raises(RuntimeError, match="used in another event loop before: make one in each loop"):
            called.result()
        first.run(call())
        first.run(client.close())


def test_kept_http_connections_are_looked_after(stand_in):
    option = (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    address = Address.parse(stand_in.addresses["http"], "http", keepalive_seconds=7)
    with contextlib.closing(open_transport(address)) as transport:
        pool = transport.connections.acquire().session
        assert pool.urlopen("POST", "/", b"").status == 500
        connection = pool.pool.get()
        assert connection.sock.getsockopt(*option) == 7
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        connection.close()

    async def run() -> None:
        transport = open_transport(address, "AsyncTransport")
        session = transport.connections.acquire().session
        async with session.post("/", data=b"x") as response:
            await response.read()
        ((kept, _),) = next(iter(session.connector._conns.values()))
        assert kept.transport.get_extra_info("socket").getsockopt(*option) == 7
        await transport.close()

    asyncio.run(run())
    assert Address.parse("here:1", "http", keepalive_seconds=float("inf")).socket_options == []
    with pytest.raises(ServerFaultError, match=ANSWER):
        ask("sync", stand_in.addresses["grpc"], "grpc", keepalive_seconds=float("inf"), retry=NO_RETRIES)
