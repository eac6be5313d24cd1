"""Other people's clients (docs/clients.md): what they send and ask for, as it was seen of each, on the real server."""

import asyncio
import contextlib
import http.client
import json
import queue
import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from kvcast.protocol.config import load_config
from kvcast.protocol.manifest import MANIFEST_FILE
from kvcast.protocol.tensors import RANKER_RESIDENT
from kvcast.server import ServeConfig, TritonServer
from kvcast.synthetic import ClickLog
from tests.support import TOLERANCE, find_free_ports

REQUEST = ClickLog(load_config("tiny").schema, seed=5).draw_request(30, 6)
EMPTY = REQUEST.history[:0]
MANY = 1200
SERVICE = "inference.GRPCInferenceService"


def make_inputs(library: Any, history: np.ndarray, candidates: np.ndarray, **options: bool) -> list[Any]:
    """Return the inputs of tritonclient's `library` for one user."""
    inputs = []
    for name, array in (("history", history[None]), ("candidates", candidates[None])):
        inputs.append(library.InferInput(name, list(array.shape), "INT64"))
        inputs[-1].set_data_from_numpy(array, **options)
    return inputs


@pytest.fixture(scope="module")
def expected(server: TritonServer) -> dict[int, np.ndarray]:
    """Scores by full recomputation, by the number of events: of the user, and of one without history."""
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as client:
        return {
            len(history): client.infer(
                "ranker_full", make_inputs(tritonclient.grpc, history, REQUEST.candidates)
            ).as_numpy("scores")[0]
            for history in (REQUEST.history, EMPTY)
        }


def describe(name: str, array: np.ndarray, **fields: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1, *array.shape], "datatype": "INT64", **fields}


