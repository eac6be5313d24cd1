"""The gateway's gRPC side: what is passed on, what is refused and how, deadlines, cancellation, health, metrics."""

import concurrent.futures
import contextlib
import dataclasses
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2

from kvcast.protocol.config import load_config
from kvcast.server import TritonServer
from kvcast.synthetic import ClickLog
from tests.chaos.fuzzing import NOT_OFFERED, OFFERED, SERVICE, call, make_infer_request
from tests.gateway_process import READY, run_gateway
from tests.support import TOLERANCE

REQUEST = ClickLog(load_config("tiny").schema, seed=5).draw_request(30, 6)
TENSORS = {"history": ("INT64", REQUEST.history[None]), "candidates": ("INT64", REQUEST.candidates[None])}
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
SOON = 5.0
HELD_SECONDS = 3.0
Answer = Callable[[str, bytes, Any], bytes]


def make_ranking(model: str = "ranker") -> Any:
    return make_infer_request(model, TENSORS)


def ask(channel: grpc.Channel, request: Any, method: str = "ModelInfer") -> tuple[str, str]:
    """Return status and message."""
    try:
        call(channel, method, request if isinstance(request, bytes) else request.SerializeToString())
    except grpc.RpcError as error:
        details: Any = error
        return details.code().name, details.details() or ""
    return "OK", ""


