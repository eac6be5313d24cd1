"""The gateway's gRPC side: KServe's service, messages passed on to Triton as they are; health and reflection.

A message is parsed to see what it asks for and how long its caller waits; what is not a message never reaches Triton.
Errors carry their reason as trailing metadata.
"""

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2

from kvcast.gateway.admission import Admission
from kvcast.gateway.errors import spell
from kvcast.gateway.http_inference import pack_elements
from kvcast.gateway.inference import MAX_TRACE, Inference, InferencePath, check_texts, read_timeout, read_trace
from kvcast.gateway.triton import INFER, MAX_METADATA_BYTES, MESSAGES, NOT_OFFERED, SERVICE, Metadata, Triton
from kvcast.protocol.errors import REASON_METADATA, InvalidRequestError

# Of any message.
MAX_MESSAGE_BYTES = 64 << 20
# Where a message holds the elements of a datatype, if they are not raw.
TYPED_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
METHODS = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
# A refusal has to be there before the caller gives up.
QUEUE_SHARE = 0.9
SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    # Both, or gRPC refuses what lies between them at random.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    # Callers may look after their connections: a ping that comes too often ends one, with its requests.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
]

# How the metadata begin that open what Triton restricts.
RESTRICTED = "triton-grpc-protocol-"

Rpc = Any  # grpc.aio.ServicerContext; grpc has no types
Handler = Callable[[bytes, Rpc], Awaitable[bytes]]


class GrpcServer(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handles the methods of KServe's service."""

    def __init__(self, triton: Triton, admission: Admission, path: InferencePath) -> None:
        self._triton, self._admission, self._path = triton, admission, path
        self._handlers = {SERVICE + name: self._make_handler(name) for name in METHODS}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method, None for one that there is not."""
        return self._handlers.get(details.method)

    def _make_handler(self, name: str) -> Any:
        if name not in MESSAGES:
            return grpc.stream_stream_rpc_method_handler(self._make_refusal(name))
        return grpc.unary_unary_rpc_method_handler(self._make_answer(name))

    def _make_refusal(self, name: str) -> Callable[[Any, Rpc], Awaitable[None]]:
        async def refuse(requests: Any, rpc: Rpc) -> None:  # noqa: ARG001
            message = f"{name}: this server does not offer it" + ("; send ModelInfer" if "Infer" in name else "")
            await rpc.abort(grpc.StatusCode.UNIMPLEMENTED, message, ((REASON_METADATA, "UNIMPLEMENTED"),))

        return refuse

    def _make_answer(self, name: str) -> Handler:
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

        if fill_empty(message):
            body = message.SerializeToString()

        async def read() -> Inference:
            return Inference(message, body, read_seconds(message, rpc), read_trace(rpc.invocation_metadata() or ()))

        return await self._path.answer("grpc", message.model_name, read, bytes)

    async def _pass(self, name: str, message: Any, body: bytes, rpc: Rpc) -> bytes:
        """Ask Triton; that it is ready, only if it is."""
        reply = await self._triton.call(name, body, rpc.time_remaining(), read_metadata(rpc))
        if name == "ServerReady" and self._admission.explain_unready():
            return bytes(service_pb2.ServerReadyResponse(ready=False).SerializeToString())
        if name == "ModelReady" and not self._admission.accepts(message.name):
            return bytes(service_pb2.ModelReadyResponse(ready=False).SerializeToString())
        if name == "ServerMetadata":
            metadata = service_pb2.ServerMetadataResponse.FromString(reply)
            offered = [each for each in metadata.extensions if each not in NOT_OFFERED]
            del metadata.extensions[:]
            metadata.extensions.extend(offered)
            return bytes(metadata.SerializeToString())
        return reply


def fill_empty(message: Any) -> bool:
    """Give a tensor without elements its contents, which are none; return whether the message has changed.

    Clients that send typed contents leave out empty ones, and Triton then misses the tensor: a user without history.
    Raw contents are those of all inputs or of none.
    """
    tensors = message.inputs
    is_typed = not message.raw_input_contents and all(tensor.datatype in TYPED_CONTENTS for tensor in tensors)
    if not is_typed or all(0 not in tensor.shape for tensor in tensors):
        return False
    with contextlib.suppress(OverflowError):  # then Triton refuses the message as it is
        raw = [pack_elements(each.datatype, getattr(each.contents, TYPED_CONTENTS[each.datatype])) for each in tensors]
        message.raw_input_contents.extend(raw)
        for tensor in tensors:
            tensor.ClearField("contents")
    return bool(message.raw_input_contents)


def read_metadata(rpc: Rpc) -> Metadata:
    """Return the caller's metadata that Triton reads: traces, and the keys of its restricted protocols."""
    metadata = rpc.invocation_metadata() or ()
    return [
        *read_trace(metadata),
        *(pair for pair in metadata if pair[0].startswith(RESTRICTED) and len(pair[1]) <= MAX_TRACE),
    ]


def read_seconds(message: Any, rpc: Rpc) -> float:
    """Return how long the caller waits: the connection's deadline, or the request's parameter, whichever is sooner."""
    remaining = rpc.time_remaining()
    seconds = float("inf") if remaining is None else QUEUE_SHARE * remaining
    return min(seconds, read_timeout(message))


class Health(health.aio.HealthServicer):  # type: ignore[misc]  # grpc has no types
    """gRPC's own health service, as Kubernetes' probes ask it: that of the whole server, and of its one service."""

    async def tell(self, *, is_ready: bool) -> None:
        """Tell whoever asks, and those who watch."""
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE.strip("/")):
            await self.set(name, status)


async def open_server(
    handler: GrpcServer, health_service: Health, address: str, credentials: grpc.ServerCredentials | None
) -> grpc.aio.Server:
    """Listen.

    Raises:
        OSError: the address cannot be bound.
    """
    server = grpc.aio.server(options=[*SERVER_OPTIONS, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((handler,))
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    reflection.enable_server_reflection((SERVICE.strip("/"), health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    await health_service.tell(is_ready=False)
    with contextlib.suppress(RuntimeError):
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        if port:
            await server.start()
            return server
    await server.stop(None)
    raise OSError(f"cannot listen on {address} (gRPC)")
