"""The gateway's gRPC side: KServe's service, messages passed on to Triton as they are.

A message is parsed to see what it asks for and how long its caller waits; what is not a message never reaches Triton.
Errors carry their reason as trailing metadata.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from kvcast.gateway.admission import Admission
from kvcast.gateway.errors import spell
from kvcast.gateway.inference import TRACE_HEADERS, Inference, InferencePath, check_texts, read_timeout
from kvcast.gateway.triton import INFER, MESSAGES, SERVICE, Metadata, Triton
from kvcast.protocol.errors import REASON_METADATA, InvalidRequestError

# Of any message.
MAX_MESSAGE_BYTES = 64 << 20
# A refusal has to be there before the caller gives up.
QUEUE_SHARE = 0.9
SERVER_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]

Rpc = Any  # grpc.aio.ServicerContext; grpc has no types
Handler = Callable[[bytes, Rpc], Awaitable[bytes]]


class GrpcServer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handles the methods of KServe's service."""

    def __init__(self, triton: Triton, admission: Admission, path: InferencePath) -> None:
        self._triton, self._admission, self._path = triton, admission, path

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method, None for one that is not offered."""
        name = details.method.removeprefix(SERVICE)
        if details.method != SERVICE + name or name not in MESSAGES:
            return None
        return grpc.unary_unary_rpc_method_handler(self._make_handler(name))

    def _make_handler(self, name: str) -> Handler:
        async def handle(body: bytes, rpc: Rpc) -> bytes:
            try:
                return await self._answer(name, body, rpc)
            except Exception as error:  # noqa: BLE001 a caller gets a status whatever happens
                status, reason, message = spell(error)
            await rpc.abort(grpc.StatusCode[status], message, ((REASON_METADATA, reason),))
            raise AssertionError  # `abort` raises

        return handle

    async def _answer(self, name: str, body: bytes, rpc: Rpc) -> bytes:
        try:
            message = MESSAGES[name].FromString(body)
        except DecodeError:
            raise InvalidRequestError(f"expected a {name}Request, got other bytes") from None
        if name != INFER:
            check_texts(getattr(message, field, "") for field in ("name", "model_name", "version"))
            return await self._pass(name, message, body, rpc)

        async def read() -> Inference:
            trace = [(key, value) for key, value in rpc.invocation_metadata() or () if key in TRACE_HEADERS]
            return Inference(message, body, read_seconds(message, rpc), trace)

        return await self._path.answer("grpc", message.model_name, read, bytes)

    async def _pass(self, name: str, message: Any, body: bytes, rpc: Rpc) -> bytes:
        """Ask Triton; that it is ready, only if it is."""
        reply = await self._triton.call(name, body, rpc.time_remaining(), read_metadata(rpc))
        if name == "ServerReady" and self._admission.explain_unready():
            return bytes(service_pb2.ServerReadyResponse(ready=False).SerializeToString())
        if name == "ModelReady" and message.name in self._admission.broken:
            return bytes(service_pb2.ModelReadyResponse(ready=False).SerializeToString())
        return reply


def read_metadata(rpc: Rpc) -> Metadata:
    """Return the caller's metadata, but for what belongs to the connection."""
    metadata = rpc.invocation_metadata() or ()
    return [(key, value) for key, value in metadata if not key.startswith(("grpc-", ":")) and key != "user-agent"]


def read_seconds(message: Any, rpc: Rpc) -> float:
    """Return how long the caller waits: the connection's deadline, or the request's parameter, whichever is sooner."""
    remaining = rpc.time_remaining()
    seconds = float("inf") if remaining is None else QUEUE_SHARE * remaining
    return min(seconds, read_timeout(message))


async def open_server(handler: GrpcServer, address: str, credentials: grpc.ServerCredentials | None) -> grpc.aio.Server:
    """Listen.

    Raises:
        OSError: the address cannot be bound.
    """
    server = grpc.aio.server(options=[*SERVER_OPTIONS, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((handler,))
    with contextlib.suppress(RuntimeError):
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        if port:
            await server.start()
            return server
    await server.stop(None)
    raise OSError(f"cannot listen on {address} (gRPC)")
