"""The gateway's HTTP side: inference by the same path as gRPC, a few other paths of Triton's passed on, nothing else.

Every error is JSON: Triton's `error`, and a machine-readable `reason`.
"""

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from kvcast.gateway.admission import Admission
from kvcast.gateway.errors import HTTP_STATUS, UNREACHABLE, StatusError, conceal, hide, spell
from kvcast.gateway.http_inference import ReplyFormat, parse_json, read_header_length, read_request, write_reply
from kvcast.gateway.inference import Inference, InferencePath, read_timeout, read_trace
from kvcast.gateway.triton import MAX_METADATA_BYTES, NOT_OFFERED
from kvcast.protocol.errors import REASON_FIELD, BusyError, InvalidRequestError, ServerFaultError, TryAgainError

HEADER_LENGTH = "Inference-Header-Content-Length"
DEFAULT_MAX_BODY_BYTES = 64 << 20
BODY_SECONDS = 30
# Also the time in which the headers of a request have to arrive.
KEEP_ALIVE_SECONDS = 75
CONNECT_SECONDS = 5
# After a refusal for overload, in seconds.
RETRY_AFTER = "1"

NAME = r"[A-Za-z0-9_.\-]{1,256}"
MODEL = rf"/v2/models/({NAME})(?:/versions/([0-9]{{1,18}}))?"
INFER_PATH = re.compile(rf"{MODEL}/infer")
READ_PATHS = re.compile(rf"/v2|/v2/health/live|{MODEL}(?:/ready|/config|/stats)?|/v2/models/stats")
ADMIN_PATHS = re.compile(
    rf"/v2/repository/(?:index|models/{NAME}/(?:load|unload))"
    rf"|/v2/(?:systemsharedmemory|cudasharedmemory)(?:/region/{NAME})?/(?:status|register|unregister)"
    rf"|/v2/logging|/v2/trace/setting|/v2/models/{NAME}/trace/setting"
)
READY_PATH = re.compile("/v2/health/ready")
STATE_PATH = re.compile("/kvcast/state")
Handler = Callable[[web.BaseRequest, re.Match[str]], Awaitable[web.Response]]

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
REPLY_HEADERS = ("Content-Type", "Retry-After")
CODINGS = ("identity", "gzip", "deflate")
STATUS_NAMES = {
    400: "INVALID_ARGUMENT",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
}


class RefusedError(StatusError):
    """A request that HTTP has a status of its own for."""

    def __init__(self, http_status: int, message: str, *, closes: bool = False) -> None:
        """Take the status, the message for the caller, and whether the connection ends with it."""
        super().__init__(STATUS_NAMES.get(http_status, f"HTTP_{http_status}"), message)
        self.http_status, self.closes = http_status, closes


@dataclass
class Bodies:
    """The bodies that are being read, so that a gateway that stops need not wait for slow ones."""

    deadlines: set[asyncio.Timeout] = field(default_factory=set)

    async def read(self, request: web.BaseRequest, limit: int) -> bytes:
        """Read a body, decompressed, within `limit` bytes and `BODY_SECONDS`.

        Raises:
            RefusedError: it is too large, too slow, or not what its headers say.
        """
        if request.content_length is not None and request.content_length > limit:
            raise RefusedError(413, f"body: expected at most {limit} bytes, got {request.content_length}", closes=True)
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in CODINGS:
            expected = f"expected one of {', '.join(CODINGS)}, got {encoding[:100]!r}"
            raise RefusedError(415, f"Content-Encoding: {expected}", closes=True)
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
            if not deadline.expired():
                deadline.reschedule(latest if when is None else min(when, latest))


