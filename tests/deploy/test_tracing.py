"""Triton's OpenTelemetry tracing, through the gateway, into a collector of OTLP over HTTP."""

import base64
import dataclasses
import json
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kvcast.protocol.config import load_config
from kvcast.protocol.tensors import CANDIDATES, DOC_FUSION, HISTORY, RANKER, RANKER_RESIDENT, USER_ENCODER
from kvcast.server import TritonServer
from tests.conftest import make_settings
from tests.processes import wait_until
from tests.support import draw_request

ROOT = Path(__file__).parents[2]
# The options that the guide puts after `kvcast serve … --`.
URL = "http://127.0.0.1:4318/v1/traces"
FLAGS = [
    "--trace-config=mode=opentelemetry",
    f"--trace-config=opentelemetry,url={URL}",
    "--trace-config=opentelemetry,resource=service.name=kvcast",
    "--trace-config=level=TIMESTAMPS",
    "--trace-config=rate=0",
]
ARRIVES_WITHIN_SECONDS = 20
IDS = ("traceId", "spanId", "parentSpanId")
# Triton's names of the span of a whole request, and of a model's part in Triton.
WHOLE, COMPUTE = "InferRequest", "compute"


@dataclass
class Collector:
    """Takes in spans on a port of its own; a context manager."""

    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)

    def __enter__(self) -> Self:
        """Listen."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take_in(self.path, self.headers["Content-Type"], body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                """Be silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def take_in(self, path: str, content_type: str, body: bytes) -> None:
        """Read a request of OTLP, as JSON, which is what Triton 2.51 sends: ids are hexadecimal there."""
        assert (path, content_type) == ("/v1/traces", "application/json")
        table = json.loads(body)
        for span in (
            each for part in table["resourceSpans"] for scope in part["scopeSpans"] for each in scope["spans"]
        ):
            for key in IDS:
                if key in span:
                    span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
        message = json_format.ParseDict(table, ExportTraceServiceRequest())
        for part in message.resource_spans:
            names = {each.key: each.value.string_value for each in part.resource.attributes}
            self.services.add(names["service.name"])
            self.spans.extend(span for scope in part.scope_spans for span in scope.spans)

    def wait_for(self, trace: str, count: int) -> list[Span]:
        """Return the spans of a trace as soon as so many are there."""
        wait_until(lambda: len(self.find(trace)) >= count, ARRIVES_WITHIN_SECONDS)
        return self.find(trace)

    def find(self, trace: str) -> list[Span]:
        """Return the spans of a trace."""
        return [span for span in self.spans if span.trace_id.hex() == trace]


@pytest.fixture(scope="module")
def collector():
    with Collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(tiny_repository, collector):
    """A server with the flags of the guide, but for the collector's address, and spans sent on at once."""
    flags = [flag.replace(URL, collector.url) for flag in FLAGS]
    settings = dataclasses.replace(
        make_settings(tiny_repository),
        models=[RANKER.name, RANKER_RESIDENT.name],
        extra_flags=[*flags, "--trace-config=opentelemetry,bsp_schedule_delay=200"],
    )
    with TritonServer(settings) as server:
        yield server


def rank(server: TritonServer, protocol: str, model: str, headers: dict[str, str]) -> None:
    """Rank as any client of Triton's does, with these headers."""
    library = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    address = server.grpc_address if protocol == "grpc" else server.http_address
    inputs = []
    for spec, array in zip((HISTORY, CANDIDATES), draw_request(load_config("tiny"), 12, 5, 0), strict=True):
        inputs.append(library.InferInput(spec.name, [1, *array.shape], spec.dtype))
        inputs[-1].set_data_from_numpy(array[None])
    with library.InferenceServerClient(address) as client:
        client.infer(model, inputs, headers=headers)


def test_the_guide_names_these_flags():
    guide = (ROOT / "docs" / "operations.md").read_text()
    assert [flag for flag in FLAGS if flag not in guide] == []


def rank_traced(
    server: TritonServer, collector: Collector, protocol: str, model: str, count: int, sampled: str = "01"
) -> tuple[str, list[Span]]:
    """Rank as part of a trace; return the caller's span and the `count` spans that a ranking gives.

    Spans are sent on without anybody waiting for them, and can be lost: then another ranking is asked for.
    """
    for left in (2, 1, 0):
        trace, parent = secrets.token_hex(16), secrets.token_hex(8)
        rank(server, protocol, model, {"traceparent": f"00-{trace}-{parent}-{sampled}"})
        try:
            return parent, collector.wait_for(trace, count)
        except AssertionError:
            if not left:
                raise
    raise AssertionError


def find_one(spans: list[Span], name: str) -> Span:
    (span,) = [each for each in spans if each.name == name]
    return span


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_ranking_is_part_of_its_callers_trace_with_all_its_steps(traced, collector, protocol):
    parent, spans = rank_traced(traced, collector, protocol, RANKER.name, 6)
    whole, ranker = find_one(spans, WHOLE), find_one(spans, RANKER.name)
    encoder, fusion = find_one(spans, USER_ENCODER.name), find_one(spans, DOC_FUSION.name)
    assert whole.parent_span_id.hex() == parent
    assert ranker.parent_span_id == whole.span_id
    assert encoder.parent_span_id == fusion.parent_span_id == ranker.span_id
    computed = {each.parent_span_id for each in spans if each.name == COMPUTE}
    assert computed == {encoder.span_id, fusion.span_id}
    assert whole.start_time_unix_nano <= ranker.start_time_unix_nano <= encoder.start_time_unix_nano
    # The guide reads the time of encoding off the starts of the two steps.
    assert encoder.start_time_unix_nano < fusion.start_time_unix_nano < ranker.end_time_unix_nano
    assert ranker.end_time_unix_nano <= whole.end_time_unix_nano
    assert collector.services == {"kvcast"}


def test_the_resident_ranker_is_traced_too(traced, collector):
    _, spans = rank_traced(traced, collector, "grpc", RANKER_RESIDENT.name, 3)
    names = sorted(span.name for span in spans)
    assert names == sorted([WHOLE, RANKER_RESIDENT.name, COMPUTE])


def test_requests_without_a_trace_are_not_traced(traced, collector):
    """`rate=0`; else one request in so many is traced, on its own."""
    for _ in range(5):
        rank(traced, "grpc", RANKER.name, {})
    rank_traced(traced, collector, "grpc", RANKER.name, 6)  # spans are sent in the order in which they end
    assert {span.name for span in collector.spans if not span.parent_span_id} == set()


def test_triton_traces_what_its_caller_did_not_sample(traced, collector):
    """The guide warns of it."""
    rank_traced(traced, collector, "http", RANKER.name, 6, sampled="00")