def read_metrics(address: str) -> dict[str, Any]:
    """Return the families of a metrics page by name."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=SOON) as page:
        assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        families = list(text_string_to_metric_families(page.read().decode()))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def count_inside(address: str) -> float:
    return sum(sample.value for sample in read_metrics(address)["kvcast_gateway_in_flight"].samples)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def channel(server: TritonServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_address, options=UNLIMITED) as channel:
        yield channel


# -- before the real server


@pytest.mark.parametrize("method", sorted(OFFERED))
def test_bytes_that_are_no_message_are_the_callers_mistake(channel, method):
    status, message = ask(channel, b"\xff\xff\xff", method)
    assert (status, message) == ("INVALID_ARGUMENT", f"expected a {method}Request, got other bytes")


@pytest.mark.parametrize("method", [*sorted(NOT_OFFERED), "Nothing", "ModelStreamInfer", ""])
def test_what_is_not_offered_is_unimplemented(channel, method):
    assert ask(channel, b"", method)[0] == "UNIMPLEMENTED"


def test_streaming_is_not_offered(channel):
    stream = channel.stream_stream(SERVICE + "ModelStreamInfer")(iter([make_ranking().SerializeToString()]))
    with pytest.raises(
        grpc.RpcError, match="ModelStreamInfer: this server does not offer it; send ModelInfer"
    ) as caught:
        list(stream)
    details: Any = caught.value
    assert details.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("shape", [[1, -1, 2], [0, 1 << 31, 2]])
def test_an_impossible_axis_is_refused(channel, shape):
    request = make_ranking()
    request.inputs[0].shape[:] = shape
    status, message = ask(channel, request)
    assert status == "INVALID_ARGUMENT"
    assert str(shape) in message


def test_a_shape_that_the_data_does_not_fill_is_refused(channel):
    request = make_ranking()
    request.inputs[0].shape[1] += 1
    assert ask(channel, request)[0] == "INVALID_ARGUMENT"
    assert ask(channel, make_ranking())[0] == "OK"


@pytest.mark.parametrize("part", ["inputs", "outputs"])
def test_tensors_in_shared_memory_are_refused(channel, part):
    request = make_ranking()
    request.outputs.add(name="scores")
    getattr(request, part)[0].parameters["shared_memory_region"].string_param = "x"
    status, message = ask(channel, request)
    assert status == "INVALID_ARGUMENT"
    assert "shared memory" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda request, text: setattr(request, "id", text),
        lambda request, text: setattr(request, "model_name", text),
        lambda request, text: setattr(request, "model_version", text),
        lambda request, text: setattr(request.inputs[0], "name", text),
        lambda request, text: request.outputs.add(name=text),
        lambda request, text: setattr(request.parameters[text], "bool_param", True),
    ],
)
def test_long_names_and_ids_are_refused(channel, change):
    request = make_ranking()
    change(request, "x" * 100_000)
    status, message = ask(channel, request)
    assert status == "INVALID_ARGUMENT"
    assert len(message) < 200


@pytest.mark.parametrize("parameter", ["timeout", "sequence_id"])
def test_parameters_that_triton_reads_have_to_be_of_their_kind(channel, parameter):
    request = make_ranking()
    request.parameters[parameter].string_param = "x" * 129
    status, message = ask(channel, request)
    assert status == "INVALID_ARGUMENT"
    assert parameter in message


@pytest.mark.parametrize("microseconds", [1 << 40, (1 << 63) - 1])
def test_the_longest_deadline_is_one_too(channel, microseconds):
    request = make_ranking()
    request.parameters["timeout"].int64_param = microseconds
    assert ask(channel, request) == ("OK", "")


def test_a_message_over_the_limit_is_refused(channel):
    request = make_ranking()
    request.raw_input_contents[0] = bytes((64 << 20) + 1)
    assert ask(channel, request)[0] == "RESOURCE_EXHAUSTED"
    assert ask(channel, make_ranking())[0] == "OK"


@pytest.mark.parametrize(("size", "status"), [(9_000, "OK"), (25_000, "OK"), (40_000, "RESOURCE_EXHAUSTED")])
def test_long_metadata_is_taken_up_to_a_steady_limit(server, size, status):
    got = []
    for _ in range(5):
        with grpc.insecure_channel(server.grpc_address) as channel:
            infer = channel.unary_unary(SERVICE + "ModelInfer")
            try:
                infer(make_ranking().SerializeToString(), metadata=[("authorization", "x" * size)], timeout=SOON)
                got.append("OK")
            except grpc.RpcError as error:
                details: Any = error
                got.append(details.code().name)
    assert got == [status] * 5


def test_a_caller_may_ping_often(server):
    options = [("grpc.keepalive_time_ms", 6000), ("grpc.keepalive_permit_without_calls", 1)]
    with grpc.insecure_channel(server.grpc_address, options=options) as channel:
        assert ask(channel, make_ranking())[0] == "OK"
        time.sleep(14)
        assert ask(channel, make_ranking())[0] == "OK"


def test_extensions_are_those_that_are_offered(channel):
    metadata = service_pb2.ServerMetadataResponse.FromString(call(channel, "ServerMetadata", b""))
    assert "binary_tensor_data" in metadata.extensions
    assert not {"sequence", "system_shared_memory", "cuda_shared_memory"} & set(metadata.extensions)


def test_an_empty_history_as_typed_contents_is_a_new_user(channel):
    """As clients of other languages send it: empty contents are left out."""
    typed, raw = service_pb2.ModelInferRequest(model_name="ranker"), service_pb2.ModelInferRequest(model_name="ranker")
    candidates = TENSORS["candidates"][1]
    for message in (typed, raw):
        message.inputs.add(name="history", datatype="INT64", shape=[1, 0, 2])
        message.inputs.add(name="candidates", datatype="INT64", shape=candidates.shape)
        message.outputs.add(name="scores")
    typed.inputs[1].contents.int64_contents.extend(candidates.ravel().tolist())
    raw.raw_input_contents.extend([b"", candidates.tobytes()])
    scores = [
        service_pb2.ModelInferResponse.FromString(
            call(channel, "ModelInfer", each.SerializeToString())
        ).raw_output_contents[0]
        for each in (typed, raw)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 4 * candidates.shape[1]


def test_a_model_that_is_not_there_is_not_found(channel):
    assert ask(channel, make_ranking("nobody"))[0] in ("NOT_FOUND", "INVALID_ARGUMENT")


def test_scores_are_those_of_the_full_recomputation(channel):
    scores = []
    for model in ("ranker", "ranker_resident", "ranker_full"):
        reply = service_pb2.ModelInferResponse.FromString(
            call(channel, "ModelInfer", make_ranking(model).SerializeToString())
        )
        place = next(index for index, output in enumerate(reply.outputs) if output.name == "scores")
        scores.append(np.frombuffer(reply.raw_output_contents[place], np.float32))
    np.testing.assert_allclose(scores[0], scores[2], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(scores[1], scores[2], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("method", ["RepositoryIndex", "SystemSharedMemoryStatus", "LogSettings", "TraceSetting"])
def test_administration_asks_for_the_key(server, channel, method):
    assert ask(channel, b"", method)[0] == "UNAVAILABLE"
    key = [(f"triton-grpc-protocol-{name}", value) for name, value in server.admin_headers.items()]
    channel.unary_unary(SERVICE + method)(b"", metadata=key, timeout=SOON)
    wrong = [(name, "x") for name, _ in key]
    with pytest.raises(grpc.RpcError):
        channel.unary_unary(SERVICE + method)(b"", metadata=wrong, timeout=SOON)


def test_the_metrics_page_has_tritons_families_and_the_gateways(server, channel):
    assert ask(channel, make_ranking())[0] == "OK"
    families = read_metrics(server.metrics_address)
    assert {"nv_inference_request_success", "kvcast_user_kv_hits", "kvcast_fuse_seconds"} <= set(families)
    assert {"kvcast_gateway_answered", "kvcast_gateway_refused", "kvcast_ready", "kvcast_process_deaths"} <= set(
        families
    )
    answered = {
        sample.labels["model"]: sample.value
        for sample in families["kvcast_gateway_answered"].samples
        if sample.name.endswith("_total")
    }
    assert answered["ranker"] > 0
    seconds = {
        sample.name: sample.value
        for sample in families["kvcast_gateway_request_seconds"].samples
        if sample.labels["model"] == "ranker"
    }
    assert seconds["kvcast_gateway_request_seconds_count"] == answered["ranker"]
    assert 0 < seconds["kvcast_gateway_request_seconds_sum"] < SOON * answered["ranker"]
    size, free = (families[f"kvcast_shared_memory_{what}_bytes"].samples[0].value for what in ("size", "free"))
    assert 0 < free < size
    assert {sample.labels["model"] for sample in families["kvcast_process_deaths"].samples} >= {"doc_fusion"}
    assert families["kvcast_ready"].samples[0].value == 1
    assert families["kvcast_active_release"].samples[0].value >= 1


def test_callers_who_give_up_leave_nothing_behind(server, channel):
    message = make_ranking().SerializeToString()
    for _ in range(10):
        channel.unary_unary(SERVICE + "ModelInfer").future(message).cancel()
    wait_until(lambda: count_inside(server.metrics_address) == 0)
    assert ask(channel, make_ranking())[0] == "OK"


# -- before an upstream that answers as told


class Upstream(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """A gRPC server; keeps the last metadata, message and deadline of each method."""

    def __init__(self, answer: Answer | None = None) -> None:
        self.seen: dict[str, tuple[dict[str, Any], bytes, float | None]] = {}
        self.gone = threading.Event()
        self._answer = answer or (lambda name, body, context: b"")
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(16))
        self._server.add_generic_rpc_handlers((self,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> "Upstream":
        """Listen."""
        self._server.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Listen no more."""
        self._server.stop(None).wait()

    def service(self, details: Any) -> Any:
        name = details.method.removeprefix(SERVICE)

        def handle(body: bytes, context: Any) -> bytes:
            self.seen[name] = (dict(context.invocation_metadata()), body, context.time_remaining())
            context.add_callback(self.gone.set)
            return self._answer(name, body, context)

        return grpc.unary_unary_rpc_method_handler(handle)

    def read_timeout(self) -> float:
        """Return the seconds that the parameter `timeout` of the last request says."""
        message = service_pb2.ModelInferRequest.FromString(self.seen["ModelInfer"][1])
        return float(message.parameters["timeout"].int64_param / 1e6)


