"""`user_encoder` on Triton's own onnxruntime backend: its configuration fits its graph, and the scores are the same.

The wheel's Triton lacks that backend. A Python model stands in for it that does what the backend does, and no more: it
runs the graph with the inputs and outputs of `config.pbtxt`. Where `KVCAST_ONNXRUNTIME_BACKEND` names a folder with the
real one (`libtriton_onnxruntime.so` and ONNX Runtime), that serves instead, and is asked what it refuses as well.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import tritonclient.grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from kvcast.client import RankerClient
from kvcast.contract.errors import ArtefactError, InvalidRequestError
from kvcast.contract.golden import read_golden
from kvcast.contract.manifest import ONNX_FILE, Manifest, parse_manifest
from kvcast.contract.report import CacheResult, Report
from kvcast.contract.tensors import (
    CANDIDATES,
    DOC_FUSION,
    ENCODE_REPORT,
    HISTORY,
    MANIFEST,
    RANKER,
    RELEASE,
    SCORE_TOLERANCE,
    SCORES,
    USER_ENCODER,
    USER_KEYS,
    USER_VALUES,
)
from kvcast.deploy.__main__ import main
from kvcast.deploy.native_backend import (
    NativeOptions,
    check_config,
    check_native_repository,
    make_config,
    parse_config,
    write_native_repository,
)
from kvcast.deploy.native_graph import list_inputs, list_outputs, read_graph
from kvcast.runtime import DocFusion, UserEncoder
from kvcast.runtime.artefact import SessionOptions
from kvcast.runtime.model import Request
from kvcast.server import ServerError, ServerSettings, TritonServer
from kvcast.server.view import CONFIG_FILE
from tests.support import find_free_ports

REAL_BACKEND = os.environ.get("KVCAST_ONNXRUNTIME_BACKEND")
ORT_TYPES = {"tensor(int64)": "INT64", "tensor(float)": "FP32", "tensor(uint8)": "UINT8", "tensor(string)": "STRING"}
STAND_IN = """\
import json, os
import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = os.path.join(args["model_repository"], args["model_version"])
        self.session = ort.InferenceSession(os.path.join(folder, "model.onnx"), providers=["CPUExecutionProvider"])
        self.inputs, self.outputs = ([each["name"] for each in config[side]] for side in ("input", "output"))

    def execute(self, requests):
        replies = []
        for request in requests:
            feeds = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            arrays = dict(zip(self.outputs, self.session.run(self.outputs, feeds)))
            wanted = {name: arrays[name] for name in request.requested_output_names()}
            for name, array in wanted.items():
                if array.dtype == np.object_:
                    wanted[name] = np.array([text.encode() for text in array.flat], np.object_).reshape(array.shape)
            tensors = [pb_utils.Tensor(name, array) for name, array in wanted.items()]
            replies.append(pb_utils.InferenceResponse(tensors))
        return replies
