"""The one way of an inference request through the gateway, whatever protocol it came over.

Checked, admitted, sent (again, if a model process dies under it), logged, and for a share scored again by the shadow.
The message is parsed once and never written again: what changes is appended to it, where the last entry of a map wins.
"""

import functools
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from tritonclient.grpc import service_pb2

from kvcast.gateway.admission import Admission
from kvcast.gateway.request_log import Entry, RequestLog
from kvcast.gateway.shadow import Shadow
from kvcast.gateway.triton import Metadata, Triton
from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.tensors import KV_ORIGIN, LOG_PARAMETER

# An error repeats names, in metadata, whose size gRPC limits.
MAX_TEXT = 1024
MAX_SEQUENCE_ID = 128
MICROSECONDS = 1e6
# Longer deadlines are none: as microseconds they would not fit where Triton reads them.
LONGEST_SECONDS = 1e9
# What one caller sends in a shared-memory region, another could read.
SHARED_MEMORY = "shared_memory_"
LARGEST_AXIS = 2**31
MAX_RANK = 16
# Triton takes names as C strings, so that one with an end in it would be another name to it.
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# Of a caller's headers, Triton gets those that tie traces together.
TRACE_HEADERS = ("traceparent", "tracestate")
# What W3C has services pass on. Triton's gRPC refuses at random what comes with more than 8 KiB of metadata.
MAX_TRACE = 512


Reply = TypeVar("Reply")


@dataclass(frozen=True)
class Inference:
    """A request: its ModelInferRequest, the bytes of that, the seconds that its caller waits, and its trace."""

    message: Any
    body: bytes
    seconds: float
    trace: Metadata


class InferencePath:
    """Takes requests to Triton."""

    def __init__(self, triton: Triton, admission: Admission, shadow: Shadow, log: RequestLog) -> None:
        self._triton, self._admission, self._shadow, self._log = triton, admission, shadow, log

    async def answer(
        self, protocol: str, model: str, read: Callable[[], Awaitable[Inference]], write: Callable[[bytes], Reply]
    ) -> Reply:
        """Return the reply.

        Args:
            protocol: `grpc` or `http`.
            model: which the request is for.
            read: reads the request, which can fail too.
            write: makes the reply of the bytes of the ModelInferResponse, which can fail too.

        Raises:
            KvcastError: it is wrong, refused, or Triton's answer is an error.
        """
        with self._log.follow(protocol, model, lambda: self._admission.state.release_id) as entry:
            inference = await read()
            message = inference.message
            if entry is not None:
                trace = str(dict(inference.trace).get("traceparent", ""))
                shapes = {tensor.name: list(tensor.shape) for tensor in message.inputs}
                entry.describe(message.id, len(inference.body), trace, shapes)
            check_infer(message)
            release = self._admission.state.release_id
            reply = await self._admission.ask(
                model, len(inference.body), inference.seconds, functools.partial(self._send, inference, entry)
            )
            if self._shadow.chooses(model):
                self._shadow.score_again(message, release, reply)
            return write(reply)

    async def _send(self, inference: Inference, entry: Entry | None, seconds: float) -> bytes:
        tail = service_pb2.ModelInferRequest()
        if seconds != float("inf"):
            tail.parameters["timeout"].int64_param = max(1, int(min(seconds, LONGEST_SECONDS) * MICROSECONDS))
        if entry is not None:
            entry.note_sending()
            tail.parameters[LOG_PARAMETER].string_param = entry.fields["request_id"]
        return await self._triton.infer(inference.body + tail.SerializeToString(), inference.trace)


def read_trace(headers: Iterable[tuple[str, str | bytes]]) -> Metadata:
    """Return the headers that tie traces together; one that is too long, or that gRPC cannot carry, is none."""
    return [
        (name, value)
        for name, value in headers
        if name in TRACE_HEADERS
        and isinstance(value, str)
        and 0 < len(value) <= MAX_TRACE
        and value.isascii()
        and value.isprintable()
    ]


def read_timeout(message: Any) -> float:
    """Return the seconds of the parameter `timeout`, infinity without it."""
    microseconds = message.parameters["timeout"].int64_param if "timeout" in message.parameters else 0
    return microseconds / MICROSECONDS if microseconds > 0 else float("inf")


def check_infer(message: Any) -> None:
    """Check what Triton itself reads of a request.

    Raises:
        InvalidRequestError: a shape, a name or a parameter is impossible, or a tensor lies in shared memory.
    """
    check_parameters(message)
    tensors = (*message.inputs, *message.outputs)
    check_texts((message.model_name, message.model_version, message.id, *message.parameters))
    check_texts(text for tensor in tensors for text in (tensor.name, *tensor.parameters))
    for tensor in tensors:
        named = [name for name in tensor.parameters if name.startswith(SHARED_MEMORY)]
        if named:
            raise InvalidRequestError(f"{tensor.name}: parameter {named[0]}: client shared memory is not offered")
    if KV_ORIGIN.name in {tensor.name for tensor in tensors}:
        raise InvalidRequestError(f"{KV_ORIGIN.name}: expected it within the server alone")
    for tensor in message.inputs:
        if len(tensor.shape) > MAX_RANK or not all(0 <= axis < LARGEST_AXIS for axis in tensor.shape):
            raise InvalidRequestError(
                f"{tensor.name}: expected at most {MAX_RANK} axes of 0 to 2^31 - 1, got {list(tensor.shape)[:MAX_RANK]}"
            )


def check_parameters(message: Any) -> None:
    """Check the parameters that Triton itself reads.

    Raises:
        InvalidRequestError: one is not of its kind, or the gateway's own.
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
    if LOG_PARAMETER in message.parameters:
        raise InvalidRequestError(f"parameter {LOG_PARAMETER}: expected it from the gateway alone")


def check_texts(texts: Iterable[str]) -> None:
    """Check names and ids.

    Raises:
        InvalidRequestError: one is too long, or has a control character.
    """
    for text in texts:
        if len(text) > MAX_TEXT:
            raise InvalidRequestError(f"names and ids: expected at most {MAX_TEXT} characters, got {len(text)}")
        if CONTROL.search(text):
            raise InvalidRequestError(f"names and ids: expected no control characters, got {text[:100]!r}")
