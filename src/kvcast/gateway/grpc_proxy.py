"""The guard's gRPC side: passes messages on to Triton as they are, inference through the gate.

A message is parsed to see what it asks for and how long its caller waits; what is not a message never reaches Triton.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from tritonclient.grpc import service_pb2

from kvcast.gateway.gate import LOST_AFTER_SECONDS, ModelDiedError, UnansweredError
from kvcast.gateway.passage import LONGEST_SECONDS, Passage
from kvcast.gateway.request_log import REPORTS, Entry, has_reports, needs_reports, read_string
from kvcast.gateway.wording import (
    DEAD_PROCESS,
    LOST_CONNECTION,
    NO_SHARED_MEMORY,
    SHARED_MEMORY_IS_FULL,
    UNREACHABLE,
    conceal,
    hide,
)
from kvcast.protocol.errors import InvalidRequestError, KvcastError
from kvcast.protocol.tensors import REPORT_PARAMETER

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
# Of any message.
MAX_MESSAGE_BYTES = 64 << 20
# An error repeats names, in metadata, whose size gRPC limits.
MAX_TEXT = 1024
MAX_SEQUENCE_ID = 128
MICROSECONDS = 1e6
QUEUE_SHARE = 0.9
SERVER_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", -1)]
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
# gRPC's own pauses between attempts grow to minutes; Triton is back within seconds.
RECONNECTING = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 250)]
# What one caller sends in a shared-memory region, another could read.
SHARED_MEMORY = "shared_memory_"
LARGEST_AXIS = 2**31

Rpc = Any  # grpc.aio.ServicerContext; grpc has no types
Handler = Callable[[bytes, Rpc], Awaitable[bytes]]


class GrpcProxy(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Handles the methods of KServe's service."""

    def __init__(self, upstream: str, passage: Passage) -> None:
        """Connect.

        Args:
            upstream: Triton's own gRPC address.
            passage: what both protocols share: gates and state.
        """
        self._passage = passage
        self._channel = grpc.aio.insecure_channel(upstream, [*CHANNEL_OPTIONS, *RECONNECTING])
        self._calls = {name: self._channel.unary_unary(SERVICE + name) for name in MESSAGES}

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method, None for one that is not offered."""
        name = details.method.removeprefix(SERVICE)
        if details.method != SERVICE + name or name not in MESSAGES:
            return None
        return grpc.unary_unary_rpc_method_handler(self._make_handler(name))

    async def close(self) -> None:
        """Disconnect."""
        await self._channel.close()

    async def send_infer(self, message: bytes, seconds: float) -> bytes:
        """Send an inference around the gates: for the shadow, who has a queue of its own."""
        async with asyncio.timeout(seconds):
            return await await_whole(self._calls["ModelInfer"](message))

    def _make_handler(self, name: str) -> Handler:
        async def handle(body: bytes, rpc: Rpc) -> bytes:
            try:
                return await self._answer(name, body, rpc)
            except grpc.aio.AioRpcError as error:
                code, text = self._translate(error)
            except KvcastError as error:
                code, text = grpc.StatusCode[error.kind.grpc_status], str(error)
            except Exception as error:  # noqa: BLE001 a caller gets a status whatever happens
                code, text = grpc.StatusCode.INTERNAL, hide("the guard failed", error)
            await rpc.abort(code, text)
            raise AssertionError  # `abort` raises

        return handle

    async def _answer(self, name: str, body: bytes, rpc: Rpc) -> bytes:
        try:
            message = MESSAGES[name].FromString(body)
        except DecodeError:
            raise InvalidRequestError(f"expected a {name}Request, got other bytes") from None
        if name == "ModelInfer":
            return await self._infer(message, len(body), rpc)
        check_name(message)
        return await self._pass(name, message, body, rpc)

    async def _pass(self, name: str, message: Any, body: bytes, rpc: Rpc) -> bytes:
        """Ask Triton; that it is ready, only if it is."""
        reply: bytes = await self._calls[name](body, timeout=rpc.time_remaining(), metadata=read_metadata(rpc))
        if name == "ServerReady" and self._passage.explain_unready():
            reply = service_pb2.ServerReadyResponse(ready=False).SerializeToString()
        if name == "ModelReady" and message.name in self._passage.broken:
            reply = service_pb2.ModelReadyResponse(ready=False).SerializeToString()
        return reply

    async def _infer(self, message: Any, size: int, rpc: Rpc) -> bytes:
        passage = self._passage
        with passage.log.follow("grpc", message.model_name, lambda: passage.state.fingerprint) as entry:
            check_infer(message)
            metadata = read_metadata(rpc)
            if entry is None:
                return await self._rank(message, size, rpc, metadata)
            trace = str(dict(metadata).get("traceparent", ""))
            entry.describe(message.id, size, trace, {tensor.name: list(tensor.shape) for tensor in message.inputs})
            is_ours = ask_for_reports(message)
            try:
                reply = await self._rank(message, size, rpc, metadata, entry)
            except grpc.aio.AioRpcError as error:
                entry.code = self._translate(error)[0].name
                raise
            return take_reports(message, reply, entry, remove=is_ours)

    async def _rank(self, message: Any, size: int, rpc: Rpc, metadata: Any, entry: Entry | None = None) -> bytes:
        """Send an inference when its turn has come."""

        async def send(seconds: float) -> bytes:
            if seconds != float("inf"):
                message.parameters["timeout"].int64_param = max(1, int(min(seconds, LONGEST_SECONDS) * MICROSECONDS))
            if entry is not None:
                entry.note_sending()
            try:
                return await await_whole(self._calls["ModelInfer"](message.SerializeToString(), metadata=metadata))
            except grpc.aio.AioRpcError as error:
                # Triton cancels some while others are cancelled. Who cancels here gets asyncio's error, not this one.
                if error.code() == grpc.StatusCode.CANCELLED:
                    raise UnansweredError("Triton has cancelled the request: try again") from error
                text = error.details() or ""
                is_lost = error.code() == grpc.StatusCode.UNAVAILABLE and LOST_CONNECTION.search(text)
                if is_lost or DEAD_PROCESS.search(text):
                    raise ModelDiedError(UNREACHABLE) from error
                raise

        release = self._passage.state.fingerprint
        reply = await self._passage.ask(message.model_name, size, read_seconds(message, rpc), send)
        shadow = self._passage.shadow
        if shadow is not None and shadow.chooses(message.model_name):
            shadow.score_again(message, release, reply)
        return reply

    def _translate(self, error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
        """Return status and message fit for a caller."""
        code, text = error.code(), error.details() or ""
        if NO_SHARED_MEMORY in text:
            return grpc.StatusCode.UNAVAILABLE, SHARED_MEMORY_IS_FULL
        if code == grpc.StatusCode.UNAVAILABLE and LOST_CONNECTION.search(text):
            return code, UNREACHABLE
        return code, conceal(text)


async def await_whole(call: Any) -> bytes:
    """Return the reply to a call. Who is cancelled here waits on until Triton has answered: the call goes on.

    Triton 2.51 can crash on cancelled gRPC inferences (github.com/triton-inference-server/server/issues/7368; 8034 is
    of 25.01), so no cancellation is passed on, and no deadline of gRPC's.
    """
    answering = asyncio.ensure_future(call)
    try:
        reply: bytes = await asyncio.shield(answering)
    except asyncio.CancelledError:
        done, _ = await asyncio.wait((answering,), timeout=LOST_AFTER_SECONDS)
        if done and not answering.cancelled():
            answering.exception()  # nobody else looks
        answering.cancel()
        raise
    return reply


def ask_for_reports(message: Any) -> bool:
    """Have a request's models report how they made the reply, for the log; return whether its caller did not ask."""
    is_ours = needs_reports(message.model_name, {output.name for output in message.outputs}, message.parameters)
    if is_ours:
        message.parameters[REPORT_PARAMETER].bool_param = True
        for name in REPORTS if message.outputs else ():
            message.outputs.add(name=name)
    return is_ours


