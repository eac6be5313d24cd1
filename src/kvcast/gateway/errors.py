"""What Triton and gRPC say when something is wrong, and what of it callers are told.

The one table of Triton's words is here. It turns them into errors of our own, with a code and a reason.
"""

import contextlib
import logging
import re
import secrets
import traceback

import grpc
import grpc.aio

from kvcast.gateway.gate import ModelDiedError, UnansweredError
from kvcast.protocol.errors import (
    BusyError,
    ErrorKind,
    InvalidRequestError,
    KvcastError,
    ServerFaultError,
    TryAgainError,
    read_tagged,
)

log = logging.getLogger("kvcast.gateway")

UNREACHABLE = "the server is starting or stopping: try again"
SHARED_MEMORY_IS_FULL = "busy: the server's shared memory is full: try again"
# Words of Triton's or gRPC's messages, what they mean, and what a caller is told instead; None: the same words.
# Triton 2.51 gives most of them the code of what does not pass (INTERNAL, NOT_FOUND).
TRITON_WORDS: tuple[tuple[re.Pattern[str], type[KvcastError], str | None], ...] = (
    (
        re.compile(r"Stub process '.*' is not healthy|Stub process is unhealthy|the stub process .* is not"),
        ModelDiedError,
        UNREACHABLE,
    ),
    (re.compile(r"shared memory pool size"), BusyError, SHARED_MEMORY_IS_FULL),
    (re.compile(r"Exceeds maximum queue size"), BusyError, None),
    (
        re.compile(r"has no available versions|is not at ready state|is not ready|Server is stopping"),
        TryAgainError,
        "the model is being replaced: try again",
    ),
)
# The gRPC library, of a connection to Triton that broke off, or cannot be made.
LOST_CONNECTION = re.compile(
    r"(?i)failed to connect|socket closed|connection (reset|refused|closed)|stream removed|goaway|broken pipe"
    r"|end of tcp stream|cancelling all calls"
)
LOST_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN)
# Of these the text may be a caller's own. The second is gRPC's, of an error that is too long: it repeats a name.
OF_CALLERS = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
CODES: dict[grpc.StatusCode, type[KvcastError]] = {
    **dict.fromkeys(OF_CALLERS, InvalidRequestError),
    grpc.StatusCode.UNAVAILABLE: TryAgainError,
    grpc.StatusCode.INTERNAL: ServerFaultError,
}
HTTP_STATUS = {kind.grpc_status: kind.http_status for kind in ErrorKind} | {
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "UNIMPLEMENTED": 501,
}
# What must not reach callers: tracebacks and paths of the server. Paths of the protocol are no secret.
REVEALING = re.compile(r"Traceback|File \"|\.py\b|site-packages|(?<![\w.:/])/(?!v2\b)(?:[\w.+\-]+/)+[\w.+\-]*")


class StatusError(KvcastError):
    """An error of no kind of ours, as of a model that there is not: the name of its gRPC status is its reason too."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


def spell(error: Exception) -> tuple[str, str, str]:
    """Return an error as gRPC spells it: status name, reason, message. An unexpected one is hidden."""
    if isinstance(error, StatusError):
        return error.status, error.status, str(error)
    if not isinstance(error, KvcastError):
        error = ServerFaultError(hide("the gateway failed", error))
    return error.kind.grpc_status, error.kind.reason, str(error)


def translate(error: grpc.aio.AioRpcError) -> KvcastError:
    """Return Triton's answer to a call as an error of our own."""
    code, text = error.code(), error.details() or ""
    tagged = read_tagged(text)
    if tagged is not None:
        return tagged
    # Triton cancels some requests while others are cancelled. Cancelling a call here raises asyncio's error instead.
    if code == grpc.StatusCode.CANCELLED:
        return UnansweredError("Triton has cancelled the request: try again")
    if code in LOST_CODES and LOST_CONNECTION.search(text):
        return ModelDiedError(UNREACHABLE)
    if code not in OF_CALLERS:
        for words, kind, message in TRITON_WORDS:
            if words.search(text):
                return kind(message or text)
    known = CODES.get(code)
    return known(conceal(text)) if known else StatusError(code.name, conceal(text))


def conceal(text: str) -> str:
    """Return the text, or a reference to the gateway's log if it would show a caller the server's inside."""
    return hide("the server cannot answer this request", None, text) if REVEALING.search(text) else text


def hide(message: str, error: BaseException | None, details: str = "") -> str:
    """Log what happened under a reference, and return a message that holds nothing but that."""
    reference = secrets.token_hex(6)
    if error is not None:
        details += "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):  # nobody reads the log any more
        log.error("%s, reference %s: %s", message, reference, details)
    return f"{message}; its log has the details under reference {reference}"
