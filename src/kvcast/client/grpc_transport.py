"""One inference over gRPC, by tritonclient's generated stub on a channel of our own, sync and asyncio."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

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

from kvcast.client.address import LONGEST_KEEPALIVE, Address
from kvcast.client.transport import (
    SILENT,
    AsyncNetworkTransport,
    Call,
    NetworkTransport,
    Tensors,
    limit_queueing,
    make_error,
    read_outputs,
)
from kvcast.protocol.errors import REASON_METADATA, KvcastError, ServerFaultError

CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # gRPC's own pause before connecting again grows to two minutes; a server that was restarted is back in seconds.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # A new channel is a new connection, not the one that another channel to the same address has.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]
# How long a ping may stay unanswered: the first alone leaves it a minute (findings/grpc_keepalive_timeout.sh).
PING_TIMEOUTS = [("grpc.keepalive_timeout_ms", 5_000), ("grpc.http2.ping_timeout_ms", 5_000)]


class Channel(NamedTuple):
    """A channel of either library, and the stub on it."""

    channel: Any
    stub: Any

    def close(self) -> Any:
        """Close the channel; to be awaited with asyncio."""
        return self.channel.close()


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


def translate(error: Exception, address: str, deadline: float) -> tuple[KvcastError, bool]:
    """Return the error of our own that says who has to act, and whether the server has answered."""
    if isinstance(error, KvcastError):
        return error, True
    if not isinstance(error, grpc.RpcError):
        return ServerFaultError(f"{address}: unusable answer ({type(error).__name__}: {error})"), False
    call: Any = error
    status, reason = call.code().name, str(dict(call.trailing_metadata() or ()).get(REASON_METADATA, ""))
    return make_error(status, reason, call.details() or "", address, deadline), bool(reason) or status not in SILENT


def _open_channel(library: Any, address: Address) -> Channel:
    options = list(CHANNEL_OPTIONS)
    if address.keepalive_seconds < LONGEST_KEEPALIVE:
        options += [("grpc.keepalive_time_ms", int(1e3 * address.keepalive_seconds)), *PING_TIMEOUTS]
    if address.tls is None:
        channel = library.insecure_channel(address.netloc, options)
    else:
        files = (address.tls.ca_file, address.tls.key_file, address.tls.certificate_file)
        contents = (Path(file).read_bytes() if file else None for file in files)
        channel = library.secure_channel(address.netloc, grpc.ssl_channel_credentials(*contents), options)
    return Channel(channel, service_pb2_grpc.GRPCInferenceServiceStub(channel))


class SyncTransport(NetworkTransport):
    """One channel, which multiplexes all threads."""

    open_session = staticmethod(functools.partial(_open_channel, grpc))
    translate = staticmethod(translate)

    def send(self, session: Channel, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        reply = session.stub.ModelInfer(make_request(call, deadline), timeout=deadline, metadata=call.metadata)
        return read_outputs(InferResult(reply), call.outputs)


class AsyncTransport(AsyncNetworkTransport):
    """The same for asyncio."""

    open_session = staticmethod(functools.partial(_open_channel, grpc.aio))
    translate = staticmethod(translate)

    async def send(self, session: Channel, call: Call, deadline: float) -> Tensors:
        """Run one inference."""
        request = make_request(call, deadline)
        reply = await session.stub.ModelInfer(request, timeout=deadline, metadata=call.metadata)
        return read_outputs(InferResult(reply), call.outputs)
