"""The errors that callers see, one root, split by who has to act: the caller, nobody yet, the operator.

The models raise these and the client raises the same classes, so an error keeps its meaning across the wire: as a
status code of gRPC or HTTP and a machine-readable reason, that of its `ErrorKind`. The Python backend knows fewer
codes, so a model's message begins with the reason (`tag_message`), which the gateway reads and takes off again.
"""

import enum
import re
from typing import ClassVar

# The reason travels as trailing metadata over gRPC, and as the field `reason` of the JSON body over HTTP.
REASON_METADATA = "kvcast-reason"
REASON_FIELD = "reason"


class ErrorKind(enum.Enum):
    """A kind of error and its spelling: the reason, `TritonError` attribute, HTTP status, gRPC status code."""

    INVALID_ARGUMENT = ("INVALID_ARGUMENT", "INVALID_ARG", 400, "INVALID_ARGUMENT")
    BUSY = ("BUSY", "UNAVAILABLE", 503, "RESOURCE_EXHAUSTED")
    EXPIRED = ("EXPIRED", "UNAVAILABLE", 504, "DEADLINE_EXCEEDED")
    DEADLINE_EXCEEDED = ("DEADLINE_EXCEEDED", "UNAVAILABLE", 504, "DEADLINE_EXCEEDED")
    UNAVAILABLE = ("UNAVAILABLE", "UNAVAILABLE", 503, "UNAVAILABLE")
    INTERNAL = ("INTERNAL", "INTERNAL", 500, "INTERNAL")

    def __init__(self, reason: str, triton_code: str, http_status: int, grpc_status: str) -> None:
        self.reason = reason
        self.triton_code = triton_code
        self.http_status = http_status
        self.grpc_status = grpc_status


class KvcastError(Exception):
    """Root of all errors of this project. `kind` says how it is spelled on the wire."""

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL


class InvalidRequestError(KvcastError):
    """The request is wrong: sending it again unchanged fails again."""

    kind = ErrorKind.INVALID_ARGUMENT


class TryAgainError(KvcastError):
    """The request was not answered, and the same request may succeed later."""

    kind = ErrorKind.UNAVAILABLE


class BusyError(TryAgainError):
    """The server is overloaded: it refused the request instead of queueing it."""

    kind = ErrorKind.BUSY


class DeadlineExceededError(TryAgainError):
    """No answer came within the caller's deadline."""

    kind = ErrorKind.DEADLINE_EXCEEDED


class ExpiredError(DeadlineExceededError):
    """The deadline passed while the request waited in the server's queue: it was not computed."""

    kind = ErrorKind.EXPIRED


class AddressError(InvalidRequestError):
    """The client was given the wrong address or TLS options: another protocol, no TLS, another authority."""


class NoServerError(AddressError, TryAgainError):
    """Nobody was ever reached at the client's address: it is wrong, or the server is not up yet."""


class ServerFaultError(KvcastError):
    """The server is broken or wrongly set up: its operator has to act."""


class ArtefactError(ServerFaultError):
    """An exported file is missing, damaged, or does not belong to its manifest."""


class ConfigError(KvcastError):
    """A model configuration (TOML) does not describe a model that can be built."""

    kind = ErrorKind.INVALID_ARGUMENT


ERRORS: dict[str, type[KvcastError]] = {
    error.kind.reason: error
    for error in (InvalidRequestError, BusyError, ExpiredError, DeadlineExceededError, TryAgainError, ServerFaultError)
}
# An ensemble puts its own name before the message of a step.
TAGGED = re.compile(rf"(?:in ensemble '[^']*', )?\[({'|'.join(ERRORS)})\] ", re.ASCII)


def tag_message(error: KvcastError) -> str:
    """Return the message of a model's `TritonError`: the reason in brackets, then the message."""
    return f"[{error.kind.reason}] {error}"


def read_tagged(text: str) -> KvcastError | None:
    """Return the error that a model's message describes, None if the message is not one of `tag_message`."""
    found = TAGGED.match(text)
    return ERRORS[found[1]](text[found.end() :]) if found else None
