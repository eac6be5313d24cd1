"""The runtime without a server: packing, answering with errors kept apart, artefacts refused."""

import json
import runpy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcast.protocol.errors import (
    ArtefactError,
    DeadlineExceededError,
    InvalidRequestError,
    KvcastError,
    ServerFaultError,
)
from kvcast.protocol.manifest import Dims, parse_manifest, read_manifest
from kvcast.protocol.schema import KVLayout, Workload
from kvcast.protocol.tensors import EXPORTED_MODELS, KV_SECRET_VARIABLE
from kvcast.serving import DocFusion, UserEncoder
from kvcast.serving.artefact import SessionOptions, open_artefact
from kvcast.serving.backlog import PASSED_OVER_AT_MOST, Backlog
from kvcast.serving.metrics import Metrics, Stopwatch
from kvcast.serving.model import Request, ServedModel, Tensors
from kvcast.serving.options import CacheOptions, read_options
from kvcast.serving.packing import plan_runs, stack_padded, strip_padding
from kvcast.serving.serve import Service, start_model
from kvcast.serving.user_kv import KVArrays, stack_user_kv
from tests.processes import wait_until


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 100))
def test_runs_hold_every_user_once_and_keep_the_bound(lengths, bound):
    runs = plan_runs(lengths, bound)
    assert sorted(user for run in runs for user in run) == list(range(len(lengths)))
    for run in runs:
        assert run
        assert len(run) == 1 or len(run) * max(lengths[user] for user in run) <= bound


def test_padding_is_stripped_wherever_it_stands():
    history = np.array([[0, 0], [1, 2], [0, 0], [0, 3], [4, 0], [0, 0]])
    np.testing.assert_array_equal(strip_padding(history), [[1, 2], [0, 3], [4, 0]])
    np.testing.assert_array_equal(strip_padding(np.zeros((5, 2), np.int64)), [[0, 0]])
    np.testing.assert_array_equal(strip_padding(np.zeros((0, 2), np.int64)), [[0, 0]])


def test_stacking_pads_with_zeros_and_copies_nothing_for_one():
    one, two = np.ones((1, 2), np.int64), np.full((3, 2), 7)
    np.testing.assert_array_equal(stack_padded([one, two])[0], [[1, 1], [0, 0], [0, 0]])
    assert np.shares_memory(stack_padded([two]), two)


def test_stacked_user_kv_pads_with_masked_slots():
    layout = KVLayout(2, 1, 4, 3, 1, mask_row=3, mask_value=-5.0)
    parts = [
        KVArrays(np.full((1, 2, 1, 4, slots), slots, np.float32), np.full((1, 2, 1, slots, 3), slots, np.float32))
        for slots in (2, 4)
    ]
    stacked = stack_user_kv(parts, layout)
    assert stacked.keys.shape == (2, 2, 1, 4, 4)
    np.testing.assert_array_equal(stacked.keys[0, 0, 0, :, 2:], [[0, 0], [0, 0], [0, 0], [-5, -5]])
    np.testing.assert_array_equal(stacked.values[0, :, :, 2:], 0)
    np.testing.assert_array_equal(stacked.take(0, 2).keys, parts[0].keys)
    np.testing.assert_array_equal(stacked.take(1, 4).values, parts[1].values)
    assert stack_user_kv(parts[:1], layout) is parts[0]


class Doubler(ServedModel[int]):
    """A model that doubles a number, refuses 0 and breaks on 13."""

    def __init__(self) -> None:
        self.runs: list[int] = []
        self.stopwatch = Stopwatch()

    def check(self, request: Request) -> int:
        number = int(request.tensors["number"][0])
        if "double" not in request.wanted or number == 0:
            raise InvalidRequestError(f"number: expected not 0, got {number}")
        return number

    def plan(self, jobs: Sequence[int]) -> list[list[int]]:
        if 14 in jobs:
            raise RuntimeError("no plan")
        odd = [place for place, job in enumerate(jobs) if job % 2]
        rest = [place for place in range(len(jobs)) if place not in odd]
        return [odd, rest] if 12 not in jobs else [odd]  # forgets some

    def run(self, jobs: Sequence[int]) -> list[Tensors]:
        self.runs.append(len(jobs))
        if 13 in jobs:
            raise RuntimeError("secret detail of /some/path")
        return [{"double": np.array([2 * job])} for job in jobs]

    def make_warm_up(self) -> Tensors:
        return {"number": np.array([1])}


