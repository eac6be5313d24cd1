"""`python -m kvcast.gateway`: stand before one tritonserver, on three addresses; `kvcast serve` starts it."""

import argparse
import asyncio
import contextlib
import functools
import math
import os
import signal
import ssl
import sys
from collections.abc import Iterable
from pathlib import Path

import aiohttp
import grpc
from aiohttp import web

from kvcast.gateway.gate import GateLimits
from kvcast.gateway.grpc_proxy import GrpcProxy, open_server
from kvcast.gateway.http_proxy import CONNECT_SECONDS, KEEP_ALIVE_SECONDS, READY_PATH, GuardServer, HttpProxy
from kvcast.gateway.metrics import MetricsPage
from kvcast.gateway.passage import Passage
from kvcast.gateway.request_log import RequestLog
from kvcast.gateway.shadow import Shadow
from kvcast.gateway.state import State
from kvcast.gateway.wording import say

HEADER_VARIABLE = "KVCAST_GUARD_HEADER"
# How often the launcher's word is read.
LOOK_SECONDS = 0.02
PARENT_CHECK_SECONDS = 1
# A body that is still coming when the guard is told to stop.
LAST_BODY_SECONDS = 5


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kvcast.gateway",
        description="Stand before one tritonserver: check HTTP bodies, bound the queue, hold requests back while a "
        "model process is replaced, tell the truth about health, drain on SIGTERM. `kvcast serve` starts it.",
    )
    for name, what in (("http", "HTTP"), ("grpc", "gRPC"), ("metrics", "Prometheus")):
        parser.add_argument(f"--{name}", type=read_address, required=True, metavar="HOST:PORT", help=f"{what} is here")
        parser.add_argument(f"--upstream-{name}", type=read_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--state", type=Path, required=True, metavar="FILE", help="what the launcher says, JSON")
    parser.add_argument("--leave-seconds", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--drain-seconds", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--in-flight", type=int, default=16, metavar="N", help="requests to a model that Triton holds")
    parser.add_argument("--waiting", type=int, default=256, metavar="N", help="requests to a model that may wait")
    parser.add_argument("--shadow", type=float, default=0.0, metavar="SHARE", help="rankings scored by ranker_full too")
    parser.add_argument("--log-requests", type=float, default=0.0, metavar="SHARE", help="requests logged as JSON")
    parser.add_argument("--tls-certificate", type=Path, metavar="FILE.pem")
    parser.add_argument("--tls-key", type=Path, metavar="FILE.pem")
    parser.add_argument("--tls-client-ca", type=Path, metavar="FILE.pem", help="callers must have a certificate of it")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        asyncio.run(serve(arguments))
    except (OSError, ValueError) as error:
        say(f"{error}")
        return 1
    return 0


async def serve(arguments: argparse.Namespace) -> None:
    """Listen until told to stop, then answer who is there (SIGTERM), or refuse them (SIGINT: nobody could answer).

    Raises:
        OSError: an address cannot be bound, or a TLS file cannot be read.
        ValueError: the header's variable is not name=value.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number, events in ((signal.SIGTERM, (stop,)), (signal.SIGINT, (stop, hurry))):
        loop.add_signal_handler(number, set_all, events)
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session())
        passage = Passage(GateLimits(arguments.in_flight, arguments.waiting))
        passage.log = RequestLog(arguments.log_requests, functools.partial(print, flush=True))
        grpc_proxy = GrpcProxy(join_address(arguments.upstream_grpc), passage)
        stack.push_async_callback(grpc_proxy.close)
        passage.shadow = Shadow(arguments.shadow, grpc_proxy.send_infer, lambda: passage.state.fingerprint)
        http_proxy = HttpProxy(
            join_address(arguments.upstream_http),
            passage,
            session,
            read_header(os.environ.get(HEADER_VARIABLE)),
        )
        metrics = MetricsPage(
            passage,
            session,
            f"http://{join_address(arguments.upstream_metrics)}/metrics",
            f"http://{join_address(arguments.upstream_http)}{READY_PATH}",
        )
        grpc_server = await open_server(grpc_proxy, join_address(arguments.grpc), read_credentials(arguments))
        runner = web.ServerRunner(GuardServer(http_proxy.answer, handler_cancellation=True), shutdown_timeout=1)
        metrics_runner = web.ServerRunner(GuardServer(metrics.answer), shutdown_timeout=1)
        stack.push_async_callback(metrics_runner.cleanup)
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(grpc_server.stop, grace=0.5)
        await listen(runner, arguments.http, read_ssl(arguments))
        await listen(metrics_runner, arguments.metrics, None)
        following = asyncio.create_task(follow(arguments.state, passage))
        print(f"kvcast guard: listening on {join_address(arguments.http)}, {join_address(arguments.grpc)}", flush=True)
        parent = os.getppid()
        await wait_for(stop, parent, math.inf)
        passage.is_leaving = True
        if not stop.is_set():
            say("the process that started this one has ended")
            hurry.set()
        await wait_for(hurry, parent, arguments.leave_seconds)
        passage.drain()
        http_proxy.is_stopping = True
        http_proxy.bodies.hurry(LAST_BODY_SECONDS)
        await wait_until_idle(passage, http_proxy, 0 if hurry.is_set() else arguments.drain_seconds)
        following.cancel()


def set_all(events: Iterable[asyncio.Event]) -> None:
    """Set events."""
    for event in events:
        event.set()


def open_session() -> aiohttp.ClientSession:
    """Return what asks Triton over HTTP."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    return aiohttp.ClientSession(
        connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=("Accept-Encoding",)
    )


