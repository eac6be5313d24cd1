"""The guard's HTTP side: a reverse proxy before Triton's HTTP endpoint.

tritonserver 2.51 ends on some malformed bodies, so the guard sends only bodies that it wrote itself. It lets through
what it has checked (`inference_body`), paths that it knows, and nothing else; Triton's replies go back as they are, but
for those that would mislead a caller or show paths of this machine. Every error is JSON with one key, `error`.

It knows the KServe v2 paths; it does not know who may call, or how to start a server.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from kvcast.gateway.gate import ModelDiedError
from kvcast.gateway.inference_body import (
    BINARY_DATA_SIZE,
    InferenceBody,
    check_body,
    dump_header,
    parse_json_object,
    read_header_length,
)
from kvcast.gateway.passage import LONGEST_SECONDS, Passage
from kvcast.gateway.request_log import REPORTS, Entry, has_reports, name_status, needs_reports, read_string
from kvcast.gateway.shadow import make_request
from kvcast.gateway.wording import DEAD_PROCESS, NO_SHARED_MEMORY, SHARED_MEMORY_IS_FULL, UNREACHABLE, conceal, hide
from kvcast.protocol.errors import InvalidRequestError, KvcastError
from kvcast.protocol.tensors import REPORT_PARAMETER

HEADER_LENGTH = "Inference-Header-Content-Length"
DEFAULT_MAX_BODY_BYTES = 64 << 20
BODY_SECONDS = 30
# Also the time in which the headers of a request have to arrive.
KEEP_ALIVE_SECONDS = 75
CONNECT_SECONDS = 5
MICROSECONDS = 1e6
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
MODEL_NAME = re.compile(MODEL)
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

# What Triton's JSON parser does not take although ours did: the caller's mistake, which Triton calls its own.
PARSE_ERROR = re.compile(r"(?i)failed to parse|unable to parse|parse error|JSON object|JSON value")

Response = TypeVar("Response", bound=web.StreamResponse)
# Takes a reply's body and the length of its JSON, and returns those of the reply that the caller gets.
Edit = Callable[[bytes, int | None], tuple[bytes, int | None]]


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
        if is_begun(request):
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


class HttpProxy:
    """Which request goes where, and what becomes of the reply."""

    def __init__(
        self,
        upstream: str,
        passage: Passage,
        session: aiohttp.ClientSession,
        upstream_header: tuple[str, str] | None = None,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    ) -> None:
        """Take note of what is protected.

        Args:
            upstream: Triton's own HTTP address.
            passage: what both protocols share.
            session: with which the upstream is asked.
            upstream_header: opens Triton's inference.
            max_body_bytes: the largest body, decompressed.
        """
        self._upstream, self._passage, self._session = f"http://{upstream}", passage, session
        self._upstream_header, self._max_body_bytes = upstream_header, max_body_bytes
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
        except KvcastError as error:
            response = make_error(error.kind.http_status, str(error))
        except (ConnectionError, asyncio.CancelledError):
            raise  # the caller has gone
        except Exception as error:  # noqa: BLE001 a caller gets JSON whatever happens
            response = make_error(500, hide("the guard failed", error))
        return response if response.prepared else self._finish(request, response)

    def _finish(self, request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
        if is_begun(request):  # so this, an error, cannot be said any more
            raise ConnectionResetError("an answer has been begun already")
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
        """Check the body and send on what was checked, when its turn has come."""
        found = MODEL_NAME.match(path)
        model = found[1] if found else ""
        with self._passage.log.follow("http", model, lambda: self._passage.state.fingerprint) as entry:
            response = await self._rank(request, path, model, entry)
            if entry is not None:
                entry.code = name_status(response.status)
            return response

    async def _rank(self, request: web.BaseRequest, path: str, model: str, entry: Entry | None) -> web.StreamResponse:
        body = await self.bodies.read(request, self._max_body_bytes)
        lengths = request.headers.getall(HEADER_LENGTH, [])
        if len(lengths) > 1:
            raise InvalidRequestError(f"{HEADER_LENGTH}: expected it once, got it {len(lengths)} times")
        checked = check_body(body, read_header_length(lengths[0] if lengths else None, len(body)))
        headers = {name: request.headers[name] for name in TRACE_HEADERS if name in request.headers}
        sent, edit = checked, None
        if entry is not None:
            shapes = {each["name"]: each["shape"] for each in checked.header["inputs"]}
            entry.describe(checked.header.get("id", ""), len(body), headers.get("traceparent", ""), shapes)
            sent, edit = ask_for_reports(model, checked, entry)
        timeout = checked.header.get("parameters", {}).get("timeout", 0)
        seconds = timeout / MICROSECONDS if timeout else float("inf")

        async def send(left: float) -> web.StreamResponse:
            if is_begun(request):  # and the model has died since: what has been sent cannot be taken back
                raise ConnectionResetError("an answer has been begun already")
            if left != float("inf"):
                sent.header["parameters"]["timeout"] = max(1, int(min(left, LONGEST_SECONDS) * MICROSECONDS))
            if entry is not None:
                entry.note_sending()
            data, header_length = sent.encode()
            own = {HEADER_LENGTH: str(header_length), "Content-Type": "application/octet-stream"}
            return await self._forward(request, path, {**headers, **own}, data, edit)

        release = self._passage.state.fingerprint
        response = await self._passage.ask(model, len(body), seconds, send)
        shadow = self._passage.shadow
        if shadow is not None and response.status == 200 and shadow.chooses(model):
            shadow.score_again(make_request(model, checked.header, checked.tensors), release)
        return response

    async def _pass_read(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """Ask Triton; that a model is ready, only if its process lives."""
        found = MODEL_NAME.match(path)
        if path.endswith("/ready") and found and found[1] in self._passage.broken:
            raise RefusedError(503, f"{found[1]} is being replaced: its process died")
        return await self._forward(request, path, {}, None)

    async def _pass_admin(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        """Send on with the caller's headers: Triton itself asks for the admin key."""
        body = await self.bodies.read(request, self._max_body_bytes)
        if body.strip():
            parse_json_object(body, "body")
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_FORWARDED}
        return await self._forward(request, path, headers, body)

    async def _tell_readiness(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        reason = self._passage.explain_unready()
        if reason:
            raise RefusedError(503, reason)
        response = await self._forward(request, path, {}, None)
        if response.status != 200:
            raise RefusedError(503, UNREACHABLE)
        return response

    async def _tell_state(self, request: web.BaseRequest, path: str) -> web.StreamResponse:  # noqa: ARG002
        return web.json_response(dataclasses.asdict(self._passage.state))

    async def _forward(
        self,
        request: web.BaseRequest,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        edit: Edit | None = None,
    ) -> web.StreamResponse:
        """Ask the upstream; a caller who goes away takes that question along, connection and all."""
        own = dict([self._upstream_header] if self._upstream_header else [])
        kept = {name: value for name, value in headers.items() if name.lower() not in {each.lower() for each in own}}
        try:
            async with self._session.request(
                request.method, self._upstream + path, headers={**kept, **own}, data=body, allow_redirects=False
            ) as reply:
                return await self._pass_back(request, reply, edit)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, aiohttp.ServerTimeoutError):
            raise ModelDiedError(UNREACHABLE) from None  # the gate knows whether to send it again

    async def _pass_back(
        self, request: web.BaseRequest, reply: aiohttp.ClientResponse, edit: Edit | None
    ) -> web.StreamResponse:
        headers = {name: reply.headers[name] for name in REPLY_HEADERS if name in reply.headers}
        if reply.status >= 400:
            return translate_error(reply.status, await reply.read())
        if edit is not None:
            whole, header_length = edit(await reply.read(), read_length(reply))
            if header_length is not None:
                headers[HEADER_LENGTH] = str(header_length)
            return compress(request, web.Response(status=reply.status, headers=headers, body=whole))
        if reply.content_length is not None and reply.content_length <= WHOLE_REPLY_BYTES:
            return compress(request, web.Response(status=reply.status, headers=headers, body=await reply.read()))
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


