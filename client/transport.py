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
from types import ModuleType
from typing import Any, Literal

import aiohttp
import numpy as np
import numpy.typing as npt
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from kvcast.contract.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    KvcastError,
    ServerFaultError,
    TryAgainError,
)

Protocol = Literal["grpc", "http"]
Tensors = dict[str, npt.NDArray[Any]]

# Connections of one asyncio HTTP client: as many requests as may be in flight at once.
HTTP_CONNECTIONS = 64

# How each protocol spells what went wrong. Everything that is not listed is the server's fault.
ERRORS_BY_STATUS: dict[str, type[KvcastError]] = {
    **{f"StatusCode.{error.kind.grpc_status}": error for error in (InvalidRequestError, TryAgainError)},
    **{str(error.kind.http_status): error for error in (InvalidRequestError, TryAgainError)},
    "StatusCode.RESOURCE_EXHAUSTED": InvalidRequestError,  # a message larger than the server takes
    "StatusCode.CANCELLED": TryAgainError,
    "StatusCode.DEADLINE_EXCEEDED": DeadlineExceededError,
    "413": InvalidRequestError,
    "429": TryAgainError,
    "499": DeadlineExceededError,
}


@dataclass(frozen=True)
class Call:
    """What one inference asks for: arrays by input name (batch axis first), the outputs wanted, request parameters."""

    model: str
    inputs: Tensors
    outputs: Sequence[str]
    parameters: Mapping[str, bool] = field(default_factory=dict)


class Transport(abc.ABC):
    """A sync connection to one server. Safe to use from several threads."""

    @abc.abstractmethod
    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference; return the outputs by name.

        Args:
            call: what to ask for.
            deadline: seconds within which the answer must be here; it travels to the server's queue too.

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

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = tritonclient.grpc.InferenceServerClient(address)

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
        try:
            reply = self._get_client(deadline).infer(call.model, **arguments)
        except Exception as error:
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

    def _get_client(self, deadline: float) -> Any:
        """Return this thread's client; its timeout is fixed when it is made, so another deadline makes another."""
        if getattr(self._local, "deadline", None) != deadline:
            client = tritonclient.http.InferenceServerClient(
                self._address, connection_timeout=deadline, network_timeout=deadline
            )
            with self._lock:
                previous: Any = getattr(self._local, "client", None)
                if previous is not None and previous in self._clients:
                    self._clients.discard(previous)
                    previous.close()
                self._clients.add(client)
            self._local.client, self._local.deadline = client, deadline
        return self._local.client


class AsyncGrpcTransport(AsyncTransport):
    """gRPC for asyncio."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = tritonclient.grpc.aio.InferenceServerClient(address)

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
        return TryAgainError(f"{address}: no connection ({error}): is the server up, and is this its port?")
    return ServerFaultError(f"{address}: unusable answer ({type(error).__name__}: {error})")


def _translate_status(status: str, message: str, address: str, deadline: float) -> KvcastError:
    if "unknown model" in message:
        return ServerFaultError(f"{address}: {message}: is it among the server's MODELS?")
    kind = ERRORS_BY_STATUS.get(status, ServerFaultError)
    if kind is InvalidRequestError:
        return kind(message)
    return _miss_deadline(address, deadline) if kind is DeadlineExceededError else kind(f"{address}: {message}")


def _miss_deadline(address: str, deadline: float) -> DeadlineExceededError:
    return DeadlineExceededError(f"{address}: no answer within the deadline of {deadline:g} s")


def _make_arguments(library: ModuleType, call: Call, deadline: float) -> dict[str, Any]:
    """Return the arguments of `infer` that all four clients share."""
    tensors = []
    for name, array in call.inputs.items():
        tensor = library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        tensors.append(tensor)
    return {
        "inputs": tensors,
        "outputs": [library.InferRequestedOutput(name) for name in call.outputs],
        "parameters": dict(call.parameters) or None,
        "timeout": max(1, int(deadline * 1e6)),  # microseconds in the server's queue
    }


def _read_outputs(reply: Any, outputs: Sequence[str]) -> Tensors:
    """Return the outputs by name; Triton can answer OK without them (a cached error, a numpy 2 stub)."""
    arrays = {name: reply.as_numpy(name) for name in outputs}
    missing = [name for name, array in arrays.items() if array is None]
    if missing:
        raise ServerFaultError(f"the server answered without the outputs {', '.join(missing)}")
    return arrays