async def listen(runner: web.ServerRunner, address: tuple[str, int], context: ssl.SSLContext | None) -> None:
    """Listen with HTTP.

    Raises:
        OSError: the address cannot be bound.
    """
    await runner.setup()
    await web.TCPSite(runner, *address, backlog=1024, ssl_context=context).start()


async def follow(path: Path, passage: Passage) -> None:
    """Read what the launcher says, whenever it says something new."""
    seen: tuple[int, int] | None = None
    while True:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # what cannot be read now is read next
            status = path.stat()
            if seen != (status.st_mtime_ns, status.st_ino):
                was_ready = passage.state.is_ready
                passage.follow(State.read(path))
                if passage.state.is_ready and not was_ready:
                    print("kvcast guard: ready", flush=True)
                seen = (status.st_mtime_ns, status.st_ino)
        await asyncio.sleep(LOOK_SECONDS)


async def wait_until_idle(passage: Passage, http_proxy: HttpProxy, seconds: float) -> None:
    """Wait until everybody who was let in has an answer; refuse those who have none by then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not passage.is_idle or http_proxy.bodies.deadlines:
                await asyncio.sleep(LOOK_SECONDS)
    passage.give_up()
    await asyncio.sleep(LOOK_SECONDS)  # for the answers to leave


async def wait_for(event: asyncio.Event, parent: int, seconds: float) -> None:
    """Wait for an event, for so many seconds, or until the process that started this one has ended."""
    deadline = asyncio.get_running_loop().time() + seconds
    while os.getppid() == parent and not event.is_set():
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(event.wait(), min(left, PARENT_CHECK_SECONDS))


def read_credentials(arguments: argparse.Namespace) -> grpc.ServerCredentials | None:
    """Return what gRPC needs for TLS, None without TLS."""
    if arguments.tls_certificate is None:
        return None
    pair = (arguments.tls_key.read_bytes(), arguments.tls_certificate.read_bytes())
    ca = arguments.tls_client_ca
    return grpc.ssl_server_credentials([pair], ca.read_bytes() if ca else None, require_client_auth=ca is not None)


def read_ssl(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    """Return what HTTP needs for TLS, None without TLS."""
    if arguments.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(arguments.tls_certificate, arguments.tls_key)
    if arguments.tls_client_ca:
        context.load_verify_locations(arguments.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def read_address(text: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        argparse.ArgumentTypeError: it is not HOST:PORT.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(address: tuple[str, int]) -> str:
    """Return `host:port`, an IPv6 host in brackets."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_header(text: str | None) -> tuple[str, str] | None:
    """Return name and value of the header that the upstream asks for.

    Raises:
        ValueError: it is not name=value.
    """
    if not text:
        return None
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"{HEADER_VARIABLE}: expected name=value")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
