"""One inference over tritonclient, in its four forms: gRPC or HTTP, sync or asyncio.

All four take and return the same thing and raise the same errors, whatever their library's own habits. A transport
knows tensors by name; it does not know what is ranked.
"""

import abc
import asyncio
import http.client
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import aiohttp
import gevent  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kvcast.protocol.errors import (
    BusyError,
    DeadlineExceededError,
    InvalidRequestError,
    KvcastError,
    ServerFaultError,
    TryAgainError,
)
from kvcast.protocol.routing import ROUTING_HEADER

Protocol = Literal["grpc", "http"]
Tensors = dict[str, npt.NDArray[Any]]

# Connections of one asyncio HTTP client: as many requests as may be in flight at once.
HTTP_CONNECTIONS = 64

# The part of the caller's deadline that a request may not spend in the server's queue: the refusal has to be back
# before the caller stops listening, who else hears nothing at all from a busy server.
REFUSAL_SHARE = 0.1

# gRPC's own pause before connecting again grows to two minutes; a server that was restarted is back in seconds.
# These replace tritonclient's arguments, so they repeat its sizes: -1 is any.
CHANNEL_ARGUMENTS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

# How each protocol spells what went wrong. Everything that is not listed is the server's fault.
ERRORS_BY_STATUS: dict[str, type[KvcastError]] = {
    **{f"StatusCode.{error.kind.grpc_status}": error for error in (InvalidRequestError, TryAgainError)},
    **{str(error.kind.http_status): error for error in (InvalidRequestError, TryAgainError)},
    "StatusCode.RESOURCE_EXHAUSTED": InvalidRequestError,  # a message larger than the server takes
    "StatusCode.CANCELLED": TryAgainError,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineExceededError,
    "413": InvalidRequestError,
    "429": BusyError,
    "499": DeadlineExceededError,
}

# What passes, although Triton 2.51 gives it the status of what does not (INTERNAL, NOT_FOUND): words of its messages,
# and what they mean. A model that it was never told of "is not found".
PASSING_WORDS = {
    "is not healthy": "the model's process has died",  # Stub process 'ranker_resident_0_0' is not healthy.
    "has no available versions": "it is being replaced, or was unloaded",  # …unknown model: 'ranker' has no available…
    "is not at ready state": "it is being replaced",  # …unknown model: 'ranker' version 1 is not at ready state
    "is not ready": "it is being replaced",
    "Server is stopping": "it is about to end",
}
# What a model says that has too much to do (`kvcast.serving.backlog`); an ensemble puts its own name before it.
BUSY_WORDS = ("busy: ", "not computed: ")


@dataclass(frozen=True)
class TlsOptions:
    """Encrypt gRPC. Paths of PEM files.

    ca_file: who may have signed the server's certificate; None is whom gRPC trusts by itself.
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

    def to_arguments(self) -> dict[str, Any]:
        """Return the arguments of tritonclient's gRPC clients."""
        files = {
            "root_certificates": self.ca_file,
            "certificate_chain": self.certificate_file,
            "private_key": self.key_file,
        }
        return {"ssl": True, **{name: str(path) for name, path in files.items() if path is not None}}


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
            InvalidRequestError, TryAgainError, ServerFaultError: by whose move it is.
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


class GrpcTransport(Transport):
    """gRPC: one channel, which multiplexes all threads."""

    def __init__(self, address: str, tls: TlsOptions | None = None) -> None:
        self._address = address
        self._client = tritonclient.grpc.InferenceServerClient(address, **_make_channel(tls))

    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        arguments = _make_arguments(tritonclient.grpc, call, deadline)
        try:
            reply = self._client.infer(call.model, **arguments, client_timeout=deadline)
        except Exception as error:
            raise translate(error, self._address, deadline) from error
        return _read_outputs(reply, call.outputs)

    def close(self) -> None:
        """Close the channel."""
        self._client.close()


class HttpTransport(Transport):
    """HTTP: tritonclient's client is not thread-safe, so each thread has one of its own."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._local = threading.local()
        # Weakly: a client goes, and its connection with it, when its thread ends.
        self._clients: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()

    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        arguments = _make_arguments(tritonclient.http, call, deadline)
        client = self._get_client()
        try:
            # tritonclient fixes a timeout when it connects, and for each read of a socket. This one is the whole
            # exchange's, and another one each time, on the same connection.
            with gevent.Timeout(deadline, TimeoutError()):
                reply = client.infer(call.model, **arguments)
        except Exception as error:
            if not isinstance(error, InferenceServerException):
                self._drop_client()  # an answer may still be on its way in: nobody else's
            raise translate(error, self._address, deadline) from error
        return _read_outputs(reply, call.outputs)

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            clients = list(self._clients)
            self._clients.clear()
        for client in clients:
            client.close()
        self._local = threading.local()

    def _get_client(self) -> Any:
        """Return this thread's client."""
        client: Any = getattr(self._local, "client", None)
        if client is None:
            client = tritonclient.http.InferenceServerClient(
                self._address, connection_timeout=None, network_timeout=None
            )
            with self._lock:
                self._clients.add(client)
            self._local.client = client
        return client

    def _drop_client(self) -> None:
        """Close this thread's connection; its next call makes another."""
        client: Any = self._local.__dict__.pop("client", None)
        if client is not None:
            with self._lock:
                self._clients.discard(client)
            client.close()