def ask(numbers: list[int]) -> tuple[list[Tensors | KvcastError], Doubler, list[str]]:
    model, log = Doubler(), []
    backlog: Backlog[int, int] = Backlog(model, log.append)
    replies = {}
    for place, number in enumerate(numbers):
        error = backlog.add(place, partial(Request, {"number": np.array([number])}, ["double"]))
        if error is not None:
            replies[place] = error
    while len(backlog):
        for place, reply in backlog.step():
            assert place not in replies, "each exactly once"
            replies[place] = reply
    return [replies[place] for place in range(len(numbers))], model, log


def test_valid_requests_run_together_and_each_gets_its_own_reply():
    replies, model, log = ask([1, 0, 3])
    assert model.runs == [2]
    assert [int(reply["double"][0]) for reply in (replies[0], replies[2])] == [2, 6]
    assert isinstance(replies[1], InvalidRequestError)
    assert not log


def test_an_unexpected_error_fails_its_own_request_only_and_hides_its_detail():
    replies, _, log = ask([1, 13, 3])
    assert [int(reply["double"][0]) for reply in (replies[0], replies[2])] == [2, 6]
    assert isinstance(replies[1], ServerFaultError)
    assert "secret" not in str(replies[1])
    reference = str(replies[1]).split()[-1]
    assert len(log) == 1
    assert reference in log[0]
    assert "secret detail" in log[0]


@given(st.lists(st.integers(-2, 15), max_size=40))
def test_every_request_gets_its_own_reply_whatever_the_model_plans(numbers):
    replies, _, _ = ask(numbers)
    assert len(replies) == len(numbers)
    for number, reply in zip(numbers, replies, strict=True):
        if number in (0, 13):
            assert isinstance(reply, KvcastError)
        else:
            assert int(reply["double"][0]) == 2 * number


def read_number(number: int) -> Request:
    return Request({"number": np.array([number])}, ["double"])


def test_a_request_that_has_waited_too_long_is_refused_and_not_computed():
    now = [0.0]
    backlog: Backlog[int, str] = Backlog(Doubler(), print, clock=lambda: now[0])
    backlog.add("late", partial(read_number, 2), seconds=1.0)
    backlog.add("gone", partial(read_number, 4), is_cancelled=lambda: True)
    backlog.add("patient", partial(read_number, 6))
    now[0] = 1.0
    replies = dict(backlog.step())
    assert isinstance(replies["late"], DeadlineExceededError)
    assert isinstance(replies["gone"], DeadlineExceededError)
    assert int(replies["patient"]["double"][0]) == 12
    assert backlog.waits == [1.0]
    assert len(backlog) == 0


def test_the_quick_go_first_but_pass_nobody_over_for_ever():
    """Odd numbers are quick in `Doubler.plan`. A steady stream of them may not keep an even one waiting."""
    backlog: Backlog[int, int] = Backlog(Doubler(), print)
    backlog.add(-1, partial(read_number, 2))
    answered = []
    for place in range(20):
        backlog.add(place, partial(read_number, 1))
        answered += [ticket for ticket, _ in backlog.step()]
    assert answered[: answered.index(-1)] == list(range(PASSED_OVER_AT_MOST))


class FakeTriton:
    """The part of `pb_utils` that the runtime is handed, for what a real server shows less directly."""

    class TritonModelException(Exception):  # noqa: N818 Triton's name
        """As Triton's."""

    class TritonError:
        """As Triton's."""

        INVALID_ARG, INTERNAL, UNAVAILABLE = "INVALID_ARG", "INTERNAL", "UNAVAILABLE"

        def __init__(self, message: str, code: str) -> None:
            self.message, self.code = message, code

    class Tensor:
        """As Triton's."""

        def __init__(self, name: str, array: np.ndarray) -> None:
            self.name, self.array = name, array

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1

    class InferenceResponse:
        """As Triton's."""

        def __init__(self, output_tensors: Sequence[Any] = (), error: Any = None) -> None:
            self.output_tensors, self.error = output_tensors, error

    class Logger:
        """As Triton's."""

        log_info = log_error = staticmethod(lambda message: None)


class TritonRequest:
    """As Triton's, for a history of one event with one id."""

    def __init__(self, item: int, sent: list[tuple[Any, int]]) -> None:
        self.item, self.sent = item, sent

    def as_numpy(self) -> np.ndarray:
        return np.full((1, 1, 2), self.item)

    def requested_output_names(self) -> list[str]:
        return ["kv_id"]

    def parameters(self) -> str:
        return ""

    def get_response_sender(self) -> "TritonRequest":
        return self

    def send(self, response: Any, flags: int) -> None:
        self.sent.append((response, flags))

    def timeout(self) -> int:
        return 0

    def is_cancelled(self) -> bool:
        return False


