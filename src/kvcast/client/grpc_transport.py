"""One inference over gRPC, by tritonclient's generated stub on a channel of our own, sync and asyncio."""

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

try:
    from tritonclient.grpc import InferResult, service_pb2, service_pb2_grpc
except TypeError as error:  # protobuf has these messages already, from another file
    raise ImportError(
        "kvcast's gRPC transport needs tritonclient.grpc, which cannot be imported beside another package with the "
        f"messages of the inference protocol, as kserve: use protocol='http', or a process of its own ({error})"
    ) from error
from tritonclient.utils import np_to_triton_dtype

from kvcast.client.transport import (
    LONGEST_SECONDS,
    AsyncTransport,
    Call,
    Tensors,
    TlsOptions,
    Transport,
    limit_queueing,
    make_error,
    read_outputs,
)
from kvcast.protocol.errors import REASON_METADATA, KvcastError, ServerFaultError
from kvcast.protocol.routing import ROUTING_HEADER

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's own pause before connecting again grows to two minutes; a server that was restarted is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A connection that was silently dropped is noticed while a request waits on it.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


class GrpcTransport(Transport):
    """One channel, which multiplexes all threads."""

    def __init__(self, address: str, tls: TlsOptions | None = None) -> None:
        self._address = address
        self._channel = _open_channel(grpc, address, tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        try:
            reply = self._stub.ModelInfer(
                make_request(call, deadline), timeout=min(deadline, LONGEST_SECONDS), metadata=make_metadata(call)
            )
            return read_outputs(InferResult(reply), call.outputs)
        except Exception as error:
            raise translate(error, self._address, deadline) from error

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()


class AsyncGrpcTransport(AsyncTransport):
    """The same for asyncio."""

    def __init__(self, address: str, tls: TlsOptions | None = None) -> None:
        self._address = address
        self._channel = _open_channel(grpc.aio, address, tls)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def infer(self, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        request, metadata = make_request(call, deadline), make_metadata(call)
        try:
            reply = await self._stub.ModelInfer(request, timeout=min(deadline, LONGEST_SECONDS), metadata=metadata)
            return read_outputs(InferResult(reply), call.outputs)
        except Exception as error:
            raise translate(error, self._address, deadline) from error

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def make_request(call: Call, deadline: float) -> Any:
    """Return the ModelInferRequest of a call."""
    request = service_pb2.ModelInferRequest(model_name=call.model)
    request.parameters["timeout"].int64_param = limit_queueing(deadline)
    for name, flag in call.parameters.items():
        request.parameters[name].bool_param = flag
    for name, array in call.inputs.items():
        request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    for name in call.outputs:
        request.outputs.add(name=name)
    return request


def make_metadata(call: Call) -> list[tuple[str, str]]:
    """Return the metadata of a call."""
    return [(ROUTING_HEADER, call.routing_key)] if call.routing_key is not None else []


def translate(error: Exception, address: str, deadline: float) -> KvcastError:
    """Return the error of our own that says who has to act."""
    if isinstance(error, KvcastError):
        return error
    if not isinstance(error, grpc.RpcError):
        return ServerFaultError(f"{address}: unusable answer ({type(error).__name__}: {error})")
    call: Any = error
    reason = dict(call.trailing_metadata() or ()).get(REASON_METADATA, "")
    return make_error(call.code().name, str(reason), call.details() or "", address, deadline)


def _open_channel(library: Any, address: str, tls: TlsOptions | None) -> Any:
    if tls is None:
        return library.insecure_channel(address, CHANNEL_OPTIONS)
    files = (tls.ca_file, tls.key_file, tls.certificate_file)
    credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))
    return library.secure_channel(address, credentials, CHANNEL_OPTIONS)