def take_reports(request: Any, reply: bytes, entry: Entry, *, remove: bool) -> bytes:
    """Read the reports in a reply into the log's entry; return the reply, without them if they are to be removed."""
    if not has_reports(request.model_name, request.parameters):
        return reply  # which may be hundreds of megabytes
    try:
        message = service_pb2.ModelInferResponse.FromString(reply)
        places = [place for place, output in enumerate(message.outputs) if output.name in REPORTS]
        for place in reversed(places):
            entry.reports[message.outputs[place].name] = read_string(message.raw_output_contents[place])
            del message.outputs[place]
            del message.raw_output_contents[place]
        return bytes(message.SerializeToString()) if remove else reply
    except Exception:  # noqa: BLE001 the caller's answer is there, whatever the log makes of it
        return reply


def read_metadata(rpc: Rpc) -> list[tuple[str, str | bytes]]:
    """Return the caller's metadata, but for what belongs to the connection."""
    metadata = rpc.invocation_metadata() or ()
    return [(key, value) for key, value in metadata if not key.startswith(("grpc-", ":")) and key != "user-agent"]


def read_seconds(message: Any, rpc: Rpc) -> float:
    """Return how long the caller waits: the connection's deadline, or the request's parameter, whichever is sooner."""
    remaining = rpc.time_remaining()
    # A refusal has to be there before the caller gives up.
    seconds = float("inf") if remaining is None else QUEUE_SHARE * remaining
    parameter = message.parameters.get("timeout")
    if parameter is not None and parameter.int64_param > 0:
        seconds = min(seconds, parameter.int64_param / MICROSECONDS)
    return seconds


