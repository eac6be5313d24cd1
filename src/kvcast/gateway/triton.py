"""Triton's gRPC service on this machine: calls passed on as they are, and inferences that are never cancelled."""

import asyncio

import grpc
import grpc.aio
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

from kvcast.gateway.errors import translate
from kvcast.gateway.gate import LOST_AFTER_SECONDS

SERVICE = "/inference.GRPCInferenceService/"
# What is passed on, and the message that each takes. Streaming and client shared memory are not offered.
MESSAGES: dict[str, type[Message]] = {
    name: getattr(service_pb2, f"{name}Request")
    for name in (
        "ServerLive",
        "ServerReady",
        "ModelReady",
        "ServerMetadata",
        "ModelMetadata",
        "ModelConfig",
        "ModelStatistics",
        "RepositoryIndex",
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryStatus",
        "CudaSharedMemoryStatus",
        "TraceSetting",
        "LogSettings",
        "ModelInfer",
    )
}
INFER = "ModelInfer"
# Extensions that Triton names, and inference through the gateway does not offer.
NOT_OFFERED = ("sequence", "system_shared_memory", "cuda_shared_memory")
# Of a caller's metadata, and of HTTP headers: forwarded certificates and tokens are long.
MAX_METADATA_BYTES = 32 << 10
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # gRPC's own pauses between attempts grow to minutes; Triton is back within seconds.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    # An error of Triton's repeats names.
    ("grpc.max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_METADATA_BYTES),
    ("grpc.enable_http_proxy", 0),  # the environment's proxy is for other machines
]
Metadata = list[tuple[str, str | bytes]]


class Triton:
    """A channel to one tritonserver."""

    def __init__(self, address: str) -> None:
        """Connect to `host:port`, lazily."""
        self._channel = grpc.aio.insecure_channel(address, CHANNEL_OPTIONS)
        self._calls = {name: self._channel.unary_unary(SERVICE + name) for name in MESSAGES}

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()

    async def call(self, name: str, body: bytes, seconds: float | None, metadata: Metadata) -> bytes:
        """Return the reply to any call but an inference.

        Raises:
            KvcastError: Triton's error.
        """
        try:
            reply: bytes = await self._calls[name](body, timeout=seconds, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        return reply

    async def infer(self, body: bytes, metadata: Metadata | None = None) -> bytes:
        """Return the reply to an inference. When cancelled, it still waits until Triton has answered.

        Triton 2.51 can crash on cancelled gRPC inferences (github.com/triton-inference-server/server/issues/7368, until
        24.12; 8034 is of 25.01), so neither a cancellation nor a deadline of gRPC's is passed on.

        Raises:
            KvcastError: Triton's error.
        """
        call = self._calls[INFER](body, metadata=metadata)
        # To await the call itself would cancel it together with this coroutine.
        ended = asyncio.get_running_loop().create_future()
        call.add_done_callback(lambda _: None if ended.done() else ended.set_result(None))
        try:
            await ended
            reply: bytes = await call
        except asyncio.CancelledError:
            answering = asyncio.ensure_future(call)
            done, _ = await asyncio.wait((answering,), timeout=LOST_AFTER_SECONDS)
            if done and not answering.cancelled():
                answering.exception()  # retrieved, or asyncio would log it
            answering.cancel()
            raise
        except grpc.aio.AioRpcError as error:
            raise translate(error) from error
        return reply