@contextlib.contextmanager
def run_before(answer: Answer | None = None, **changes: Any) -> Iterator[tuple[Any, Upstream, grpc.Channel]]:
    """Give a gateway, the upstream behind it, and a channel to the gateway."""
    with (
        Upstream(answer) as upstream,
        run_gateway(grpc=upstream.address, **changes) as gateway,
        grpc.insecure_channel(gateway.grpc) as channel,
    ):
        yield gateway, upstream, channel


def hold(name: str, body: bytes, context: Any) -> bytes:
    """Answer when the caller has long gone."""
    ended = threading.Event()
    context.add_callback(ended.set)
    ended.wait(HELD_SECONDS)
    return b""


def test_metadata_and_deadlines_are_passed_on():
    with run_before() as (_, upstream, channel):
        trace = [("traceparent", "00-a-b-01"), ("tracestate", "x=y")]
        key = ("triton-grpc-protocol-key", "x")
        metadata = [*trace, key, ("own-bin", b"\0\1"), ("own", "x" * 9000)]
        message = make_ranking().SerializeToString()
        for method in ("ModelInfer", "ModelStatistics"):
            channel.unary_unary(SERVICE + method)(message[:0] if method != "ModelInfer" else message, metadata=metadata)
            got, _, seconds = upstream.seen[method]
            passed_on = dict(trace if method == "ModelInfer" else [*trace, key])
            assert {name: got[name] for name, _ in metadata if name in got} == passed_on
            assert seconds is None or seconds > 1e9
        assert service_pb2.ModelInferRequest.FromString(upstream.seen["ModelInfer"][1]) == make_ranking()

        call(channel, "ModelInfer", message, timeout=20)
        seconds = upstream.seen["ModelInfer"][2]
        assert seconds is None or seconds > 1e9, "the request's parameter says it"
        assert 15 < upstream.read_timeout() < 21, "gRPC rounds it up"
        request = make_ranking()
        request.parameters["timeout"].int64_param = 2_000_000
        call(channel, "ModelInfer", request.SerializeToString(), timeout=20)
        assert 1 < upstream.read_timeout() <= 2, "the sooner one counts"


