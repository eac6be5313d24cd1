"""What the request log does to replies: nothing that a caller could notice, whatever is in them."""

import json

import pytest
from tritonclient.grpc import service_pb2

from kvcast.gateway import grpc_proxy, http_proxy
from kvcast.gateway.inference_body import InferenceBody
from kvcast.gateway.request_log import Entry, RequestLog, needs_reports
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.tensors import ENCODE_REPORT, FUSE_REPORT, REPORT_PARAMETER, SCORES
from tests.processes import wait_until

REPORT = Report(CacheResult.HIT, fuse_seconds=0.5).to_json()


def pack(text: str) -> bytes:
    return len(text).to_bytes(4, "little") + text.encode()


def make_reply(*outputs: tuple[str, bytes]) -> bytes:
    message = service_pb2.ModelInferResponse(model_name="ranker", id="7")
    for name, data in outputs:
        message.outputs.add(name=name, datatype="BYTES", shape=[1, 1])
        message.raw_output_contents.append(data)
    return message.SerializeToString()


def make_message(model: str = "ranker"):
    message = service_pb2.ModelInferRequest(model_name=model)
    message.parameters[REPORT_PARAMETER].bool_param = True
    return message


def test_reports_are_taken_out_of_a_grpc_reply_and_nothing_else_is_touched():
    plain = make_reply((SCORES.name, b"\x00\x00\x80\x3f"))
    entry = Entry({})
    reply = make_reply((FUSE_REPORT.name, pack(REPORT)), (SCORES.name, b"\x00\x00\x80\x3f"))
    assert grpc_proxy.take_reports(make_message(), reply, entry, remove=True) == plain
    assert entry.reports == {FUSE_REPORT.name: REPORT}
    assert grpc_proxy.take_reports(make_message(), reply, entry, remove=False) == reply


@pytest.mark.parametrize(
    "reply",
    [
        b"no message",
        make_reply((ENCODE_REPORT.name, b"")),
        make_reply((ENCODE_REPORT.name, b"\x05\x00\x00\x00\xff\xff\xff\xff\xff")),
        service_pb2.ModelInferResponse(
            outputs=[service_pb2.ModelInferResponse.InferOutputTensor(name=ENCODE_REPORT.name)]
        ).SerializeToString(),
    ],
)
def test_a_grpc_reply_that_cannot_be_read_goes_to_the_caller_as_it_is(reply):
    assert grpc_proxy.take_reports(make_message(), reply, Entry({}), remove=True) == reply


def test_replies_of_models_without_reports_are_not_looked_at():
    assert (
        grpc_proxy.take_reports(make_message("user_encoder"), b"not parsed", Entry({}), remove=False) == b"not parsed"
    )
    body = InferenceBody({"inputs": []}, ())
    for model in ("user_encoder", "doc_fusion", "ranker_full", "other"):
        assert http_proxy.ask_for_reports(model, body, Entry({})) == (body, None)


def test_reports_are_taken_out_of_an_http_reply_and_its_length_is_right():
    outputs = [
        {"name": SCORES.name, "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}},
        {"name": FUSE_REPORT.name, "datatype": "BYTES", "shape": [1, 1], "data": [REPORT]},
        {"name": ENCODE_REPORT.name, "datatype": "BYTES", "parameters": {"binary_data_size": 4 + len(REPORT)}},
    ]  # fmt: skip
    header = json.dumps({"id": "7", "outputs": outputs}).encode()
    entry = Entry({})
    body, length = http_proxy.take_reports(header + b"abcd" + pack(REPORT), len(header), entry=entry, remove=True)
    assert json.loads(body[:length]) == {"id": "7", "outputs": outputs[:1]}
    assert body[length:] == b"abcd"
    assert entry.reports == {ENCODE_REPORT.name: REPORT, FUSE_REPORT.name: REPORT}


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"outputs": [{}]}', b'{"outputs": [{"name": "encode_report"}]}', b"\xff"]
)
def test_an_http_reply_that_cannot_be_read_goes_to_the_caller_as_it_is(body):
    assert http_proxy.take_reports(body, None, entry=Entry({}), remove=True) == (body, None)


@pytest.mark.parametrize(
    ("outputs", "parameters", "expected"),
    [
        ((), (), True),
        ((SCORES.name,), (), True),
        ((SCORES.name,), (REPORT_PARAMETER,), False),
        ((SCORES.name, ENCODE_REPORT.name), (), False),
        (("manifest",), (), False),
    ],
)
def test_reports_are_asked_for_where_the_caller_has_not(outputs, parameters, expected):
    assert needs_reports("ranker_resident", outputs, parameters) is expected
    assert needs_reports("user_encoder", outputs, parameters) is False


@pytest.mark.parametrize("report", ["{}", "[]", '{"cache": "hit", "encode_seconds": "x"}', "no JSON"])
def test_a_report_that_is_none_costs_a_line_at_most(report):
    lines: list[str] = []
    log = RequestLog(1.0, lines.append)
    with log.follow("grpc", "ranker", str) as entry:
        entry.reports = {ENCODE_REPORT.name: report}
    with log.follow("grpc", "ranker", str):
        pass
    wait_until(lambda: bool(lines), 5)
    assert "cache" not in json.loads(lines[-1])
