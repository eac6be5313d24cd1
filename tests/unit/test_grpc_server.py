"""What reaches Triton of a caller's gRPC call: the message, and neither its deadline nor its cancellation."""

import asyncio
import math
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from kvcast.gateway.admission import Admission
from kvcast.gateway.config import State
from kvcast.gateway.gate import GateLimits
from kvcast.gateway.grpc_server import GrpcServer, Health, fill_empty, open_server
from kvcast.gateway.inference import InferencePath
from kvcast.gateway.request_log import RequestLog
from kvcast.gateway.shadow import Shadow
from kvcast.gateway.triton import SERVICE, Triton
from kvcast.server.repository import find_free_ports

MODEL = "ranker"


class Upstream(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """Stands where Triton stands, answers when told to, and notes how each inference went."""

    def __init__(self) -> None:
        self.begun, self.may_answer = asyncio.Event(), asyncio.Event()
        self.seconds_left: list[float | None] = []
        self.ends: list[str] = []

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.infer)

    async def infer(self, message: bytes, rpc: Any) -> bytes:
        self.seconds_left.append(rpc.time_remaining())
        self.begun.set()
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("answered")
        return service_pb2.ModelInferResponse(model_name=MODEL).SerializeToString()


def make_typed(*shapes: tuple[int, ...]) -> Any:
    message = service_pb2.ModelInferRequest(model_name=MODEL)
    for index, shape in enumerate(shapes):
        tensor = message.inputs.add(name=f"x{index}", datatype="INT64", shape=shape)
        tensor.contents.int64_contents.extend(range(math.prod(shape)))
    return message


def test_empty_typed_contents_become_raw_ones_and_others_stay():
    message = make_typed((1, 0, 2), (1, 2))
    assert fill_empty(message)
    assert list(message.raw_input_contents) == [b"", np.arange(2).tobytes()]
    assert not any(tensor.HasField("contents") for tensor in message.inputs)
    for other in (make_typed((1, 2)), service_pb2.ModelInferRequest(), message):
        before = other.SerializeToString()
        assert not fill_empty(other)
        assert other.SerializeToString() == before
    wide = make_typed((1, 0), (1,))
    wide.inputs[1].datatype = "INT8"
    wide.inputs[1].contents.int_contents.append(300)
    before = wide.SerializeToString()
    assert not fill_empty(wide)
    assert wide.SerializeToString() == before


@pytest.mark.parametrize("how", ["its deadline passes", "it is cancelled"])
def test_triton_hears_nothing_of_a_caller_who_gives_up(how):
    async def scenario() -> None:
        upstream, admission = Upstream(), Admission(GateLimits(in_flight=1))
        admission.follow(State(is_ready=True, release_number=1))
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((upstream,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        triton = Triton(f"127.0.0.1:{port}")
        path = InferencePath(triton, admission, Shadow(0.0, triton.infer, str), RequestLog(0.0, print))
        handler = GrpcServer(triton, admission, path)
        front = await open_server(handler, Health(), address := f"127.0.0.1:{find_free_ports(1)[0]}", None)
        async with grpc.aio.insecure_channel(address) as channel:
            message = service_pb2.ModelInferRequest(model_name=MODEL).SerializeToString()
            by_deadline = how == "its deadline passes"
            call = channel.unary_unary(SERVICE + "ModelInfer")(message, timeout=1.0 if by_deadline else None)
            await upstream.begun.wait()
            if not by_deadline:
                call.cancel()
            with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
                await call
            await asyncio.sleep(0.3)
            gate = admission.gates[MODEL]
            assert (upstream.ends, upstream.seconds_left, gate.in_flight) == ([], [None], 1)
            upstream.may_answer.set()
            while not gate.is_idle:
                await asyncio.sleep(0.01)
            assert upstream.ends == ["answered"]
        await front.stop(None)
        await triton.close()
        await server.stop(None)

    async def run() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(run())