def make_triton() -> Any:
    triton: Any = FakeTriton()
    triton.get_input_tensor_by_name = lambda request, name: request
    return triton


def test_errors_are_spelled_for_triton(tiny_repository):
    model, triton = UserEncoder.open(tiny_repository / "user_encoder" / "1", SessionOptions()), make_triton()
    sent: list[tuple[Any, int]] = []
    # There is no metrics endpoint here: an answer does not depend on it.
    service = Service(triton, model, Metrics(triton, {}))
    service.submit([TritonRequest(-1, sent)])
    service.close()
    ((response, flags),) = sent
    assert flags == triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    assert response.error.code == "INVALID_ARG"
    assert (
        response.error.message == "[INVALID_ARGUMENT] history: expected field 'item' within 0..499, got -1 at event 0"
    )


def test_metrics_are_written_in_bulk_and_lose_nothing(tiny_repository):
    """Many at once: fewer writes than replies. One after the other: each is counted before its reply is sent."""
    model = UserEncoder.open(tiny_repository / "user_encoder" / "1", SessionOptions())
    sent: list[tuple[Any, int]] = []
    published: list[tuple[int, int]] = []

    class Counting:
        def publish(self, stopwatch: Stopwatch, cache: Any, waiting: int, errors: Sequence[Any]) -> None:
            published.append((len(errors), len(stopwatch.wait)))
            stopwatch.wait.clear()

    service = Service(make_triton(), model, Counting())  # type: ignore[arg-type]
    service.submit([TritonRequest(index % 2 * 2 - 1, sent) for index in range(40)])
    wait_until(lambda: len(sent) == 40, 10)
    assert (sum(errors for errors, _ in published), sum(waits for _, waits in published)) == (20, 20)
    assert len(published) < 40
    published.clear()
    for index in range(3):
        service.submit([TritonRequest(-1, sent)])
        wait_until(lambda index=index: len(sent) == 41 + index, 10)
        assert sum(errors for errors, _ in published) == index + 1
    service.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("model", [model.name for model in EXPORTED_MODELS])