async def answer_expectation(request: web.BaseRequest) -> None:
    """Ask for the body where the caller waits for that.

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
        """Answer what is not HTTP, or, if the gateway itself has failed, say so without showing how.

        Raises:
            ConnectionError: an answer has been begun, so there cannot be another.
        """
        if is_begun(request):
            raise ConnectionError("an answer has been begun already")
        if isinstance(exc, LineTooLong):
            answer = make_error(RefusedError(431, f"headers: expected at most {MAX_METADATA_BYTES} bytes each"))
        elif status >= 500:
            answer = make_error(ServerFaultError(hide("the gateway failed", exc)))
        else:
            answer = make_error(RefusedError(status, "this is not a request of HTTP/1.1 that can be read"))
        answer.force_close()
        return answer


class GatewayServer(web.Server):
    """Makes our connections."""

    def __call__(self) -> RequestHandler:
        """Return the protocol of a new connection."""
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=MAX_METADATA_BYTES,
            max_field_size=MAX_METADATA_BYTES,
        )


class HttpServer:
    """Which request goes where, and what becomes of the reply."""

    def __init__(
        self,
        upstream: str,
        admission: Admission,
        path: InferencePath,
        session: aiohttp.ClientSession,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    ) -> None:
        """Prepare to serve.

        Args:
            upstream: Triton's own HTTP address, for all but inference.
            admission: says what is ready.
            path: takes inference requests to Triton.
            session: with which the upstream is asked.
            max_body_bytes: the largest body, decompressed.
        """
        self._upstream, self._admission, self._path, self._session = f"http://{upstream}", admission, path, session
        self._max_body_bytes = max_body_bytes
        self.bodies = Bodies()
        self.is_stopping = False

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer any request; the only exception that escapes is that of a caller who has disconnected."""
        try:
            response = await self._route(request)
        except (ConnectionError, asyncio.CancelledError):
            raise  # the caller has gone
        except Exception as error:  # noqa: BLE001 a caller gets JSON whatever happens
            response = make_error(error)
        response.headers["Server"] = "kvcast"
        if self.is_stopping:
            response.force_close()
        return response

    async def _route(self, request: web.BaseRequest) -> web.Response:
        path = request.raw_path.partition("?")[0]
        routes: tuple[tuple[re.Pattern[str], tuple[str, ...], Handler], ...] = (
            (INFER_PATH, ("POST",), self._infer),
            (READY_PATH, ("GET",), self._tell_readiness),
            (STATE_PATH, ("GET",), self._tell_state),
            (READ_PATHS, ("GET",), self._pass_read),
            (ADMIN_PATHS, ("GET", "POST"), self._pass_admin),
        )
        for pattern, methods, handler in routes:
            found = pattern.fullmatch(path)
            if found is not None:
                if request.method in methods:
                    return await handler(request, found)
                response = make_error(RefusedError(405, f"expected method {' or '.join(methods)}"))
                response.headers["Allow"] = ", ".join(methods)
                return response
        raise RefusedError(404, "there is nothing at this path")

    async def _infer(self, request: web.BaseRequest, found: re.Match[str]) -> web.Response:
        """Turn the body into the message of gRPC, and the reply into a body."""
        model, version = found[1], found[2] or ""
        form = ReplyFormat(is_binary=False, by_name={})

        async def read() -> Inference:
            nonlocal form
            body = await self.bodies.read(request, self._max_body_bytes)
            lengths = request.headers.getall(HEADER_LENGTH, [])
            if len(lengths) > 1:
                raise InvalidRequestError(f"{HEADER_LENGTH}: expected it once, got it {len(lengths)} times")
            header_length = read_header_length(lengths[0] if lengths else None, len(body))
            message, form = read_request(body, header_length, model, version)
            trace = read_trace((name.lower(), value) for name, value in request.headers.items())
            return Inference(message, message.SerializeToString(), read_timeout(message), trace)

        content, header_length = await self._path.answer("http", model, read, lambda reply: write_reply(reply, form))
        if header_length is None:
            return compress(request, web.Response(body=content, content_type="application/json"))
        response = web.Response(body=content, content_type="application/octet-stream")
        response.headers[HEADER_LENGTH] = str(header_length)
        return compress(request, response)

    async def _pass_read(self, request: web.BaseRequest, found: re.Match[str]) -> web.Response:
        """Ask Triton; that a model is ready, only if its process lives."""
        path, model = found[0], found[1]
        if path.endswith("/ready") and not self._admission.accepts(model):
            raise TryAgainError(f"{model}: {self._admission.explain_unready() or 'its process is being replaced'}")
        response = await self._forward(request, path, {}, None)
        if path == "/v2":
            table = json.loads(response.text or "{}")
            table["extensions"] = [each for each in table.get("extensions", []) if each not in NOT_OFFERED]
            return web.json_response(table)
        # Triton's own answers about health are empty; other clients of the protocol read JSON.
        if path.endswith("/ready"):
            return web.json_response({"name": model, "ready": True})
        return web.json_response({"live": True}) if path.endswith("/live") else response

    async def _pass_admin(self, request: web.BaseRequest, found: re.Match[str]) -> web.Response:
        """Send on with the caller's headers: Triton itself asks for the admin key."""
        body = await self.bodies.read(request, self._max_body_bytes)
        if body.strip():
            parse_json(body, dict)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_FORWARDED}
        return await self._forward(request, found[0], headers, body)

    async def _tell_readiness(self, request: web.BaseRequest, found: re.Match[str]) -> web.Response:
        reason = self._admission.explain_unready()
        if reason:
            raise TryAgainError(conceal(reason))
        response = await self._forward(request, found[0], {}, None)
        if response.status != 200:
            raise TryAgainError(UNREACHABLE)
        return web.json_response({"ready": True})

    async def _tell_state(self, request: web.BaseRequest, found: re.Match[str]) -> web.Response:  # noqa: ARG002
        return web.json_response(dataclasses.asdict(self._admission.state))

    async def _forward(
        self, request: web.BaseRequest, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> web.Response:
        """Ask the upstream; when the caller goes away, the question is cancelled, connection and all."""
        try:
            async with self._session.request(
                request.method, self._upstream + path, headers=headers, data=body, allow_redirects=False
            ) as reply:
                content = await reply.read()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ServerTimeoutError):
            raise TryAgainError(UNREACHABLE) from None
        if reply.status >= 400:
            raise RefusedError(reply.status, conceal(read_error(content)))
        headers = {name: reply.headers[name] for name in REPLY_HEADERS if name in reply.headers}
        # As Triton's own, never compressed: tritonclient's asyncio client accepts that, and cannot read it.
        return web.Response(status=reply.status, headers=headers, body=content)