def read_length(reply: aiohttp.ClientResponse) -> int | None:
    """Return the length of the JSON before binary data; None if all is JSON."""
    text = reply.headers.get(HEADER_LENGTH)
    return None if text is None else int(text)


def is_begun(request: web.BaseRequest) -> bool:
    """Whether part of an answer has been sent."""
    writer: Any = request.writer
    return bool(writer.output_size > 0)


def compress(request: web.BaseRequest, response: Response) -> Response:
    """Have a response compressed if the caller asks for that."""
    if re.search(r"gzip|deflate", request.headers.get("Accept-Encoding", "")):
        response.enable_compression()
    return response


def translate_error(status: int, body: bytes) -> web.Response:
    """Return Triton's error as the caller is to see it."""
    message = read_error(body)
    if DEAD_PROCESS.search(message):
        raise ModelDiedError(message)
    if NO_SHARED_MEMORY in message:
        return make_error(503, SHARED_MEMORY_IS_FULL)
    if status == 500 and PARSE_ERROR.search(message):
        status = 400
    return make_error(status, conceal(message))


def read_error(body: bytes) -> str:
    """Return the message of an error of Triton's."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, RecursionError):
        table = json.loads(text)
        if isinstance(table, dict) and isinstance(table.get("error"), str):
            return str(table["error"])
    return text.strip() or "the server refused this request"


def ask_for_reports(model: str, body: InferenceBody, entry: Entry) -> tuple[InferenceBody, Edit | None]:
    """Have a request's models report, for the log; return it, and what reads and removes the reports.

    A request whose caller asks for the reports stays as it is, and so does its reply; so do those of other models.
    """
    header = body.header
    outputs, parameters = header.get("outputs", []), header.get("parameters", {})
    is_ours = needs_reports(model, [output["name"] for output in outputs], parameters)
    if is_ours:
        header = {**header, "parameters": {**parameters, REPORT_PARAMETER: True}}
        if outputs:
            header["outputs"] = [*outputs, *({"name": name, "parameters": {"binary_data": False}} for name in REPORTS)]
    if not has_reports(model, header.get("parameters", {})):
        return body, None
    return InferenceBody(header, body.tensors), functools.partial(take_reports, entry=entry, remove=is_ours)


def take_reports(body: bytes, header_length: int | None, *, entry: Entry, remove: bool) -> tuple[bytes, int | None]:
    """Read the reports in a reply into the log's entry; return the reply, without them if they are to be removed."""
    try:
        edited = _take_reports(body, header_length, entry)
    except Exception:  # noqa: BLE001 the caller's answer is there, whatever the log makes of it
        return body, header_length
    return edited if remove else (body, header_length)


def _take_reports(body: bytes, header_length: int | None, entry: Entry) -> tuple[bytes, int | None]:
    """Return a reply without its reports, which go into the entry."""
    length = len(body) if header_length is None else header_length
    table, rest = json.loads(body[:length]), memoryview(body)[length:]
    outputs, pieces = [], []
    for output in table.get("outputs", []):
        size = output.get("parameters", {}).get(BINARY_DATA_SIZE, 0)
        piece, rest = rest[:size], rest[size:]
        if output["name"] in REPORTS:
            entry.reports[output["name"]] = read_string(piece) if size else output["data"][0]
        else:
            outputs.append(output)
            pieces.append(piece)
    header = dump_header({**table, "outputs": outputs})
    return b"".join([header, *pieces]), None if header_length is None else len(header)


def make_error(status: int, message: str) -> web.Response:
    """Return an error as Triton spells them."""
    return web.json_response({"error": message}, status=status)