def test_a_caller_whose_deadline_passes_leaves_the_question_and_its_place_with_triton():
    with run_before(hold) as (gateway, upstream, channel):
        asked = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", make_ranking().SerializeToString(), timeout=0.5)
        details: Any = caught.value
        assert details.code().name in ("DEADLINE_EXCEEDED", "UNAVAILABLE"), "whichever of the two notices first"
        assert time.monotonic() - asked < 2
        assert (upstream.gone.is_set(), count_inside(gateway.metrics)) == (False, 1)
        assert upstream.gone.wait(SOON)
        wait_until(lambda: count_inside(gateway.metrics) == 0)


def test_a_deadline_that_only_the_request_names_is_kept_too():
    with run_before(hold) as (gateway, _, channel):
        request = make_ranking()
        request.parameters["timeout"].int64_param = 300_000
        asked = time.monotonic()
        assert ask(channel, request)[0] in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
        assert time.monotonic() - asked < 2
        wait_until(lambda: count_inside(gateway.metrics) == 0)


def test_callers_who_leave_free_the_gate_when_triton_is_done():
    with run_before(hold, in_flight=2, waiting=2) as (gateway, upstream, channel):
        message = make_ranking().SerializeToString()
        calls = [channel.unary_unary(SERVICE + "ModelInfer").future(message) for _ in range(4)]
        wait_until(lambda: count_inside(gateway.metrics) == 2)
        waiting = "kvcast_gateway_waiting"
        wait_until(lambda: sum(sample.value for sample in read_metrics(gateway.metrics)[waiting].samples) == 2)
        status, text = ask(channel, make_ranking())
        assert (status, text) == ("RESOURCE_EXHAUSTED", "busy: 2 requests are waiting already")
        for each in calls:
            each.cancel()
        wait_until(lambda: sum(sample.value for sample in read_metrics(gateway.metrics)[waiting].samples) == 0)
        assert (upstream.gone.is_set(), count_inside(gateway.metrics)) == (False, 2)
        assert upstream.gone.wait(SOON)
        wait_until(lambda: count_inside(gateway.metrics) == 0)
        assert sum(sample.value for sample in read_metrics(gateway.metrics)[waiting].samples) == 0