def check_infer(message: Any) -> None:
    """Check what Triton itself reads of a request.

    Raises:
        InvalidRequestError: a shape or a name is impossible, or a tensor lies in shared memory.
    """
    check_parameters(message)
    check_texts(message)
    for tensor in (*message.inputs, *message.outputs):
        named = [name for name in tensor.parameters if name.startswith(SHARED_MEMORY)]
        if named:
            raise InvalidRequestError(f"{tensor.name}: parameter {named[0]}: client shared memory is not offered")
    for tensor in message.inputs:
        if not all(0 <= axis < LARGEST_AXIS for axis in tensor.shape):
            raise InvalidRequestError(f"{tensor.name}: expected axes of 0 to 2^31 - 1, got {list(tensor.shape)[:16]}")


def check_parameters(message: Any) -> None:
    """Check the parameters that Triton itself reads.

    Raises:
        InvalidRequestError: one is not of its kind.
    """
    if "timeout" in message.parameters:
        timeout = message.parameters["timeout"]
        if timeout.WhichOneof("parameter_choice") != "int64_param" or timeout.int64_param < 0:
            raise InvalidRequestError("parameter timeout: expected whole microseconds")
    if "sequence_id" in message.parameters:
        length = len(message.parameters["sequence_id"].string_param.encode())
        if length > MAX_SEQUENCE_ID:
            raise InvalidRequestError(
                f"parameter sequence_id: expected at most {MAX_SEQUENCE_ID} characters, got {length}"
            )


def check_texts(message: Any) -> None:
    """Check the lengths of names.

    Raises:
        InvalidRequestError: one is too long.
    """
    tensors = (*message.inputs, *message.outputs)
    texts = [message.model_name, message.model_version, message.id, *message.parameters]
    texts += [text for tensor in tensors for text in (tensor.name, *tensor.parameters)]
    longest = max(map(len, texts))
    if longest > MAX_TEXT:
        raise InvalidRequestError(f"names and ids: expected at most {MAX_TEXT} characters, got {longest}")


def check_name(message: Any) -> None:
    """Check the name of what another request is about.

    Raises:
        InvalidRequestError: it is too long.
    """
    for field in ("name", "model_name", "version"):
        if len(getattr(message, field, "")) > MAX_TEXT:
            raise InvalidRequestError(f"{field}: expected at most {MAX_TEXT} characters")


async def open_server(proxy: GrpcProxy, address: str, credentials: grpc.ServerCredentials | None) -> grpc.aio.Server:
    """Listen.

    Raises:
        OSError: the address cannot be bound.
    """
    server = grpc.aio.server(options=[*SERVER_OPTIONS, ("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((proxy,))
    with contextlib.suppress(RuntimeError):
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
        if port:
            await server.start()
            return server
    await server.stop(None)
    raise OSError(f"cannot listen on {address} (gRPC)")