def test_an_adapter_is_ready_exactly_while_it_would_answer(tiny_repository, monkeypatch, model):
    """Triton 2.72 asks `is_ready`; the server of the tests does not."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", make_triton())
    monkeypatch.setattr(FakeTriton, "MetricFamily", MagicMock(), raising=False)
    folder = tiny_repository / model
    adapter = runpy.run_path(str(folder / "1" / "model.py"))["TritonPythonModel"]()
    arguments = {"model_repository": str(folder), "model_version": "1", "model_instance_name": "0"}
    adapter.initialize({"model_config": "{}", **arguments})
    assert adapter.is_ready() is True
    adapter.finalize()
    assert adapter.is_ready() is False

    adapter.initialize({"model_config": "{}", **arguments})
    monkeypatch.setattr(adapter.service, "_reply", lambda *reply: sys.exit())  # the thread ends, not the process
    adapter.execute([TritonRequest(-1, [])])
    wait_until(lambda: not adapter.is_ready(), 10)


def test_a_model_that_cannot_load_says_why_in_one_sentence(own_repository):
    (own_repository / "user_encoder" / "1" / "model.onnx").unlink()
    args = {
        "model_config": json.dumps({}),
        "model_repository": str(own_repository / "user_encoder"),
        "model_version": "1",
    }
    with pytest.raises(FakeTriton.TritonModelException, match=r"model.onnx: cannot be read .*: export again"):
        start_model(FakeTriton(), args, UserEncoder)


def test_options_from_the_configuration():
    config = {
        "parameters": {"execution_provider": {"string_value": "cpu"}, "intra_op_threads": {"string_value": "3"}},
        "instance_group": [{"count": 2}, {"count": 1}],
    }
    assert read_options(config).session == SessionOptions(provider="cpu", threads=3, instances=3)
    assert read_options({}).session == SessionOptions()


@pytest.mark.parametrize(
    ("options", "width", "candidates", "threads"),
    [
        (SessionOptions(), 48, 40, 1),  # 24 MFLOP
        (SessionOptions(), 48, 128, 2),  # 67
        (SessionOptions(), 256, 100, 16),
        (SessionOptions(instances=3), 256, 100, 5),
        (SessionOptions(instances=1000), 256, 100, 1),
        (SessionOptions(threads=3), 48, 40, 3),
    ],
)
def test_threads_are_as_many_as_pay_and_no_more_than_there_are_cores(
    tiny_repository, monkeypatch, options, width, candidates, threads
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    manifest = msgspec.structs.replace(
        read_manifest(tiny_repository / "ranker_resident" / "1"),
        dims=Dims(layers=2, heads=4, width=width, candidate_tokens=4),
        workload=Workload(history=30, candidates=candidates),
    )
    assert options.count_threads(manifest) == threads
    full = msgspec.structs.replace(manifest, model="ranker_full")
    assert options.count_threads(full) >= threads


def test_cache_options_from_the_configuration():
    assert read_options({}).cache == CacheOptions(0, 0.0)
    entries = {"user_kv_cache_megabytes": {"string_value": "1.5"}, "user_kv_cache_seconds": {"string_value": "60"}}
    assert read_options({"parameters": entries}).cache == CacheOptions(1_500_000, 60.0)
    read_options({"parameters": {"FORCE_CPU_ONLY_INPUT_TENSORS": {"string_value": "no"}}})  # Triton's own


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("intra_op_threads", "many", "expected a number, 0 or more, got 'many'"),
        ("user_kv_cache_megabytes", "-1", "expected a number, 0 or more, got '-1'"),
        ("user_kv_cache_seconds", "nan", "expected a number, 0 or more, got 'nan'"),
        ("user_kv_cache_megabyte", "1", "expected one of execution_provider, intra_op_threads, user_kv"),
    ],
)
def test_options_that_cannot_be_used_are_named(name, value, words):
    with pytest.raises(ServerFaultError, match=f"parameter {name}: {words}"):
        read_options({"parameters": {name: {"string_value": value}}})


@pytest.mark.parametrize("provider", ["cuda", "tpu"])
def test_a_provider_that_cannot_be_had_is_refused(tiny_repository, provider):
    with pytest.raises(ArtefactError, match="execution_provider"):
        open_artefact(tiny_repository / "doc_fusion" / "1", "doc_fusion", SessionOptions(provider=provider))


def test_artefacts_that_do_not_belong_are_refused(own_repository):
    folder = own_repository / "doc_fusion" / "1"
    with pytest.raises(ArtefactError, match="expected the artefact of user_encoder, got that of doc_fusion"):
        open_artefact(folder, "user_encoder", SessionOptions())
    manifest = parse_manifest((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(manifest.to_json().replace(manifest.release, "cd" * 32))
    with pytest.raises(ArtefactError, match="expected release cdcdcdcdcdcd, as the manifest says"):
        open_artefact(folder, "doc_fusion", SessionOptions())


@pytest.mark.parametrize("secret", ["ab" * 16, "cd" * 16, "", "ab"])
def test_only_kv_with_this_servers_secret_is_not_scanned(tiny_repository, monkeypatch, secret):
    monkeypatch.setenv(KV_SECRET_VARIABLE, "ab" * 16)
    encoder = UserEncoder.open(tiny_repository / "user_encoder" / "1", SessionOptions())
    fusion = DocFusion.open(tiny_repository / "doc_fusion" / "1", SessionOptions())
    wanted = ["user_keys", "user_values", "kv_id", "kv_origin"]
    (kv,) = encoder.run([encoder.check(Request({"history": np.ones((1, 5, 2), np.int64)}, wanted))])
    assert bytes(kv["kv_origin"][0]).hex() == "ab" * 16
    kv["candidates"] = np.ones((1, 3, 4), np.int64)
    kv["user_values"] = np.full_like(kv["user_values"], np.nan)
    monkeypatch.setenv(KV_SECRET_VARIABLE, secret)
    if secret == "ab" * 16:
        with pytest.raises(InvalidRequestError, match="numbers so large that scores overflow"):
            fusion.run([fusion.check(Request(kv, ["scores"]))])
        for origin in (kv["kv_origin"] ^ 1, kv["kv_origin"] * 0, np.concatenate([kv["kv_origin"]] * 2) * [[1], [0]]):
            with pytest.raises(InvalidRequestError, match="user_values: expected finite numbers"):
                fusion.check(Request({**kv, "kv_origin": origin.astype(np.uint8)}, ["scores"]))
        del kv["kv_origin"]
    with pytest.raises(InvalidRequestError, match="user_values: expected finite numbers"):
        fusion.check(Request(kv, ["scores"]))


def test_a_caller_who_names_no_outputs_gets_no_proof_of_origin(tiny_repository, monkeypatch):
    monkeypatch.setenv(KV_SECRET_VARIABLE, "ab" * 16)
    encoder = UserEncoder.open(tiny_repository / "user_encoder" / "1", SessionOptions())
    wanted = [tensor.name for tensor in encoder.spec.outputs]
    (kv,) = encoder.run([encoder.check(Request({"history": np.ones((2, 5, 2), np.int64)}, wanted))])
    assert kv["kv_origin"].shape == (2, 16)
    assert not kv["kv_origin"].any()