def compress(request: web.BaseRequest, response: web.Response) -> web.Response:
    """Have a response compressed if the caller accepts that."""
    for name in ("gzip", "deflate"):
        found = re.search(rf"{name}\s*(?:;\s*q=([0-9.]+))?", request.headers.get("Accept-Encoding", "").lower())
        if found and re.search("[1-9]", found[1] or "1"):
            response.enable_compression(web.ContentCoding(name))
            break
    return response


def is_begun(request: web.BaseRequest) -> bool:
    """Whether part of an answer has been sent."""
    writer: Any = request.writer
    return bool(writer.output_size > 0)


def read_error(body: bytes) -> str:
    """Return the message of an error of Triton's."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(text)
        if isinstance(table, dict) and isinstance(table.get("error"), str):
            return str(table["error"])
    return text.strip() or "the server refused this request"


def make_error(error: Exception) -> web.Response:
    """Return an error as Triton spells it, with its reason."""
    status, reason, message = spell(error)
    http_status = error.http_status if isinstance(error, RefusedError) else HTTP_STATUS.get(status, 500)
    response = web.json_response({"error": message, REASON_FIELD: reason}, status=http_status)
    if isinstance(error, BusyError):
        response.headers["Retry-After"] = RETRY_AFTER
    if isinstance(error, RefusedError) and error.closes:
        response.force_close()
    return response
