"""What all transports share: one inference as a `Call`, and errors by status code and reason.

A transport knows tensors by name and raises `KvcastError`s, whatever its library's own habits. Those of gRPC and HTTP
are imported when they are used: `open_transport`, `open_async_transport`.
"""

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from kvcast.protocol.errors import (
    ERRORS,
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    KvcastError,
    ServerFaultError,
    TryAgainError,
)

Protocol = Literal["grpc", "http"]
Tensors = dict[str, npt.NDArray[Any]]

# The part of the caller's deadline that a request may not spend in the server's queue: a refusal has to arrive before
# the caller stops listening.
REFUSAL_SHARE = 0.1
MICROSECONDS = 1e6
# Longer deadlines are none: they would not fit into a socket's timeout, or into what Triton reads.
LONGEST_SECONDS = 1e6
# What a status means that comes without a reason, as from a proxy, from gRPC itself, or from Triton without a gateway.
# Everything that is not listed is the server's fault.
ERRORS_BY_STATUS: dict[str | int, type[KvcastError]] = {
    "INVALID_ARGUMENT": InvalidRequestError,
    "RESOURCE_EXHAUSTED": InvalidRequestError,  # gRPC's own, of a message that is too large
    "UNAVAILABLE": TryAgainError,
    "CANCELLED": TryAgainError,
    "DEADLINE_EXCEEDED": DeadlineExceededError,
    400: InvalidRequestError,
    413: InvalidRequestError,
    431: InvalidRequestError,
    429: BusyError,
    502: TryAgainError,
    503: TryAgainError,
    504: DeadlineExceededError,
}


@dataclass(frozen=True)
class TlsOptions:
    """Encrypt gRPC. Paths of PEM files.

    ca_file: CA of the server's certificate; None is what gRPC trusts by itself.
    certificate_file, key_file: the client's own certificate and its key, for a server that asks for one (mutual TLS).
    """

    ca_file: str | Path | None = None
    certificate_file: str | Path | None = None
    key_file: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is sent.

        Raises:
            ValueError: a file is missing, or a certificate comes without its key.
        """
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("tls: expected certificate_file and key_file together, got one of them")
        for name, path in vars(self).items():
            if path is not None and not Path(path).is_file():
                raise ValueError(f"tls: expected {name} to be a file, got {str(path)!r}")


@dataclass(frozen=True)
class Call:
    """What one inference asks for: arrays by input name (batch axis first), the outputs wanted, request parameters.

    routing_key: by which a proxy before several servers chooses one; None leaves it the choice.
    """

    model: str
    inputs: Tensors
    outputs: Sequence[str]
    parameters: Mapping[str, bool] = field(default_factory=dict)
    routing_key: str | None = None


class Transport(abc.ABC):
    """A sync connection to one server. Safe to use from several threads."""

    @abc.abstractmethod
    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference; return the outputs by name.

        Args:
            call: what to ask for.
            deadline: seconds within which the answer must be here; most of it travels to the server's queue too.

        Raises:
            InvalidRequestError, TryAgainError, ServerFaultError: by who has to act.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the connections."""


class AsyncTransport(abc.ABC):
    """An asyncio connection to one server."""

    @abc.abstractmethod
    async def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference, as `Transport.infer`."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Close the connections."""


def open_transport(protocol: Protocol, address: str, tls: TlsOptions | None = None) -> Transport:
    """Return the sync transport of a protocol; nothing is sent yet."""
    if protocol == "grpc":
        from kvcast.client.grpc_transport import GrpcTransport  # noqa: PLC0415 a caller of HTTP needs no gRPC

        return GrpcTransport(address, tls)
    from kvcast.client.http_transport import HttpTransport  # noqa: PLC0415 nor the other way round

    return HttpTransport(address)


def open_async_transport(protocol: Protocol, address: str, tls: TlsOptions | None = None) -> AsyncTransport:
    """Return the asyncio transport of a protocol; nothing is sent yet."""
    if protocol == "grpc":
        from kvcast.client.grpc_transport import AsyncGrpcTransport  # noqa: PLC0415 a caller of HTTP needs no gRPC

        return AsyncGrpcTransport(address, tls)
    from kvcast.client.http_transport import AsyncHttpTransport  # noqa: PLC0415 nor the other way round

    return AsyncHttpTransport(address)


def make_error(status: str | int, reason: str, message: str, address: str, deadline: float) -> KvcastError:
    """Return the error that an answer is.

    Args:
        status: name of the gRPC status, or HTTP's number.
        reason: the server's machine-readable one; empty where there is none.
        message: the server's.
        address: of the server.
        deadline: seconds that were asked for.
    """
    kind = ERRORS.get(reason) or ERRORS_BY_STATUS.get(status, ServerFaultError)
    if kind is InvalidRequestError:
        return kind(message)
    if kind is DeadlineExceededError and not reason:
        return miss_deadline(address, deadline)
    if kind is TryAgainError and not reason and "failed to connect" in message:  # gRPC's words
        return miss_server(address, message)
    hint = ": is it among the server's MODELS?" if "unknown model" in message else ""
    return kind(f"{address}: {message}{hint}")


def miss_server(address: str, reason: str) -> TryAgainError:
    """Return the error of a connection that could not be made."""
    return TryAgainError(f"{address}: no connection ({reason}): is the server up, and is this its port?")


def miss_deadline(address: str, deadline: float) -> DeadlineExceededError:
    """Return the error of an answer that did not come."""
    return DeadlineExceededError(f"{address}: no answer within the deadline of {deadline:g} s")


def limit_queueing(deadline: float) -> int:
    """Return the microseconds that a request may spend in the server's queue."""
    return max(1, int((1 - REFUSAL_SHARE) * min(deadline, LONGEST_SECONDS) * MICROSECONDS))


def read_outputs(reply: Any, outputs: Sequence[str]) -> Tensors:
    """Return the outputs of tritonclient's `InferResult` by name.

    Raises:
        ServerFaultError: one is missing: Triton can answer OK without it (a cached error, a numpy 2 stub).
    """
    arrays = {name: reply.as_numpy(name) for name in outputs}
    missing = [name for name, array in arrays.items() if array is None]
    if missing:
        raise ServerFaultError(f"the server answered without the outputs {', '.join(missing)}")
    return arrays
