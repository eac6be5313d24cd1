"""A small reverse proxy before Triton's HTTP endpoint, which one absurd body can kill: `python -m kvcast.server.guard`.

It lets through what it has checked (`inference_body`), paths that it knows, and nothing else; Triton's replies go back
as they are, but for those that would mislead a caller or show paths of this machine. Every error is JSON with one key,
`error`. It also answers for the server as a whole: ready only if a state file, which a supervisor writes, agrees.

It knows the KServe v2 paths; it does not know which models there are, who may call, or how to start a server.
gRPC does not pass here.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from kvcast.contract.errors import InvalidRequestError
from kvcast.server.inference_body import check_body, parse_json_object, read_header_length

HEADER_VARIABLE = "KVCAST_GUARD_HEADER"
HEADER_LENGTH = "Inference-Header-Content-Length"
DEFAULT_MAX_BODY_BYTES = 64 << 20
BODY_SECONDS = 30
# A body that is still coming when the guard is told to stop.
LAST_BODY_SECONDS = 5
# Also the time in which the headers of a request have to arrive.
KEEP_ALIVE_SECONDS = 75
CONNECT_SECONDS = 5
PARENT_CHECK_SECONDS = 1
# Replies up to this size are sent in one piece, larger ones as they come.
WHOLE_REPLY_BYTES = 1 << 20

NAME = r"[A-Za-z0-9_.\-]{1,256}"
MODEL = rf"/v2/models/({NAME})(?:/versions/[0-9]{{1,18}})?"
INFER_PATH = re.compile(rf"{MODEL}/infer")
READ_PATHS = re.compile(rf"/v2|/v2/health/live|{MODEL}(?:/ready|/config|/stats)?|/v2/models/stats")
ADMIN_PATHS = re.compile(
    rf"/v2/repository/(?:index|models/{NAME}/(?:load|unload))"
    rf"|/v2/(?:systemsharedmemory|cudasharedmemory)(?:/region/{NAME})?/(?:status|register|unregister)"
    rf"|/v2/logging|/v2/trace/setting|/v2/models/{NAME}/trace/setting"
)
READY_PATH = "/v2/health/ready"
STATE_PATH = "/kvcast/state"

# Of the headers of an inference request only those that tie traces together are Triton's business.
TRACE_HEADERS = ("traceparent", "tracestate")
NOT_FORWARDED = {
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
REPLY_HEADERS = ("Content-Type", HEADER_LENGTH, "Retry-After")

DEAD_MODEL = re.compile(r"Stub process '?([^' ]*)'? is not healthy")
# What Triton's JSON parser does not take although ours did: the caller's mistake, which Triton calls its own.
PARSE_ERROR = re.compile(r"(?i)failed to parse|unable to parse|parse error|JSON object|JSON value")
REVEALING = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|(?<![\w.:/])/(?!v2\b)(?:[\w.+\-]+/)+[\w.+\-]*|/(?:tmp|work|home|root)\b"
)


class RefusedError(Exception):
    """A request that gets an error as its answer."""

    def __init__(self, status: int, message: str, *, closes: bool = False) -> None:
        """Take note of the answer.

        Args:
            status: of HTTP.
            message: for the caller.
            closes: whether the connection ends with it.
        """
        super().__init__(message)
        self.status, self.message, self.closes = status, message, closes


@dataclass(frozen=True)
class GuardSettings:
    """Where it listens, what it protects, and how patient it is."""

    listen: tuple[str, int]
    upstream: tuple[str, int]
    state_file: Path | None = None
    upstream_header: tuple[str, str] | None = None
    drain_seconds: float = 30
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES


class StateFile:
    """What a supervisor says of the server, in a JSON file; read again when the file is another one."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._state: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """Return the state; empty, which means ready, if there is no file."""
        try:
            if self._path is None:
                return {}
            status = self._path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp != self._stamp:
                self._state = parse_json_object(self._path.read_bytes(), "state file")
                self._stamp = stamp
        except FileNotFoundError:
            self._state, self._stamp = {}, None
        except (OSError, InvalidRequestError) as error:  # half written: the last one that could be read stays
            say(f"the state file cannot be read: {error}")
        return self._state

    @property
    def reason_not_ready(self) -> str | None:
        """Why the server is not ready, or None if nothing is said against it."""
        state = self.read()
        if state.get("ready", True) is True and not self.is_draining:
            return None
        return str(state.get("reason") or ("server is stopping" if self.is_draining else "server is not ready"))

    @property
    def is_draining(self) -> bool:
        """Whether new inference is to go elsewhere."""
        return self.read().get("draining", False) is True


@dataclass
class Bodies:
    """The bodies that are being read, so that a guard that stops need not wait for slow ones."""

    deadlines: set[asyncio.Timeout] = field(default_factory=set)

    async def read(self, request: web.BaseRequest, limit: int) -> bytes:
        """Read a body, decompressed, within `limit` bytes and `BODY_SECONDS`.

        Raises:
            RefusedError: it is too large, too slow, or not what its headers say.
        """
        if request.content_length is not None and request.content_length > limit:
            raise RefusedError(413, f"body: expected at most {limit} bytes, got {request.content_length}", closes=True)
        await answer_expectation(request)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS) as deadline:
                self.deadlines.add(deadline)
                try:
                    async for chunk in request.content.iter_any():
                        body += chunk
                        if len(body) > limit:
                            raise RefusedError(413, f"body: expected at most {limit} bytes, got more", closes=True)
                finally:
                    self.deadlines.discard(deadline)
        except TimeoutError:
            raise RefusedError(408, f"body: it did not arrive within {BODY_SECONDS} s", closes=True) from None
        except (aiohttp.ClientPayloadError, aiohttp.http_exceptions.HttpProcessingError, web.RequestPayloadError):
            raise RefusedError(400, "body: it is not encoded as its headers say", closes=True) from None
        return bytes(body)

    def hurry(self, seconds: float) -> None:
        """Leave those that are being read this much longer."""
        latest = asyncio.get_running_loop().time() + seconds
        for deadline in self.deadlines:
            when = deadline.when()
            deadline.reschedule(latest if when is None else min(when, latest))


async def answer_expectation(request: web.BaseRequest) -> None:
    """Tell a caller who waits for it to send the body.

    Raises:
        RefusedError: the caller expects something else.
    """
    expectation = request.headers.get("Expect")
    if expectation is None:
        return
    if expectation.lower() != "100-continue":
        raise RefusedError(417, "header Expect: expected 100-continue", closes=True)
    writer: Any = request.writer
    await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    writer.output_size = 0  # the body of the answer has not begun


class Connection(RequestHandler):
    """A caller's connection, whose HTTP errors are JSON too."""

    __slots__ = ()

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log what aiohttp did not expect, but not that the rest of a body which was refused cannot be read either."""
        error = kw.get("exc_info")
        if not isinstance(error, web.RequestPayloadError):
            hide(" ".join(map(str, args)), error if isinstance(error, BaseException) else None)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 it quotes the caller's bytes
    ) -> web.StreamResponse:
        """Answer what is not HTTP, or, if the guard itself has failed, say so without showing how.

        Raises:
            ConnectionError: an answer has been begun, so there cannot be another.
        """
        writer: Any = request.writer
        if writer.output_size > 0:
            raise ConnectionError("an answer has been begun already")
        if status >= 500:
            answer = make_error(status, hide("the guard failed", exc))
        else:
            answer = make_error(status, "this is not a request of HTTP/1.1 that can be read")
        answer.force_close()
        return answer


class GuardServer(web.Server):
    """Makes our connections."""

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            access_log=None,  # type: ignore[arg-type]
        )


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Guard:
    """The proxy: which request goes where, and what becomes of the reply."""

    def __init__(self, settings: GuardSettings, session: aiohttp.ClientSession) -> None:
        """Take note of the settings.

        Args:
            settings: as asked for.
            session: with which the upstream is asked.
        """
        self._settings, self._session = settings, session
        self._upstream = "http://{}:{}".format(*settings.upstream)
        self._state = StateFile(settings.state_file)
        self.bodies = Bodies()
        self.is_stopping = False

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request; nothing but a caller who has gone escapes as an exception."""
        try:
            response = await self._route(request)
        except RefusedError as error:
            response = make_error(error.status, error.message)
            if error.closes:
                response.force_close()
        except InvalidRequestError as error:
            response = make_error(400, str(error))
        except (ConnectionError, asyncio.CancelledError):
            raise  # the caller has gone
        except Exception as error:  # noqa: BLE001 a caller gets JSON whatever happens
            response = make_error(500, hide("the guard failed", error))
        if not response.prepared:
            response.headers["Server"] = "kvcast"
            if self.is_stopping:
                response.force_close()
        return response

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        if INFER_PATH.fullmatch(path):
            return await self._answer_for(request, path, ("POST",), self._infer)
        if path == READY_PATH:
            return await self._answer_for(request, path, ("GET",), self._tell_readiness)
        if path == STATE_PATH:
            return await self._answer_for(request, path, ("GET",), self._tell_state)
        if READ_PATHS.fullmatch(path):
            return await self._answer_for(request, path, ("GET",), self._pass_read)
        if ADMIN_PATHS.fullmatch(path):
            return await self._answer_for(request, path, ("GET", "POST"), self._pass_admin)
        raise RefusedError(404, "there is nothing at this path")

    async def _answer_for(
        self,
        request: web.BaseRequest,
        path: str,
        methods: tuple[str, ...],
        handler: Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        if request.method not in methods:
            response = make_error(405, f"expected method {' or '.join(methods)}")
            response.headers["Allow"] = ", ".join(methods)
            return response
        return await handler(request, path)

    async def _infer(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """Check the body and send on what was checked."""
        if self.is_stopping or self._state.is_draining:
            raise RefusedError(503, "server is stopping; try again elsewhere", closes=True)
        body = await self.bodies.read(request, self._settings.max_body_bytes)
        lengths = request.headers.getall(HEADER_LENGTH, [])
        if len(lengths) > 1:
            raise InvalidRequestError(f"{HEADER_LENGTH}: expected it once, got it {len(lengths)} times")
        length = read_header_length(lengths[0] if lengths else None, len(body))
        data, header_length = check_body(body, length).encode()
        headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        headers |= {HEADER_LENGTH: str(header_length), "Content-Type": "application/octet-stream"}
        return await self._forward(request, path, headers, data)

    async def _pass_read(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        return await self._forward(request, path, {}, None)

    async def _pass_admin(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """Send on with the caller's headers: Triton itself asks for the admin key."""
        body = await self.bodies.read(request, self._settings.max_body_bytes)
        if body.strip():
            parse_json_object(body, "body")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_FORWARDED}
        return await self._forward(request, path, headers, body)

    async def _tell_readiness(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        reason = "server is stopping" if self.is_stopping else self._state.reason_not_ready
        if reason is not None:
            raise RefusedError(503, reason)
        response = await self._forward(request, path, {}, None)
        if response.status != 200:
            raise RefusedError(503, "server is starting or stopping; try again")
        return response

    async def _tell_state(self, request: web.BaseRequest, path: str) -> web.StreamResponse:  # noqa: ARG002
        return web.json_response(self._state.read())

    async def _forward(
        self, request: web.BaseRequest, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> web.StreamResponse:
        """Ask the upstream; a caller who goes away takes that question along, connection and all."""
        own = dict([self._settings.upstream_header] if self._settings.upstream_header else [])
        kept = {name: value for name, value in headers.items() if name.lower() not in {each.lower() for each in own}}
        try:
            async with self._session.request(
                request.method, self._upstream + path, headers={**kept, **own}, data=body, allow_redirects=False
            ) as reply:
                return await self._pass_back(request, reply)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ServerTimeoutError):
            raise RefusedError(503, "server is starting or stopping; try again") from None

    async def _pass_back(self, request: web.BaseRequest, reply: aiohttp.ClientResponse) -> web.StreamResponse:
        headers = {name: reply.headers[name] for name in REPLY_HEADERS if name in reply.headers}
        if reply.status >= 400:
            return translate_error(reply.status, await reply.read())
        if reply.content_length is not None and reply.content_length <= WHOLE_REPLY_BYTES:
            response = web.Response(status=reply.status, headers=headers, body=await reply.read())
            return compress(request, response)
        stream = web.StreamResponse(status=reply.status, headers=headers)
        if reply.content_length is not None:
            stream.content_length = reply.content_length
        compress(request, stream)
        await stream.prepare(request)
        try:
            async for chunk in reply.content.iter_any():
                await stream.write(chunk)
        except aiohttp.ClientError:
            # The status has been sent already: a connection that breaks off is all that can be said.
            raise ConnectionResetError("the upstream broke off") from None
        return stream


def compress(request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
    """Have a response compressed if the caller asks for that."""
    if re.search(r"gzip|deflate", request.headers.get("Accept-Encoding", "")):
        response.enable_compression()
    return response


def translate_error(status: int, body: bytes) -> web.Response:
    """Return Triton's error as the caller is to see it."""
    message = read_error(body)
    dead = DEAD_MODEL.search(message)
    if dead:
        return make_error(503, f"model {strip_instance(dead[1])} is being replaced; try again")
    if REVEALING.search(message):
        return make_error(status, hide("the server cannot answer this request", None, message))
    if status == 500 and PARSE_ERROR.search(message):
        return make_error(400, message)
    return make_error(status, message)


def strip_instance(name: str) -> str:
    """Return the model of an instance that Triton calls `model_0_1`."""
    return re.sub(r"_\d+_\d+$", "", name)


def read_error(body: bytes) -> str:
    """Return the message of an error of Triton's."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(text)
        if isinstance(table, dict) and isinstance(table.get("error"), str):
            return str(table["error"])
    return text.strip() or "the server refused this request"


def make_error(status: int, message: str) -> web.Response:
    """Return an error as Triton spells them."""
    return web.json_response({"error": message}, status=status)


def hide(message: str, error: BaseException | None, details: str = "") -> str:
    """Log what happened under a reference, and return a message that holds nothing but that."""
    reference = secrets.token_hex(4)
    if error is not None:
        details += "".join(traceback.format_exception(error))
    say(f"{message}, reference {reference}: {details}")
    return f"{message}; its log has the details under reference {reference}"


def say(line: str) -> None:
    """Write a line for the operator."""
    print(f"kvcast guard: {line}", file=sys.stderr, flush=True)


async def serve(settings: GuardSettings) -> None:
    """Listen until told to stop, then answer what is in flight.

    Raises:
        OSError: the address cannot be bound.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        # Triton's replies are read as they are: whoever wants them compressed gets that from here.
        auto_decompress=False,
        skip_auto_headers=("Accept-Encoding", "User-Agent", "Accept"),
    ) as session:
        guard = Guard(settings, session)
        server = GuardServer(guard.answer, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=settings.drain_seconds)
        await runner.setup()
        try:
            await web.TCPSite(runner, *settings.listen, backlog=1024).start()
            print("kvcast guard: listening on {}:{}".format(*settings.listen), flush=True)
            await wait_for_end(stop)
            await drain(guard, runner)
        finally:
            await runner.cleanup()


async def drain(guard: Guard, runner: web.ServerRunner) -> None:
    """Stop listening, and let bodies arrive that are on their way: aiohttp reads none once it shuts down."""
    guard.is_stopping = True
    for site in list(runner.sites):
        await site.stop()
    guard.bodies.hurry(LAST_BODY_SECONDS)
    while guard.bodies.deadlines:
        await asyncio.sleep(0.02)


async def wait_for_end(stop: asyncio.Event) -> None:
    """Wait for a signal, or for the end of the process that started this one."""
    parent = os.getppid()
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), PARENT_CHECK_SECONDS)
            return
    say("the process that started this one has ended")


def read_address(text: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        argparse.ArgumentTypeError: it is not HOST:PORT.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)


def read_upstream_header(text: str | None) -> tuple[str, str] | None:
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


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kvcast.server.guard", description="Check HTTP requests before Triton sees them."
    )
    parser.add_argument("--listen", type=read_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--upstream", type=read_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--state", type=Path, metavar="FILE", help="JSON that says whether the server is ready")
    parser.add_argument("--drain-seconds", type=float, default=30, metavar="SECONDS")
    parser.add_argument("--max-body-bytes", type=int, default=DEFAULT_MAX_BODY_BYTES, metavar="BYTES")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; return the exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        settings = GuardSettings(
            listen=arguments.listen,
            upstream=arguments.upstream,
            state_file=arguments.state,
            upstream_header=read_upstream_header(os.environ.get(HEADER_VARIABLE)),
            drain_seconds=arguments.drain_seconds,
            max_body_bytes=arguments.max_body_bytes,
        )
        asyncio.run(serve(settings))
    except (OSError, ValueError) as error:
        say(f"{error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