class AsyncGrpcTransport(AsyncTransport):
    """gRPC for asyncio."""

    def __init__(self, address: str, tls: TlsOptions | None = None) -> None:
        self._address = address
        self._client = tritonclient.grpc.aio.InferenceServerClient(address, **_make_channel(tls))

    async def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        arguments = _make_arguments(tritonclient.grpc, call, deadline)
        try:
            reply = await self._client.infer(call.model, **arguments, client_timeout=deadline)
        except Exception as error:
            raise translate(error, self._address, deadline) from error
        return _read_outputs(reply, call.outputs)

    async def close(self) -> None:
        """Close the channel."""
        await self._client.close()


class AsyncHttpTransport(AsyncTransport):
    """HTTP for asyncio."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = tritonclient.http.aio.InferenceServerClient(
            address, conn_limit=HTTP_CONNECTIONS, conn_timeout=24 * 3600
        )

    async def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        arguments = _make_arguments(tritonclient.http, call, deadline)
        try:
            async with asyncio.timeout(deadline):
                reply = await self._client.infer(call.model, **arguments)
        except Exception as error:
            raise translate(error, self._address, deadline) from error
        return _read_outputs(reply, call.outputs)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def translate(error: Exception, address: str, deadline: float) -> KvcastError:
    """Return the error of our own that says whose move it is."""
    if isinstance(error, KvcastError):
        return error
    if isinstance(error, InferenceServerException):
        return _translate_status(str(error.status()), str(error.message()), address, deadline)
    if isinstance(error, TimeoutError):
        return _miss_deadline(address, deadline)
    if isinstance(error, (OSError, aiohttp.ClientConnectionError, http.client.HTTPException)):
        return _miss_server(address, str(error))
    return ServerFaultError(f"{address}: unusable answer ({type(error).__name__}: {error})")


def _translate_status(status: str, message: str, address: str, deadline: float) -> KvcastError:
    kind = ERRORS_BY_STATUS.get(status, ServerFaultError)
    if kind is InvalidRequestError:
        return kind(message)
    if kind is DeadlineExceededError:
        return _miss_deadline(address, deadline)
    if kind is TryAgainError:
        return _translate_absence(message, address)
    for words, meaning in PASSING_WORDS.items():
        if words in message:
            return TryAgainError(f"{address}: {message}: {meaning}")
    hint = ": is it among the server's MODELS?" if "unknown model" in message else ""
    return kind(f"{address}: {message}{hint}")


def _translate_absence(message: str, address: str) -> TryAgainError:
    """Return what to make of a server that is busy or away."""
    if any(words in message for words in BUSY_WORDS):
        return BusyError(f"{address}: {message}")
    # gRPC's words.
    return _miss_server(address, message) if "failed to connect" in message else TryAgainError(f"{address}: {message}")


def _miss_server(address: str, reason: str) -> TryAgainError:
    return TryAgainError(f"{address}: no connection ({reason}): is the server up, and is this its port?")


def _miss_deadline(address: str, deadline: float) -> DeadlineExceededError:
    return DeadlineExceededError(f"{address}: no answer within the deadline of {deadline:g} s")


def _make_channel(tls: TlsOptions | None) -> dict[str, Any]:
    """Return the arguments that both gRPC clients are made with."""
    return {"channel_args": CHANNEL_ARGUMENTS, **(tls.to_arguments() if tls else {})}


def _make_arguments(library: ModuleType, call: Call, deadline: float) -> dict[str, Any]:
    """Return the arguments of `infer` that all four clients share."""
    waiting = (1 - REFUSAL_SHARE) * deadline
    tensors = []
    for name, array in call.inputs.items():
        tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        tensors.append(tensor)
    return {
        "inputs": tensors,
        "outputs": [library.InferRequestedOutput(name) for name in call.outputs],
        "parameters": dict(call.parameters) or None,
        "headers": {ROUTING_HEADER: call.routing_key} if call.routing_key is not None else None,
        "timeout": max(1, int(waiting * 1e6)),  # microseconds in the server's queue
    }


def _read_outputs(reply: Any, outputs: Sequence[str]) -> Tensors:
    """Return the outputs by name; Triton can answer OK without them (a cached error, a numpy 2 stub)."""
    arrays = {name: reply.as_numpy(name) for name in outputs}
    missing = [name for name, array in arrays.items() if array is None]
    if missing:
        raise ServerFaultError(f"the server answered without the outputs {', '.join(missing)}")
    return arrays