def test_health_is_what_the_launcher_says():
    replies = {
        "ServerReady": service_pb2.ServerReadyResponse(ready=True).SerializeToString(),
        "ModelReady": service_pb2.ModelReadyResponse(ready=True).SerializeToString(),
        "ServerLive": service_pb2.ServerLiveResponse(live=True).SerializeToString(),
    }

    def is_ready(model: str = "") -> bool:
        if model:
            body = service_pb2.ModelReadyRequest(name=model).SerializeToString()
            return bool(service_pb2.ModelReadyResponse.FromString(call(channel, "ModelReady", body)).ready)
        return bool(service_pb2.ServerReadyResponse.FromString(call(channel, "ServerReady", b"")).ready)

    with run_before(lambda name, body, context: replies[name]) as (gateway, _, channel):
        assert is_ready()
        gateway.tell(dataclasses.replace(READY, is_ready=False, broken=("user_encoder",)))
        assert not is_ready()
        assert [model for model in ("user_encoder", "ranker", "ranker_resident") if is_ready(model)] == [
            "ranker_resident"
        ]
        assert service_pb2.ServerLiveResponse.FromString(call(channel, "ServerLive", b"")).live
        gateway.tell(READY)
        assert is_ready()
        assert is_ready("ranker")
        gateway.tell(dataclasses.replace(READY, is_draining=True))
        assert not is_ready()
        assert ask(channel, make_ranking())[0] == "UNAVAILABLE"


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService"])
def test_grpcs_own_health_service_says_the_same(service):
    serving, not_serving = (health_pb2.HealthCheckResponse.ServingStatus.Value(n) for n in ("SERVING", "NOT_SERVING"))
    request = health_pb2.HealthCheckRequest(service=service)
    with run_gateway(state=None) as gateway, grpc.insecure_channel(gateway.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watched = stub.Watch(request, timeout=30)
        assert (stub.Check(request).status, next(watched).status) == (not_serving, not_serving)
        gateway.tell(READY)
        assert (stub.Check(request).status, next(watched).status) == (serving, serving)
        gateway.tell(dataclasses.replace(READY, is_ready=False, broken=("doc_fusion",)))
        assert (stub.Check(request).status, next(watched).status) == (not_serving, not_serving)
        with pytest.raises(grpc.RpcError):
            stub.Check(health_pb2.HealthCheckRequest(service="nothing"))


def test_the_services_can_be_listed(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    (reply,) = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {each.name for each in reply.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names


def test_a_server_that_is_starting_or_away_is_unavailable():
    with run_gateway(state=None) as gateway, grpc.insecure_channel(gateway.grpc) as channel:
        assert ask(channel, make_ranking()) == ("UNAVAILABLE", "the server is starting: try again")
        gateway.tell(READY)
        away = ("UNAVAILABLE", "the server is starting or stopping: try again")
        assert ask(channel, b"", "ServerReady") == away
        assert ask(channel, make_ranking("nobody")) == away


ERRORS = {
    "a traceback": ("INTERNAL", 'Traceback: File "/srv/a/model.py", line 3', "INTERNAL", "INTERNAL", 500, "reference"),
    "a path": (
        "INVALID_ARGUMENT",
        "cannot open /srv/models/ranker",
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        400,
        "under",
    ),
    "a wrong request": (
        "INVALID_ARGUMENT",
        "expected [1, 2]",
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        400,
        "expected [1, 2]",
    ),
    "no model": ("NOT_FOUND", "unknown model 'x'", "NOT_FOUND", "NOT_FOUND", 404, "unknown model 'x'"),
    "a sequence": ("UNIMPLEMENTED", "no sequences", "UNIMPLEMENTED", "UNIMPLEMENTED", 501, "no sequences"),
    "no shared memory": (
        "INTERNAL",
        "the shared memory pool size for key 'x'",
        "RESOURCE_EXHAUSTED",
        "BUSY",
        503,
        "full",
    ),
    "a full queue": ("UNAVAILABLE", "Exceeds maximum queue size", "RESOURCE_EXHAUSTED", "BUSY", 503, "Exceeds"),
    "a model that is loaded": (
        "NOT_FOUND",
        "'x' has no available versions",
        "UNAVAILABLE",
        "UNAVAILABLE",
        503,
        "replaced",
    ),
    "a busy model": ("UNAVAILABLE", "[BUSY] no room", "RESOURCE_EXHAUSTED", "BUSY", 503, "no room"),
    "a busy step": (
        "UNAVAILABLE",
        "in ensemble 'ranker', [BUSY] no room",
        "RESOURCE_EXHAUSTED",
        "BUSY",
        503,
        "no room",
    ),
    "a late request": (
        "UNAVAILABLE",
        "[EXPIRED] late",
        "DEADLINE_EXCEEDED",
        "EXPIRED",
        504,
        "late",
    ),
    "words of a caller": (
        "INVALID_ARGUMENT",
        "unexpected input 'Stub process is unhealthy'",
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        400,
        "unexpected",
    ),
    "a word of a caller": (
        "INVALID_ARGUMENT",
        "x: [BUSY] y",
        "INVALID_ARGUMENT",
        "INVALID_ARGUMENT",
        400,
        "x: [BUSY] y",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_tritons_has_a_code_and_a_reason_over_both_protocols(name):
    code, said, status, reason, http_status, text = ERRORS[name]

    def answer(name: str, body: bytes, context: Any) -> bytes:
        context.abort(grpc.StatusCode[code], said)
        return b""

    with run_before(answer) as (gateway, _, channel):
        with pytest.raises(grpc.RpcError) as caught:
            call(channel, "ModelInfer", make_ranking().SerializeToString())
        details: Any = caught.value
        assert (details.code().name, dict(details.trailing_metadata())["kvcast-reason"]) == (status, reason)
        inputs = [{"name": "history", "datatype": "INT64", "shape": [1], "data": [1]}]
        body = json.dumps({"inputs": inputs}).encode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://{gateway.http}/v2/models/ranker/infer", body, timeout=SOON)
        table = json.load(refused.value)
        assert (refused.value.code, table["reason"]) == (http_status, reason)
        assert refused.value.headers["Retry-After"] == ("1" if reason == "BUSY" else None)
    for message in (details.details(), table["error"]):
        assert text in message
        assert "/srv" not in message


def test_a_request_whose_process_died_is_sent_again_when_that_is_mended():
    times = []

    def answer(name: str, body: bytes, context: Any) -> bytes:
        times.append(time.monotonic())
        if len(times) == 1:
            context.abort(grpc.StatusCode.INTERNAL, "Stub process 'doc_fusion_0_0' is not healthy.")
        return b""

    with run_before(answer) as (gateway, _, channel):
        asked = channel.unary_unary(SERVICE + "ModelInfer").future(make_ranking().SerializeToString())
        wait_until(lambda: len(times) == 1)
        gateway.tell(dataclasses.replace(READY, is_ready=False, broken=("doc_fusion",), deaths={"doc_fusion": 1}))
        time.sleep(0.2)
        assert len(times) == 1, "it waits"
        gateway.tell(dataclasses.replace(READY, deaths={"doc_fusion": 1}))
        assert asked.result(SOON) == b""
        (again,) = (
            sample.value
            for sample in read_metrics(gateway.metrics)["kvcast_gateway_sent_again"].samples
            if sample.name.endswith("_total") and sample.labels["model"] == "ranker"
        )
        assert again == 1


def test_the_end_waits_for_answers_and_refuses_the_new():
    def answer(name: str, body: bytes, context: Any) -> bytes:
        time.sleep(1)
        return b""

    with run_before(answer) as (gateway, upstream, channel):
        asked = channel.unary_unary(SERVICE + "ModelInfer").future(make_ranking().SerializeToString())
        wait_until(lambda: "ModelInfer" in upstream.seen)
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        status, text = ask(channel, make_ranking())
        assert (status, "stopping" in text) == ("UNAVAILABLE", True)
        assert asked.result(SOON) == b""
        assert gateway.process.wait(SOON) == 0


def test_the_end_does_not_wait_for_ever():
    with run_before(hold, drain_seconds=0.3) as (gateway, upstream, channel):
        asked = channel.unary_unary(SERVICE + "ModelInfer").future(make_ranking().SerializeToString())
        wait_until(lambda: "ModelInfer" in upstream.seen)
        told = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError, match="send it again") as caught:
            asked.result(SOON)
        details: Any = caught.value
        assert details.code() == grpc.StatusCode.UNAVAILABLE
        assert gateway.process.wait(SOON) == 0
        assert time.monotonic() - told < 2
