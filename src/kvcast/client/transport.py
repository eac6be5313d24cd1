"""What all transports share: one inference as a `Call`, the connections of a client, errors by status and reason.

A transport knows tensors by name and raises `KvcastError`s, whatever its library's own habits. Those of gRPC and HTTP
are imported when they are used: `open_transport`. None asks the environment for a proxy.
"""

import abc
import asyncio
import importlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from kvcast.client.address import Address
from kvcast.protocol.errors import (
    ERRORS,
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    KvcastError,
    ServerFaultError,
    TryAgainError,
)
from kvcast.protocol.routing import ROUTING_HEADER

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
# What gRPC says by itself, without an answer of the server.
SILENT = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}
# Looking for the reason why a first connection fails takes no longer.
LOOK_SECONDS = 1.0
# What is a header of HTTP and a key of gRPC's metadata alike.
HEADER_NAME = re.compile(r"[a-z0-9_.-]+")
HEADER_VALUE = re.compile(r"(?! )[\x20-\x7e]*(?<! )")
# Headers that say how a message travels; the routing key comes from `user_id`.
OWN_HEADERS = {
    *("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "host"),
    *("inference-header-content-length", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "user-agent"),
    ROUTING_HEADER,
}


@dataclass(frozen=True)
class Call:
    """What one inference asks for: arrays by input name (batch axis first), the outputs wanted, request parameters.

    routing_key: by which a proxy before several servers chooses one; None leaves it the choice.
    headers: of HTTP, metadata over gRPC, as `check_headers` returns them.
    """

    model: str
    inputs: Tensors
    outputs: Sequence[str]
    parameters: Mapping[str, bool] = field(default_factory=dict)
    routing_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        """The headers and the routing key."""
        return [*self.headers.items(), *([] if self.routing_key is None else [(ROUTING_HEADER, self.routing_key)])]


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


@dataclass
class Connection:
    """A session (gRPC channel, HTTP pool or session), how many calls are on it, and when one was last answered."""

    session: Any
    calls: int = 0
    last_answer: float = 0.0


class ConnectionHolder:
    """The connection that all calls of a client share. Safe to use from several threads.

    A network can drop a connection without telling either side. So if no call was answered during one that misses its
    deadline, the next call gets a new connection; the old one is closed by the last call on it.
    """

    def __init__(self, open_session: Callable[[], Any]) -> None:
        self._open = open_session
        self._lock = threading.Lock()
        self._current: Connection | None = None
        self._closed = False
        self.was_reached = False

    def acquire(self) -> Connection:
        """Return the connection for a call, which has to `release` it.

        Raises:
            RuntimeError: the client is closed.
        """
        with self._lock:
            if self._closed:
                raise RuntimeError("this client is closed: make a new one")
            if self._current is None:
                self._current = Connection(self._open())
            self._current.calls += 1
            return self._current

    def release(self, connection: Connection, started: float, error: KvcastError | None, *, answered: bool) -> Any:
        """End a call that has begun at `started`; return a session that has to be closed now, or None.

        answered: the server has answered, if only with an error.
        """
        with self._lock:
            connection.calls -= 1
            if answered:
                self.was_reached, connection.last_answer = True, time.monotonic()
            elif isinstance(error, DeadlineExceededError) and connection.last_answer < started:
                self._current = None if self._current is connection else self._current
            return connection.session if connection is not self._current and not connection.calls else None

    def close(self) -> Any:
        """Let no more calls on; return the session in use, which has to be closed, or None."""
        with self._lock:
            connection, self._current, self._closed = self._current, None, True
            if connection is None:
                return None
            connection.calls += 1  # the last call must not close it again
            return connection.session


class _Network:
    """What transports over a network share. A subclass says how to open a session, to send on it, to name an error."""

    open_session: Callable[[Address], Any]
    # Runs one inference, awaited or not, and raises anything.
    send: Callable[[Any, Call, float], Any]
    # Returns the error of our own that says who has to act, and whether the server has answered.
    translate: Callable[[Exception, str, float], tuple[KvcastError, bool]]

    def __init__(self, address: Address) -> None:
        self.address = address
        self.connections = ConnectionHolder(lambda: self.open_session(address))

    def is_unreached(self, error: KvcastError, *, answered: bool) -> bool:
        """Whether the address may be wrong: there is no connection, and never was one."""
        return type(error) is TryAgainError and not (answered or self.connections.was_reached)


class NetworkTransport(_Network, Transport):
    """A transport over a network."""

    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        connection, started, deadline = self.connections.acquire(), time.monotonic(), min(deadline, LONGEST_SECONDS)
        error, answered = None, False
        try:
            outputs: Tensors = self.send(connection.session, call, deadline)
        except Exception as raised:
            error, answered = self.translate(raised, self.address.text, deadline)
            if self.is_unreached(error, answered=answered):
                error = self.address.diagnose(min(deadline, LOOK_SECONDS)) or error
            raise error from raised
        else:
            answered = True
            return outputs
        finally:
            if (session := self.connections.release(connection, started, error, answered=answered)) is not None:
                session.close()

    def close(self) -> None:
        """Close the connections."""
        if (session := self.connections.close()) is not None:
            session.close()


class AsyncNetworkTransport(_Network, AsyncTransport):
    """A transport over a network for asyncio, in the event loop of its first call."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        self._check_loop()
        connection, started, deadline = self.connections.acquire(), time.monotonic(), min(deadline, LONGEST_SECONDS)
        error, answered = None, False
        try:
            outputs: Tensors = await self.send(connection.session, call, deadline)
        except Exception as raised:
            error, answered = self.translate(raised, self.address.text, deadline)
            if self.is_unreached(error, answered=answered):
                fault = await asyncio.to_thread(self.address.diagnose, min(deadline, LOOK_SECONDS))
                error = fault or error
            raise error from raised
        else:
            answered = True
            return outputs
        finally:
            if (session := self.connections.release(connection, started, error, answered=answered)) is not None:
                await session.close()

    async def close(self) -> None:
        """Close the connections."""
        self._check_loop()
        if (session := self.connections.close()) is not None:
            await session.close()

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RuntimeError("this client was used in another event loop before: make one in each loop")
        self._loop = loop


def open_transport(address: Address, kind: str = "SyncTransport") -> Any:
    """Return the `SyncTransport` or `AsyncTransport` to an address; nothing is sent yet."""
    # A caller of HTTP needs no gRPC, nor the other way round.
    module = importlib.import_module(f"kvcast.client.{address.protocol}_transport")
    return getattr(module, kind)(address)


def check_headers(headers: Mapping[str, str] | None) -> dict[str, str]:
    """Return headers with their names in lower case.

    Raises:
        ValueError: a name or a value is not one of HTTP and of gRPC's metadata, or is the client's own.
    """
    checked = {}
    for name, value in (headers or {}).items():
        key = str(name).lower()
        if not HEADER_NAME.fullmatch(key):
            raise ValueError(f"headers: expected names of letters, digits, '-', '_' and '.', got {name!r}")
        if key in OWN_HEADERS or key.startswith("grpc-") or key.endswith("-bin"):
            raise ValueError(f"headers: {key} is the protocol's or the client's own, and cannot be set")
        if not (isinstance(value, str) and HEADER_VALUE.fullmatch(value)):
            raise ValueError(
                f"headers: expected {key} to be printable ASCII without spaces around it, got "
                f"{'other characters' if isinstance(value, str) else type(value).__name__}"
            )
        checked[key] = value
    return checked


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