"""
Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module")
def native(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository for the native backend, written by the command."""
    out = tmp_path_factory.mktemp("native") / "repository"
    assert main(["native", "--repository", str(tiny_repository), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def graph(native: Path) -> ort.InferenceSession:
    """The graph that the backend runs."""
    return ort.InferenceSession(native / USER_ENCODER.name / "1" / ONNX_FILE, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def encoder(tiny_repository: Path) -> UserEncoder:
    """What the Python backend runs."""
    return UserEncoder.open(tiny_repository / USER_ENCODER.name / "1", SessionOptions(provider="cpu"))


@pytest.fixture(scope="module")
def fusion(native: Path) -> DocFusion:
    """The next model, as it was copied."""
    return DocFusion.open(native / DOC_FUSION.name / "1", SessionOptions(provider="cpu"))


@pytest.fixture
def edited(native: Path, tmp_path: Path) -> Path:
    """A copy, for a test that damages it."""
    return Path(shutil.copytree(native, tmp_path / "edited"))


def read_config(repository: Path) -> Any:
    path = repository / USER_ENCODER.name / CONFIG_FILE
    return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())


def draw(manifest: Manifest, users: int, length: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return histories without padding."""
    generator = np.random.default_rng(seed)
    columns = [generator.integers(1, field.vocab_size, (users, length)) for field in manifest.history_fields]
    return np.stack(columns, axis=2)


def run_graph(graph: ort.InferenceSession, history: npt.NDArray[np.int64]) -> Arrays:
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(names, {HISTORY.name: history}), strict=True))


def run_python(encoder: UserEncoder, history: npt.NDArray[np.int64]) -> Arrays:
    wanted = [USER_KEYS.name, USER_VALUES.name, RELEASE.name]
    return encoder.run([encoder.check(Request({HISTORY.name: history}, wanted))])[0]


def fuse(fusion: DocFusion, user_kv: Arrays, candidates: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    tensors = {name: user_kv[name] for name in (USER_KEYS.name, USER_VALUES.name, RELEASE.name)}
    job = fusion.check(Request({**tensors, CANDIDATES.name: candidates}, [SCORES.name]))
    return fusion.score([job])[0]


# -- the configuration


def test_the_configuration_is_what_onnx_runtime_says_of_the_graph(native, graph):
    config = read_config(native)
    for configured, in_graph in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
        assert [
            (each.name, model_config_pb2.DataType.Name(each.data_type), list(each.dims)) for each in configured
        ] == [
            (each.name, f"TYPE_{ORT_TYPES[each.type]}", [dim if isinstance(dim, int) else -1 for dim in each.shape[1:]])
            for each in in_graph
        ]
        assert all(isinstance(each.shape[0], str) for each in in_graph)  # users: any number
    assert [each.name for each in config.output] == [each.name for each in USER_ENCODER.outputs]


def test_the_other_models_are_copied_as_they_are(tiny_repository, native):
    for path in (Path(RANKER.name) / CONFIG_FILE, Path(DOC_FUSION.name) / CONFIG_FILE):
        assert (native / path).read_bytes() == (tiny_repository / path).read_bytes()
    for path in (tiny_repository / DOC_FUSION.name / "1").glob("*.*"):
        assert (native / DOC_FUSION.name / "1" / path.name).read_bytes() == path.read_bytes()
    assert (native / RANKER.name / "1").is_dir()


# What is replaced, by what, and what the refusal names. Held against the real backend too, where there is one.
TAMPERED = {
    "another name of an output": ('"user_keys"', '"user_key"', "user_keys"),
    "another dtype of an output": ("TYPE_UINT8", "TYPE_INT8", "release"),
    "another dtype of an input": ("TYPE_INT64", "TYPE_INT32", "history"),
    "any size where the graph has one": ("[ 3, 2, 18, -1 ]", "[ -1, -1, -1, -1 ]", "user_keys"),
    "one size where the graph has any": ("[ 3, 2, 18, -1 ]", "[ 3, 2, 18, 41 ]", "user_keys"),
    "an axis too few": ("[ 3, 2, -1, 17 ]", "[ 3, 2, -1 ]", "user_values"),
    "an axis too many in an input": ("[ -1, -1 ]", "[ -1, -1, -1 ]", "history"),
    "an output that the graph has not": ("output [", 'output [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] },', "x"),
    "an input that the graph has not": ("input [", 'input [ { name: "x" data_type: TYPE_FP32 dims: [ 1 ] },', "x"),
    "an optional input": ("dims: [ -1, -1 ] }", "dims: [ -1, -1 ] optional: true }", "history"),
    "a ragged input": ("dims: [ -1, -1 ] }", "dims: [ -1, -1 ] allow_ragged_batch: true }", "history"),
}


def tamper(repository: Path, old: str, new: str) -> None:
    path = repository / USER_ENCODER.name / CONFIG_FILE
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("case", TAMPERED)
def test_a_configuration_that_the_backend_would_refuse_is_refused(edited, case):
    old, new, tensor = TAMPERED[case]
    tamper(edited, old, new)
    with pytest.raises(ArtefactError, match=rf"user_encoder: .*\b{tensor}\b.*(expected|got)"):
        check_native_repository(edited)


@pytest.mark.skipif(REAL_BACKEND is None, reason="KVCAST_ONNXRUNTIME_BACKEND is not set")
@pytest.mark.parametrize("case", TAMPERED)
def test_the_real_backend_refuses_it_too(edited, case):
    tamper(edited, *TAMPERED[case][:2])
    with pytest.raises(ServerError), TritonServer(install_backend(edited)):
        pass


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('  { name: "release" data_type: TYPE_UINT8 dims: [ 32 ] },\n', "", "output release"),  # fusion needs it
        ('  { name: "history" data_type: TYPE_INT64 dims: [ -1, -1 ] }\n', "", "input history"),
        ("max_batch_size: 8", "max_batch_size: 4", "max_batch_size 8, as ranker has, got 4"),
        ('backend: "onnxruntime"', 'backend: "python"', 'backend "onnxruntime", got "python"'),
        ("output [", "outputs [", "not a model configuration"),
    ],
)
def test_a_configuration_that_does_not_serve_the_other_models_is_refused(edited, old, new, words):
    tamper(edited, old, new)
    with pytest.raises(ArtefactError, match=words):
        check_native_repository(edited)


def test_a_graph_that_does_not_batch_users_is_refused(native):
    model = read_graph(native / USER_ENCODER.name / "1" / ONNX_FILE)
    model.graph.output[2].type.tensor_type.shape.dim[0].dim_value = 1
    with pytest.raises(ArtefactError, match="output release"):
        check_config(read_config(native), list_inputs(model), list_outputs(model))


def test_a_graph_with_an_input_that_nobody_feeds_is_refused(native):
    model = read_graph(native / USER_ENCODER.name / "1" / ONNX_FILE)
    model.graph.input.add().CopyFrom(model.graph.input[0])
    model.graph.input[1].name = "mask"
    with pytest.raises(ArtefactError, match="expected input mask"):
        check_config(read_config(native), list_inputs(model), list_outputs(model))


def test_on_a_gpu_it_computes_in_full_fp32(native):
    model = read_graph(native / USER_ENCODER.name / "1" / ONNX_FILE)
    inputs, outputs = list_inputs(model), list_outputs(model)
    config = parse_config(make_config(inputs, outputs, NativeOptions("gpu", threads=3, instances=2)), Path("config"))
    check_config(config, inputs, outputs)
    group = model_config_pb2.ModelInstanceGroup
    assert [(each.kind, each.count) for each in config.instance_group] == [(group.KIND_GPU, 2)]
    (accelerator,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})
    assert config.parameters["intra_op_thread_count"].string_value == "3"


# -- the graph


@pytest.mark.parametrize("length", [1, 3, 40, 96])
def test_kv_is_that_of_the_python_backend_bit_by_bit(graph, encoder, length):
    history = draw(encoder.artefact.manifest, 1, length)
    expect_same_kv(graph, encoder, history)


def test_an_empty_history_and_padding_are_as_in_the_python_backend(graph, encoder):
    history = draw(encoder.artefact.manifest, 1, 12)
    history[:, [0, 4, 5, 11]] = 0
    history[:, 7, 1] = 0  # unknown in one field is not padding
    for each in (history, np.zeros((1, 0, 2), np.int64), np.zeros((1, 5, 2), np.int64)):
        expect_same_kv(graph, encoder, each)


def expect_same_kv(graph: ort.InferenceSession, encoder: UserEncoder, history: npt.NDArray[np.int64]) -> None:
    got, expected = run_graph(graph, history), run_python(encoder, history)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def test_users_of_different_lengths_in_one_request_get_their_scores(graph, encoder, fusion, tiny_repository):
    history = draw(encoder.artefact.manifest, 3, 30)
    history[1, 4:] = 0
    history[2] = 0
    candidates = read_golden(tiny_repository / DOC_FUSION.name / "1").candidates[None].repeat(3, axis=0)
    got = fuse(fusion, run_graph(graph, history), candidates)
    expected = fuse(fusion, run_python(encoder, history), candidates)
    np.testing.assert_allclose(got, expected, rtol=0, atol=SCORE_TOLERANCE)


def spoil(history: npt.NDArray[np.int64], column: int, value: int) -> npt.NDArray[np.int64]:
    spoilt = history.copy()
    spoilt[0, 2, column] = value
    return spoilt


def list_wrong_histories(manifest: Manifest) -> dict[str, npt.NDArray[np.int64]]:
    """Return what a caller can get wrong; user 0 does."""
    good, (item, action) = draw(manifest, 2, 5), manifest.history_fields
    return {
        "a negative id": spoil(good, 0, -1),
        "an id beyond the first vocabulary": spoil(good, 0, item.vocab_size),
        "an id beyond the second vocabulary": spoil(good, 1, action.vocab_size),
        "the largest id": spoil(good, 1, np.iinfo(np.int64).max),
        "the smallest id": spoil(good, 0, np.iinfo(np.int64).min),
        "an event too many": draw(manifest, 2, manifest.limits.history + 1),
        "an event of padding too many": np.zeros((2, manifest.limits.history + 1, 2), np.int64),
        "a field too few": good[:, :, :1],
        "a field too many": np.concatenate([good, good[:, :, :1]], axis=2),
        "no field": good[:, :, :0],
    }


def test_a_wrong_history_gets_no_release_and_so_no_score(graph, encoder, fusion, tiny_repository):
    manifest = encoder.artefact.manifest
    candidates = read_golden(tiny_repository / DOC_FUSION.name / "1").candidates[None].repeat(2, axis=0)
    for what, history in list_wrong_histories(manifest).items():
        with pytest.raises(InvalidRequestError):
            run_python(encoder, history)
        reply = run_graph(graph, history)
        assert not reply[RELEASE.name][0].any(), what
        with pytest.raises(InvalidRequestError):
            fuse(fusion, reply, candidates)


def test_the_other_user_of_a_request_keeps_the_release(graph, encoder):
    manifest = encoder.artefact.manifest
    history = list_wrong_histories(manifest)["a negative id"]
    reply = run_graph(graph, history)
    assert bytes(reply[RELEASE.name][1]).hex() == manifest.release
    alone = run_graph(graph, history[1:])
    np.testing.assert_allclose(reply[USER_KEYS.name][1], alone[USER_KEYS.name][0], rtol=0, atol=SCORE_TOLERANCE)


def test_clients_get_manifest_and_report_whatever_the_history(graph, encoder):
    reply = run_graph(graph, np.zeros((3, 1, 1), np.int64))  # what a client sends that asks for the manifest
    assert reply[MANIFEST.name].shape == reply[ENCODE_REPORT.name].shape == (3, 1)
    assert parse_manifest(reply[MANIFEST.name][2, 0]) == encoder.artefact.manifest
    assert Report.merge(reply[ENCODE_REPORT.name][0, 0]) == Report(CacheResult.OFF)


# -- the command


def test_what_is_there_is_not_overwritten(tiny_repository, native):
    with pytest.raises(ServerError, match="is there already"):
        write_native_repository(tiny_repository, native, NativeOptions())


def test_a_damaged_export_is_refused_and_nothing_is_left(own_repository, tmp_path):
    out = tmp_path / "native"
    with (own_repository / USER_ENCODER.name / "1" / ONNX_FILE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ArtefactError, match="not the file that its manifest describes"):
        write_native_repository(own_repository, out, NativeOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_a_native_repository_is_not_taken_for_an_export(native, tmp_path):
    with pytest.raises(ArtefactError, match=r"expected the one input history INT64 \[-1, -1, 2\]"):
        write_native_repository(native, tmp_path / "again", NativeOptions())


def test_the_command_checks_what_an_operator_has_edited(native, edited, tmp_path):
    command = [sys.executable, "-m", "kvcast", "deploy", "native", "--check", "--out"]
    fine = subprocess.run([*command, str(native)], capture_output=True, text=True, check=False)
    assert (fine.returncode, fine.stderr) == (0, "")
    assert "config.pbtxt fits" in fine.stdout
    tamper(edited, "TYPE_UINT8", "TYPE_INT8")
    refused = subprocess.run([*command, str(edited)], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    message = "user_encoder: output release: expected TYPE_UINT8, as model.onnx has, got TYPE_INT8"
    assert refused.stderr == f"kvcast deploy: {message}\n"


# -- served


def install_backend(repository: Path) -> ServerSettings:
    """Put the real backend, or what stands in for it, into the encoder's folder; return how to serve it."""
    folder = repository / USER_ENCODER.name / "1"
    if REAL_BACKEND is None:
        (folder / "model.py").write_text(STAND_IN)
        tamper(repository, 'backend: "onnxruntime"', 'backend: "python"')
    else:
        for path in Path(REAL_BACKEND).glob("*.so*"):  # Triton looks beside the model first
            shutil.copyfile(path, folder / path.name)
    http, grpc, metrics = find_free_ports(3)
    return ServerSettings(repository, [RANKER.name], http_port=http, grpc_port=grpc, metrics_port=metrics)


@pytest.fixture(scope="module")
def native_server(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A tritonserver on it, started as `kvcast serve` does: with guard, supervisor and golden request."""
    repository = Path(shutil.copytree(native, tmp_path_factory.mktemp("served") / "repository"))
    with TritonServer(install_backend(repository)) as running:
        yield running


def test_callers_get_the_scores_of_the_python_backend(server, native_server, tiny_repository):
    golden = read_golden(tiny_repository / USER_ENCODER.name / "1")
    with RankerClient(server.grpc_address) as usual, RankerClient(native_server.grpc_address) as client:
        manifest = usual.get_manifest()
        assert client.get_manifest() == manifest
        for history in (golden.history, golden.history[:0], draw(manifest, 1, manifest.limits.history)[0]):
            got, expected = client.rank(history, golden.candidates), usual.rank(history, golden.candidates)
            np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=SCORE_TOLERANCE)
        assert client.rank(golden.history, golden.candidates, report=True).report.cache == CacheResult.OFF
        assert client.prefetch(golden.history).cache == CacheResult.OFF


def test_callers_who_check_nothing_get_an_error_and_no_score(native_server, tiny_repository, encoder):
    candidates = read_golden(tiny_repository / DOC_FUSION.name / "1").candidates[None].repeat(2, axis=0)
    client = tritonclient.grpc.InferenceServerClient(native_server.grpc_address)
    for what, history in list_wrong_histories(encoder.artefact.manifest).items():
        inputs = []
        for name, array in ((HISTORY.name, history), (CANDIDATES.name, candidates)):
            inputs.append(tritonclient.grpc.InferInput(name, list(array.shape), "INT64"))
            inputs[-1].set_data_from_numpy(np.ascontiguousarray(array))
        with pytest.raises(InferenceServerException) as caught:
            client.infer(RANKER.name, inputs)
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT", what
    client.close()
