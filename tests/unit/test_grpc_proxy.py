"""What reaches Triton of a caller's gRPC call: the message, and neither its deadline nor its cancellation."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from kvcast.gateway.gate import GateLimits
from kvcast.gateway.grpc_proxy import SERVICE, GrpcProxy, open_server
from kvcast.gateway.passage import Passage
from kvcast.gateway.state import State
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


@pytest.mark.parametrize("how", ["its deadline passes", "it is cancelled"])
def test_triton_hears_nothing_of_a_caller_who_gives_up(how):
    async def scenario() -> None:
        upstream, passage = Upstream(), Passage(GateLimits(in_flight=1))
        passage.follow(State(is_ready=True, release=1))
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((upstream,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        proxy = GrpcProxy(f"127.0.0.1:{port}", passage)
        front = await open_server(proxy, address := f"127.0.0.1:{find_free_ports(1)[0]}", None)
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
            gate = passage.gates[MODEL]
            assert (upstream.ends, upstream.seconds_left, gate.in_flight) == ([], [None], 1)
            upstream.may_answer.set()
            while not gate.is_idle:
                await asyncio.sleep(0.01)
            assert upstream.ends == ["answered"]
        await front.stop(None)
        await proxy.close()
        await server.stop(None)

    async def run() -> None:
        async with asyncio.timeout(20):
            await scenario()

    asyncio.run(run())