def write_kserve(*tensors: tuple[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    inputs = [describe(name, array, data=array.ravel().tolist()) for name, array in tensors]
    return json.dumps({"id": "a", "model_name": "ranker", "inputs": inputs}).encode(), {}


def write_kserve_binary(*tensors: tuple[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    """A tensor without elements has both: no data, and its size."""
    inputs = [
        describe(name, array, parameters={"binary_data_size": array.nbytes}) | ({} if array.size else {"data": None})
        for name, array in tensors
    ]
    header = json.dumps({"id": "a", "model_name": "ranker", "inputs": inputs}).encode()
    data = b"".join(array.tobytes() for _, array in tensors)
    return header + data, {"inference-header-content-length": str(len(header))}


def write_open_inference_openapi(*tensors: tuple[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    inputs = [describe(name, array, data=array.astype(float).ravel().tolist()) for name, array in tensors]
    return json.dumps({"id": "1", "inputs": inputs}).encode(), {"X-Fern-Language": "Python"}


def write_pydantic_open_inference(*tensors: tuple[str, np.ndarray]) -> tuple[bytes, dict[str, str]]:
    inputs = [describe(name, array, data=[array.tolist()]) for name, array in tensors]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "scores"}]}).encode(), {}


WRITERS = [write_kserve, write_kserve_binary, write_open_inference_openapi, write_pydantic_open_inference]


def post(address: str, body: bytes, headers: dict[str, str]) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("POST", "/v2/models/ranker/infer", body, headers)
    response = connection.getresponse()
    table = json.loads(response.read())
    connection.close()
    return response.status, table


@pytest.mark.parametrize("events", [30, 0])
@pytest.mark.parametrize("write", WRITERS)
def test_bodies_of_other_clients_get_the_right_scores(server, expected, write, events):
    body, headers = write(("history", REQUEST.history[:events]), ("candidates", REQUEST.candidates))
    status, table = post(server.http_address, body, headers)
    assert status == 200, table
    np.testing.assert_allclose(table["outputs"][0]["data"], expected[events], rtol=0, atol=TOLERANCE)


def test_half_an_item_is_refused_and_named(server):
    body, headers = write_open_inference_openapi(("history", REQUEST.history), ("candidates", REQUEST.candidates))
    first = float(REQUEST.history[0, 0])
    status, table = post(server.http_address, body.replace(f"{first}".encode(), f"{first + 0.5}".encode()), headers)
    assert (status, table["error"]) == (
        400, f"inputs[0].data: expected whole numbers for INT64, got float {first + 0.5} at element 0",
    )  # fmt: skip


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("is_binary", [True, False])
def test_tritonclients_asyncio_http_ranks_and_reads(server, expected, is_binary, compression):
    async def ask() -> None:
        async with tritonclient.http.aio.InferenceServerClient(server.http_address) as client:
            assert (await client.get_model_metadata("ranker"))["name"] == "ranker"
            assert (await client.get_model_config("ranker"))["max_batch_size"] > 0
            assert (await client.get_inference_statistics("ranker"))["model_stats"]
            index = await client.get_model_repository_index(headers=server.admin_headers)
            assert "ranker" in {each["name"] for each in index}
            result = await client.infer(
                "ranker",
                make_inputs(tritonclient.http, REQUEST.history, REQUEST.candidates, binary_data=is_binary),
                outputs=[tritonclient.http.InferRequestedOutput("scores", binary_data=is_binary)],
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
            )
            np.testing.assert_allclose(result.as_numpy("scores")[0], expected[30], rtol=0, atol=TOLERANCE)

    asyncio.run(ask())


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclients_asyncio_grpc_ranks_and_reads(server, expected, compression):
    async def ask() -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(server.grpc_address) as client:
            assert (await client.get_model_metadata("ranker")).name == "ranker"
            assert (await client.get_model_config("ranker")).config.max_batch_size > 0
            assert (await client.get_inference_statistics("ranker")).model_stats
            inputs = make_inputs(tritonclient.grpc, REQUEST.history, REQUEST.candidates)
            result = await client.infer("ranker", inputs, compression_algorithm=compression)
            np.testing.assert_allclose(result.as_numpy("scores")[0], expected[30], rtol=0, atol=TOLERANCE)

    asyncio.run(ask())


def test_tritonclients_callbacks_get_scores_and_its_streams_a_reason(server, expected):
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    inputs = make_inputs(tritonclient.grpc, REQUEST.history, REQUEST.candidates)
    with contextlib.closing(tritonclient.grpc.InferenceServerClient(server.grpc_address)) as client:
        client.async_infer("ranker", inputs, lambda result, error: answers.put((result, error)))
        result, error = answers.get(timeout=30)
        assert error is None
        np.testing.assert_allclose(result.as_numpy("scores")[0], expected[30], rtol=0, atol=TOLERANCE)
        client.start_stream(lambda result, error: answers.put((result, error)))
        with contextlib.suppress(tritonclient.grpc.InferenceServerException):  # if it knows by then
            client.async_stream_infer("ranker", inputs)
        _, error = answers.get(timeout=30)
        client.stop_stream()
        assert "ModelStreamInfer: this server does not offer it; send ModelInfer" in str(error)


def test_a_classification_is_the_ranking_of_more_candidates_than_a_thousand(own_repository):
    """Triton's extension: `score:place` from the best on, the score with six decimals."""
    manifest = own_repository / RANKER_RESIDENT.name / "1" / MANIFEST_FILE
    text = manifest.read_text()
    assert '"candidates": 64' in text
    manifest.write_text(text.replace('"candidates": 64', f'"candidates": {MANY}'))
    candidates = ClickLog(load_config("tiny").schema, seed=6).draw_candidates(MANY)
    http, grpc_port, metrics = find_free_ports(3)
    settings = ServeConfig(
        own_repository, [RANKER_RESIDENT.name], http_port=http, grpc_port=grpc_port, metrics_port=metrics
    )
    with TritonServer(settings) as running:
        for library, address in (
            (tritonclient.http, running.http_address),
            (tritonclient.grpc, running.grpc_address),
        ):
            with contextlib.closing(library.InferenceServerClient(address)) as client:
                inputs = make_inputs(library, REQUEST.history, candidates)
                (scores,) = client.infer(RANKER_RESIDENT.name, inputs).as_numpy("scores")
                for count in (10, MANY, 2 * MANY):
                    outputs = [library.InferRequestedOutput("scores", class_count=count)]
                    (ranked,) = client.infer(RANKER_RESIDENT.name, inputs, outputs=outputs).as_numpy("scores")
                    found = np.array([each.decode().split(":") for each in ranked])
                    places = found[:, 1].astype(int)
                    assert len(set(places)) == len(places) == min(count, MANY)
                    np.testing.assert_array_equal(scores[places], np.sort(scores)[::-1][: len(places)])
                    np.testing.assert_allclose(found[:, 0].astype(float), scores[places], rtol=0, atol=1e-6)


def test_what_reflection_describes_ranks_a_user_without_history(server, expected):
    """As grpcurl, grpc-requests and @grpc/proto-loader make messages; contents without elements are left out."""
    with grpc.insecure_channel(server.grpc_address) as channel:
        service = DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(SERVICE)
        method = service.methods_by_name["ModelInfer"]
        ask, answer = (message_factory.GetMessageClass(each) for each in (method.input_type, method.output_type))
        for history in (REQUEST.history, EMPTY):
            message = ask(model_name="ranker")
            for name, array in (("history", history), ("candidates", REQUEST.candidates)):
                tensor = message.inputs.add(name=name, datatype="INT64", shape=[1, *array.shape])
                if array.size:
                    tensor.contents.int64_contents.extend(array.ravel().tolist())
            infer = channel.unary_unary(f"/{SERVICE}/ModelInfer", ask.SerializeToString, answer.FromString)
            scores = np.frombuffer(infer(message, timeout=30).raw_output_contents[0], np.float32)
            np.testing.assert_allclose(scores, expected[len(history)], rtol=0, atol=TOLERANCE)


BESIDE = """\
import json, sys
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="grpc_predict_v2.proto", package="inference")
file.message_type.add(name="ServerLiveRequest")
descriptor_pool.Default().Add(file)
from kvcast.client import RankerClient
http, grpc, history, candidates = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
try:
    RankerClient(grpc, protocol="grpc").rank(history, candidates)
except ImportError as error:
    print(json.dumps(str(error)))
with RankerClient(http, protocol="http") as client:
    print(json.dumps(client.rank(history, candidates).scores.tolist()))
"""


def test_our_client_works_over_http_beside_another_package_with_the_same_messages(server, expected, tmp_path):
    """In kserve they come from a file of its own, and protobuf takes one of the two."""
    arguments = [json.dumps(each.tolist()) for each in (REQUEST.history, REQUEST.candidates)]
    command = [sys.executable, "-c", BESIDE, server.http_address, server.grpc_address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    error, scores = map(json.loads, done.stdout.splitlines())
    assert "use protocol='http', or a process of its own" in error
    np.testing.assert_allclose(scores, expected[30], rtol=0, atol=TOLERANCE)
