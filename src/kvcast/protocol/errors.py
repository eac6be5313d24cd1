"""What can go wrong, split by whose move it is: the caller's, nobody's yet, the operator's.

The models raise these and the client raises the very same classes, so an error keeps its meaning across the
wire. This module knows how a kind is spelled by Triton, HTTP and gRPC; it does not know how errors travel.
"""

import enum
from typing import ClassVar


class ErrorKind(enum.Enum):
    """A kind of error and its spelling: `TritonError` attribute, HTTP status, gRPC status code."""

    INVALID_ARGUMENT = ("INVALID_ARG", 400, "INVALID_ARGUMENT")
    UNAVAILABLE = ("UNAVAILABLE", 503, "UNAVAILABLE")
    INTERNAL = ("INTERNAL", 500, "INTERNAL")

    def __init__(self, triton_code: str, http_status: int, grpc_status: str) -> None:
        self.triton_code = triton_code
        self.http_status = http_status
        self.grpc_status = grpc_status


class KvcastError(Exception):
    """Base of all errors a caller can see. `kind` says how it is spelled on the wire."""

    kind: ClassVar[ErrorKind]


class InvalidRequestError(KvcastError):
    """The request is wrong: sending it again unchanged fails again."""

    kind = ErrorKind.INVALID_ARGUMENT


class TryAgainError(KvcastError):
    """The request was not answered, and the same request may succeed later."""

    kind = ErrorKind.UNAVAILABLE


class BusyError(TryAgainError):
    """The server is at work and has too much of it: it refused the request instead of letting it wait."""


class DeadlineExceededError(TryAgainError):
    """No answer came within the caller's deadline."""


class ServerFaultError(KvcastError):
    """The server is broken or wrongly set up: its operator has to act."""

    kind = ErrorKind.INTERNAL


class ArtefactError(ServerFaultError):
    """An exported file is missing, damaged, or does not belong to its manifest."""


class ConfigError(KvcastError):
    """A model configuration (TOML) does not describe a model that can be built."""

    kind = ErrorKind.INVALID_ARGUMENT
