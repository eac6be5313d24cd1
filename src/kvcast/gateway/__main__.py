"""`python -m kvcast.gateway`: one gateway process before one tritonserver, on three addresses.

`kvcast serve` starts it and hands it a socket, from which it reads its `GatewayConfig`, and then a `State` whenever
that changes. The socket's end means that the launcher has ended.
"""

import argparse
import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterable

import aiohttp
import grpc
import msgspec
from aiohttp import web

from kvcast.gateway.admission import Admission
from kvcast.gateway.config import LOOPBACK, Event, GatewayConfig, ServeConfig, State, decode_line, encode_line
from kvcast.gateway.gate import GateLimits
from kvcast.gateway.grpc_server import GrpcServer, Health, open_server
from kvcast.gateway.http_server import CONNECT_SECONDS, KEEP_ALIVE_SECONDS, GatewayServer, HttpServer
from kvcast.gateway.inference import InferencePath
from kvcast.gateway.metrics import MetricsPage
from kvcast.gateway.request_log import RequestLog
from kvcast.gateway.shadow import Shadow
from kvcast.gateway.triton import Triton

LOOK_SECONDS = 0.02
MAX_LINE_BYTES = 1 << 20
# For a body that is still coming when the gateway is told to stop.
LAST_BODY_SECONDS = 5

log = logging.getLogger("kvcast.gateway")


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvcast.gateway", description=__doc__)
    parser.add_argument("control", type=int, metavar="FD", help="the launcher's socket, inherited")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="kvcast gateway: %(message)s", stream=sys.stderr)
    try:
        asyncio.run(serve(socket.socket(fileno=arguments.control)))
    except OSError as error:
        log.error("%s", error)  # noqa: TRY400 one sentence
        return 1
    return 0


async def serve(control: socket.socket) -> None:
    """Listen until told to stop, then answer what is there (SIGTERM), or refuse it (SIGINT: no answer could come).

    Raises:
        OSError: an address cannot be bound, or a TLS file cannot be read.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number, events in ((signal.SIGTERM, (stop,)), (signal.SIGINT, (stop, hurry))):
        loop.add_signal_handler(number, set_all, events)
    reader, writer = await asyncio.open_connection(sock=control, limit=MAX_LINE_BYTES)
    config = decode_line(await reader.readline(), GatewayConfig)
    settings = config.serve
    triton_http, triton_grpc, triton_metrics = (
        f"{LOOPBACK}:{port}" for port in (config.triton_http_port, config.triton_grpc_port, config.triton_metrics_port)
    )
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session())
        triton = Triton(triton_grpc)
        stack.push_async_callback(triton.close)
        admission = Admission(GateLimits(settings.in_flight, settings.waiting))
        shadow = Shadow(settings.shadow, triton.infer, lambda: admission.state.release_id)
        request_log = RequestLog(settings.log_requests, functools.partial(print, flush=True))
        path = InferencePath(triton, admission, shadow, request_log)
        http_server = HttpServer(triton_http, admission, path, session)
        metrics = MetricsPage(
            admission, shadow, session, f"http://{triton_metrics}/metrics", f"http://{triton_http}/v2/health/ready"
        )
        health = Health()
        grpc_server = await open_server(
            GrpcServer(triton, admission, path),
            health,
            join_address(settings.host, settings.grpc_port),
            read_tls(settings),
        )
        runner = web.ServerRunner(GatewayServer(http_server.answer, handler_cancellation=True), shutdown_timeout=1)
        metrics_runner = web.ServerRunner(GatewayServer(metrics.answer), shutdown_timeout=1)
        stack.push_async_callback(metrics_runner.cleanup)
        stack.push_async_callback(runner.cleanup)
        stack.push_async_callback(grpc_server.stop, grace=0.5)
        await listen(runner, settings.host, settings.http_port, read_ssl(settings))
        await listen(metrics_runner, settings.host, settings.metrics_port, None)
        writer.write(encode_line(Event.LISTENING))
        following = asyncio.create_task(follow(reader, writer, admission, health, (stop, hurry)))
        await stop.wait()
        admission.is_leaving = True
        await health.tell(is_ready=False)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(hurry.wait(), settings.leave_seconds)
        admission.drain()
        http_server.is_stopping = True
        http_server.bodies.hurry(LAST_BODY_SECONDS)
        await wait_until_idle(admission, http_server, 0 if hurry.is_set() else settings.drain_seconds)
        following.cancel()
        writer.close()


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


async def listen(runner: web.ServerRunner, host: str, port: int, context: ssl.SSLContext | None) -> None:
    """Listen with HTTP.

    Raises:
        OSError: the address cannot be bound.
    """
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1024, ssl_context=context).start()


async def follow(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    admission: Admission,
    health: Health,
    at_end: Iterable[asyncio.Event],
) -> None:
    """Take in what the launcher says, until it has ended."""
    with contextlib.suppress(ConnectionError, ValueError, msgspec.DecodeError):  # half a line is its end too
        while line := await reader.readline():
            was_ready = admission.state.is_ready
            admission.follow(decode_line(line, State))
            await health.tell(is_ready=not admission.explain_unready())
            if admission.state.is_ready and not was_ready:
                writer.write(encode_line(Event.READY))
    log.error("the process that started this one has ended")
    set_all(at_end)


async def wait_until_idle(admission: Admission, http_server: HttpServer, seconds: float) -> None:
    """Wait until every request that was let in has its answer; refuse those that have none by then."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not admission.is_idle or http_server.bodies.deadlines:
                await asyncio.sleep(LOOK_SECONDS)
    admission.give_up()
    await asyncio.sleep(LOOK_SECONDS)  # for the answers to leave


def read_tls(settings: ServeConfig) -> grpc.ServerCredentials | None:
    """Return what gRPC needs for TLS, None without TLS."""
    if settings.tls_certificate is None or settings.tls_key is None:
        return None
    pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
    ca = settings.tls_client_ca
    return grpc.ssl_server_credentials([pair], ca.read_bytes() if ca else None, require_client_auth=ca is not None)


def read_ssl(settings: ServeConfig) -> ssl.SSLContext | None:
    """Return what HTTP needs for TLS, None without TLS."""
    if settings.tls_certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    if settings.tls_client_ca:
        context.load_verify_locations(settings.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def join_address(host: str, port: int) -> str:
    """Return `host:port`, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    sys.exit(main())
