"""The request log: what the gateway asks of the models, and what they write and take out of replies."""

import json

import numpy as np
import pytest

from kvcast.gateway.inference import check_infer
from kvcast.protocol.errors import InvalidRequestError
from kvcast.protocol.report import CacheResult, Report
from kvcast.protocol.tensors import ENCODE_REPORT, LOG_PARAMETER, REPORT_PARAMETER, SCORES
from kvcast.serving.model import write_strings
from kvcast.serving.request_log import take_reports
from tests.chaos.fuzzing import make_infer_request

REPORTS = [Report(CacheResult.HIT, fuse_seconds=0.5), Report(CacheResult.MISS, encode_seconds=0.25)]
SCORED = {SCORES.name: np.ones((2, 3), np.float32)}


def make_reply():
    return {**SCORED, ENCODE_REPORT.name: write_strings(report.to_json() for report in REPORTS)}


def test_a_line_a_user_and_the_reply_as_it_was_asked_for(capsys):
    assert take_reports("ranker_resident", {LOG_PARAMETER: "r-7"}, make_reply()).keys() == SCORED.keys()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["request_id"], line["model"], line["user"]) for line in lines] == [
        ("r-7", "ranker_resident", 0), ("r-7", "ranker_resident", 1),
    ]  # fmt: skip
    assert [(line["cache"], line["fuse_seconds"], line["encode_seconds"]) for line in lines] == [
        ("hit", 0.5, 0.0), ("miss", 0.0, 0.25),
    ]  # fmt: skip


def test_reports_that_the_caller_asked_for_stay(capsys):
    parameters = {LOG_PARAMETER: "r-7", REPORT_PARAMETER: True}
    assert take_reports("ranker_resident", parameters, make_reply()).keys() == make_reply().keys()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_reply_without_reports_is_left_alone(capsys):
    assert take_reports("ranker_full", {LOG_PARAMETER: "r-7"}, dict(SCORED)).keys() == SCORED.keys()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["kvcast_log\0", "x\n", "\x7f"])
def test_names_have_no_control_characters(name):
    """Triton takes names as C strings: one with an end in it would be another name to it."""
    for change in (
        lambda request: setattr(request, "model_name", f"ranker{name}"),
        lambda request: setattr(request, "id", name),
        lambda request: request.inputs.add(name=f"kv_origin{name}"),
        lambda request: request.outputs.add(name=f"kv_origin{name}"),
        lambda request: setattr(request.parameters[name], "bool_param", True),
    ):
        request = make_infer_request("ranker", {})
        change(request)
        with pytest.raises(InvalidRequestError, match="control characters"):
            check_infer(request)


def test_callers_cannot_have_the_models_log():
    request = make_infer_request("ranker", {})
    check_infer(request)
    request.parameters[LOG_PARAMETER].string_param = "x"
    with pytest.raises(InvalidRequestError, match=LOG_PARAMETER):
        check_infer(request)
