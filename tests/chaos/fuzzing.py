"""Hostile requests from one seed: valid ones with something changed, and bytes that were never valid.

A case sends itself and returns an outcome; `find_fault` names outcomes that are faults of the server. Everything
goes past the client library: raw HTTP, raw sockets, and gRPC with the bytes as they are.
"""

import contextlib
import copy
import gzip
import http.client
import json
import random
import re
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2

from kvcast.protocol.config import load_config
from kvcast.synthetic import ClickLog

SERVICE = "/inference.GRPCInferenceService/"
REPLY_SECONDS = 30.0
SOCKET_SECONDS = 0.2
# Texts of this kind in a reply show the inside of the server.
REVEALING = re.compile(rb"Traceback|File \"|/tmp/|/home|\.py\b|site-packages|/dev/shm")
ALLOWED_GRPC = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNAVAILABLE", "ALREADY_EXISTS", "RESOURCE_EXHAUSTED"}
OVERLOADS = re.compile(
    r"(?i)too many|exceeds maximum queue size|timeout expired|try again|waiting|deadline|restricted|shared memory pool"
)

# Around the limits of `tiny`. Axes are these, so that what is refused for its shape would harm no server behind it.
HOSTILE_NUMBERS = [0, 1, -1, 2, 3, 7, 8, 9, 64, 65, 96, 97]
LARGE_NUMBERS = [1 << 16, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 32, (1 << 63) - 1, -(1 << 63)]
HOSTILE_TEXTS = [
    "",
    " ",
    "x",
    "é",
    "\0",
    "a\0b",
    "history",
    "candidates",
    "%s%n%x",
    "../../etc",
    "x" * 300,
    '"',
    "\\",
    "{}",
]
HOSTILE_TEXTS += ["\n", "INT64", "FP32", "BYTES", "nan", "-1", "1e400", "TYPE_INT64", "\u202e", "x" * 70_000]
HOSTILE_JSON: list[Any] = [None, True, False, [], {}, [[]], [None], {"a": None}, 1.5, -0.0, float("nan")]
HOSTILE_JSON += [float("inf"), [[[[[1]]]]], *HOSTILE_NUMBERS, *HOSTILE_TEXTS]
DATATYPES = ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"]
DATATYPES += ["BYTES", "BF16", "", "int64", "TYPE_INT64", "INT128"]
PARAMETER_NAMES = [
    "kvcast_report",
    "kvcast_prefetch",
    "kvcast_typo",
    "timeout",
    "priority",
    "sequence_id",
    "sequence_start",
]
PARAMETER_NAMES += [
    "sequence_end",
    "binary_data_output",
    "triton_enable_empty_final_response",
    "triton_x",
    "x",
    "",
    "é\0",
]
PARAMETER_NAMES += ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification"]
PARAMETER_NAMES += ["binary_data", "binary_data_size", '"', "x" * 2000]
MODEL_NAMES = ["ranker", "ranker_resident", "user_encoder", "doc_fusion", "ranker_full"]


@dataclass(frozen=True)
class Outcome:
    """What came back: `kind` names the case, `status` is HTTP's number or gRPC's name, "closed" for no answer."""

    kind: str
    status: str
    message: bytes
    request: str
    known_method: bool = True


def find_fault(outcome: Outcome) -> str | None:
    """Return what is wrong with an outcome, or None."""
    if REVEALING.search(outcome.message):
        return "it shows the inside of the server"
    allowed = (
        is_allowed_over_http(outcome) if outcome.kind.startswith(("http", "socket")) else is_allowed_over_grpc(outcome)
    )
    return None if allowed else "a fault of the server, by its status"


def is_allowed_over_http(outcome: Outcome) -> bool:
    """Whether the status is no fault: anything but 5xx, and 503 or 504 of a server that is busy or away."""
    if outcome.status == "closed":
        return outcome.kind == "socket"
    status = int(outcome.status)
    return status < 500 or (status in (503, 504) and bool(OVERLOADS.search(outcome.message.decode(errors="replace"))))


def is_allowed_over_grpc(outcome: Outcome) -> bool:
    """Whether a caller may get this: what is wrong with the request, or that the server is busy or away."""
    if not outcome.known_method:
        return outcome.status == "UNIMPLEMENTED"
    if outcome.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
        return bool(OVERLOADS.search(outcome.message.decode(errors="replace")))
    return outcome.status in ALLOWED_GRPC


@dataclass
class Requests:
    """Valid requests to start from: the tensors of each model."""

    tensors: dict[str, dict[str, tuple[str, np.ndarray]]] = field(default_factory=dict)

    @classmethod
    def prepare(cls, grpc_address: str) -> "Requests":
        """Draw small valid requests; user KV for `doc_fusion` comes from the server itself."""
        drawn = ClickLog(load_config("tiny").schema, seed=3).draw_request(6, 3)
        history, candidates = ("INT64", drawn.history[None]), ("INT64", drawn.candidates[None])
        both = {"history": history, "candidates": candidates}
        tensors = dict.fromkeys(("ranker", "ranker_resident", "ranker_full"), both)
        tensors["user_encoder"] = {"history": history}
        with grpc.insecure_channel(grpc_address) as channel:
            request = make_infer_request("user_encoder", tensors["user_encoder"])
            reply = service_pb2.ModelInferResponse.FromString(call(channel, "ModelInfer", request.SerializeToString()))
        encoded = {
            output.name: (output.datatype, as_array(raw, output.datatype, output.shape))
            for output, raw in zip(reply.outputs, reply.raw_output_contents, strict=True)
            if output.name in ("user_keys", "user_values", "kv_id")
        }
        tensors["doc_fusion"] = {**encoded, "candidates": candidates}
        return cls(tensors)


def as_array(raw: bytes, datatype: str, shape: Any) -> np.ndarray:
    """Return raw bytes of Triton's as an array."""
    return np.frombuffer(raw, {"FP32": np.float32, "UINT8": np.uint8}[datatype]).reshape(list(shape))


def make_infer_request(model: str, tensors: dict[str, tuple[str, np.ndarray]]) -> Any:
    """Return a valid request."""
    request = service_pb2.ModelInferRequest(model_name=model)
    for name, (datatype, array) in tensors.items():
        request.inputs.add(name=name, datatype=datatype, shape=list(array.shape))
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return request


def call(channel: grpc.Channel, method: str, message: bytes, timeout: float = REPLY_SECONDS) -> bytes:
    """Send bytes as a message, and return the bytes of the reply."""
    reply: bytes = channel.unary_unary(SERVICE + method)(message, timeout=timeout)
    return reply


# --- what is hostile, over any protocol ---


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change, drop, repeat or add some bytes."""
    damaged = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(damaged) + 1)
        length = min(draw.choice([1, 1, 2, 8, 64]), len(damaged) - place)
        action = draw.randrange(4)
        if action == 0:
            damaged[place : place + length] = draw.randbytes(length)
        elif action == 1:
            del damaged[place : place + length]
        elif action == 2:
            damaged[place:place] = damaged[place : place + length]
        else:
            damaged[place:place] = draw.randbytes(draw.choice([1, 2, 8, 64]))
    return bytes(damaged)


def hostile_array(array: np.ndarray, draw: random.Random) -> np.ndarray:
    """Return an array with hostile elements or axes."""
    array = array.copy()
    action = draw.randrange(4)
    if action == 0 and array.size:
        flat = array.reshape(-1)
        for _ in range(draw.choice([1, 3, flat.size])):
            flat[draw.randrange(flat.size)] = hostile_element(array.dtype, draw)
    elif action == 1:
        array = np.repeat(array, draw.choice([0, 2, 8, 9]), axis=draw.randrange(array.ndim))
    elif action == 2:
        array = array.reshape(draw.choice([(-1,), (1, *array.shape), (*array.shape, 1)]))
    elif array.size:
        generator = np.random.default_rng(draw.getrandbits(32))
        array = np.frombuffer(generator.bytes(array.nbytes), array.dtype).reshape(array.shape)
    return array


def hostile_element(dtype: np.dtype, draw: random.Random) -> Any:
    """Return one number that a tensor of this type can hold and a model may not like."""
    if dtype == np.float32:
        return draw.choice([np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0, 1e20])
    info = np.iinfo(dtype)
    return draw.choice([info.min, info.max, 0, max(-1, info.min), min(500, info.max), 1])


# --- HTTP ---


@dataclass(frozen=True)
class HttpCase:
    """A request in the parts that http.client takes."""

    kind: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def send(self, address: str, connection: http.client.HTTPConnection) -> Outcome:
        """Send it over a connection that is kept."""
        try:
            connection.request(self.method, self.path, body=self.body, headers=self.headers)
            response = connection.getresponse()
            status, message = str(response.status), response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            status, message = "closed", repr(error).encode()
        described = f"{self.method} {self.path} {self.headers} {self.body[:300]!r}"
        return Outcome(self.kind, status, message if status == "closed" or int(status) >= 400 else b"", described)


@dataclass(frozen=True)
class SocketCase:
    """Bytes that are not quite HTTP."""

    kind: str
    data: bytes

    def send(self, address: str, connection: http.client.HTTPConnection) -> Outcome:
        """Send it, and read what comes: no answer is an answer, where the request may still go on."""
        host, port = address.split(":")
        received = b""
        place = (host, int(port))
        # It may wait for more, or have closed already.
        with contextlib.suppress(OSError), socket.create_connection(place, timeout=SOCKET_SECONDS) as own:
            own.sendall(self.data)
            while chunk := own.recv(65536):
                received += chunk
        status = re.match(rb"HTTP/1\.\d (\d{3})", received)
        return Outcome(self.kind, status[1].decode() if status else "closed", received, repr(self.data[:300]))


class HttpFuzzer:
    """Makes HTTP cases."""

    def __init__(self, requests: Requests, draw: random.Random) -> None:
        self._requests, self._draw = requests, draw
        self._makers: list[tuple[int, Callable[[], HttpCase | SocketCase]]] = [
            (30, self._mutated_json),
            (10, self._damaged_json),
            (20, self._mutated_binary),
            (5, self._random_body),
            (4, self._deep),
            (6, self._encoded),
            (10, self._other_place),
            (5, self._admin),
            (10, self._broken_http),
        ]

    def make(self) -> HttpCase | SocketCase:
        """Return one case."""
        weights, makers = zip(*self._makers, strict=True)
        return self._draw.choices(makers, weights)[0]()

    def _path(self) -> str:
        model = self._draw.choice([*MODEL_NAMES, "ranker", "ranker"])
        return f"/v2/models/{model}/infer" if self._draw.random() < 0.9 else f"/v2/models/{model}/versions/1/infer"

    def _table(self, path: str) -> dict[str, Any]:
        tensors = self._requests.tensors[path.split("/")[3]]
        return {
            "inputs": [
                {"name": name, "shape": list(array.shape), "datatype": datatype, "data": array.ravel().tolist()}
                for name, (datatype, array) in tensors.items()
            ]
        }

    def _mutated_json(self) -> HttpCase:
        path = self._path()
        table: Any = self._table(path)
        for _ in range(self._draw.randint(1, 3)):
            table = self._mutate(table)
        return HttpCase("http json", "POST", path, {}, json.dumps(table).encode())

    def _mutate(self, table: Any) -> Any:
        """Change one place of a JSON value, or add what only sometimes is there."""
        draw = self._draw
        table = copy.deepcopy(table)
        if isinstance(table, dict) and draw.random() < 0.3:
            table[draw.choice(["parameters", "outputs", "id"])] = self._extra()
            return table
        spots = list(walk(table))
        if not spots:
            return draw.choice(HOSTILE_JSON)
        container, key = draw.choice(spots)
        if draw.random() < 0.15:
            del container[key]
        elif key == "datatype":
            container[key] = draw.choice(DATATYPES)
        elif key == "shape" or draw.random() < 0.1:
            container[key] = [draw.choice(HOSTILE_NUMBERS) for _ in range(draw.randint(0, 5))]
        else:
            container[key] = draw.choice(HOSTILE_JSON)
        return table

    def _extra(self) -> Any:
        draw = self._draw
        parameters = {draw.choice(PARAMETER_NAMES): draw.choice(HOSTILE_JSON) for _ in range(draw.randint(0, 3))}
        output = {"name": draw.choice(["scores", "fuse_report", *HOSTILE_TEXTS]), "parameters": parameters}
        return draw.choice([parameters, parameters, [output], [output, output], draw.choice(HOSTILE_JSON)])

    def _damaged_json(self) -> HttpCase:
        path = self._path()
        body = damage_bytes(json.dumps(self._table(path)).encode(), self._draw)
        return HttpCase("http damaged json", "POST", path, {}, body)

    def _mutated_binary(self) -> HttpCase:
        draw, path = self._draw, self._path()
        table, binary = self._table(path), b""
        for entry in table["inputs"]:
            datatype, array = self._requests.tensors[path.split("/")[3]][entry["name"]]
            if draw.random() < 0.3:
                array = hostile_array(array, draw)
            raw = np.ascontiguousarray(array).tobytes()
            size: Any = draw.choice(HOSTILE_JSON) if draw.random() < 0.1 else len(raw)
            entry.pop("data")
            entry.update(shape=list(array.shape), datatype=datatype, parameters={"binary_data_size": size})
            binary += raw
        if draw.random() < 0.3:
            table = self._mutate(table)
        header = json.dumps(table).encode()
        if draw.random() < 0.2:
            binary = damage_bytes(binary, draw)
        length = str(len(header))
        if draw.random() < 0.2:
            length = draw.choice(["0", "-1", "1", "x", "", "99999999999999999999", "1.5", str(len(header) + 1), "0x10"])
        return HttpCase("http binary", "POST", path, {"Inference-Header-Content-Length": length}, header + binary)

    def _random_body(self) -> HttpCase:
        return HttpCase(
            "http random bytes", "POST", self._path(), {}, self._draw.randbytes(self._draw.choice([0, 1, 100, 5000]))
        )

    def _deep(self) -> HttpCase:
        depth = self._draw.choice([100, 500, 900, 1100])
        opening, closing = self._draw.choice([("[", "]"), ('{"a":', "}"), ('{"inputs":[', "]}")])
        core = self._draw.choice(["1", "", "null"])
        body = opening * depth + core + closing * self._draw.choice([depth, 0])
        if self._draw.random() < 0.5:
            body = '{"inputs":[{"name":"history","shape":[1],"datatype":"INT64","data":' + body + "}]}"
        return HttpCase("http depth", "POST", self._path(), {}, body.encode())

    def _encoded(self) -> HttpCase:
        draw, path = self._draw, self._path()
        body = json.dumps(self._table(path)).encode()
        encoding = draw.choice(["gzip", "deflate", "br", "zstd", "identity", "x", "gzip, gzip", ""])
        packed = draw.choice([gzip.compress, zlib.compress, lambda data: data])(body)
        if draw.random() < 0.3:
            packed = damage_bytes(packed, draw)
        if draw.random() < 0.05:
            encoding, packed = "gzip", gzip.compress(bytes(100 << 20), compresslevel=1)
        return HttpCase("http encoded", "POST", path, {"Content-Encoding": encoding}, packed)

    def _other_place(self) -> HttpCase:
        draw = self._draw
        method = draw.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "FOO"])
        model = draw.choice([*MODEL_NAMES, "x", "..", "%2e%2e", "%00", "x" * 5000, "a%20b", "*"])
        path = draw.choice(
            [
                f"/v2/models/{model}/infer",
                f"/v2/models/{model}/versions/{draw.choice(['0', '-1', '99', 'x', '9' * 30])}/infer",
                f"/v2/models/{model}/generate",
                f"/v2/models/{model}/generate_stream",
                f"/v2/models/{model}",
                f"/v2/models/{model}/config",
                f"/v2/models/{model}/stats",
                f"/v2/models/{model}/ready",
                "/",
                "//",
                "/v2",
                "/v2/",
                "/v2/health/ready",
                "/v2/health/live",
                "/v2/../v2",
                "/metrics",
                "/kvcast/state",
                "*",
                "http://elsewhere/v2",
                "/v2?x=1",
            ]
        )
        headers = {
            draw.choice(["X", "Host", "Expect", "Transfer-Encoding", "Upgrade", "Connection", "Content-Type"]): "x"
        }
        return HttpCase("http place", method, path, headers if draw.random() < 0.3 else {}, b"")

    def _admin(self) -> HttpCase:
        draw = self._draw
        path = draw.choice(
            [
                "/v2/repository/index",
                "/v2/repository/models/ranker/load",
                "/v2/repository/models/ranker/unload",
                "/v2/systemsharedmemory/status",
                "/v2/systemsharedmemory/region/x/register",
                "/v2/cudasharedmemory/region/x/register",
                "/v2/systemsharedmemory/unregister",
                "/v2/logging",
                "/v2/trace/setting",
                "/v2/models/ranker/trace/setting",
            ]
        )
        body = draw.choice([b"", b"{}", b"[]", b"x", b'{"parameters":{"config":"{}"}}', b'{"key":"/x","byte_size":-1}'])
        headers = {"kvcast-admin-key": "x"} if draw.random() < 0.5 else {}
        return HttpCase("http admin without key", draw.choice(["GET", "POST"]), path, headers, body)

    def _broken_http(self) -> SocketCase:
        draw = self._draw
        body = json.dumps(self._table("/v2/models/ranker/infer")).encode()
        head = b"POST /v2/models/ranker/infer HTTP/1.1\r\nHost: x\r\n"
        length = b"Content-Length: %d\r\n" % len(body)
        whole = head + length + b"\r\n" + body
        data = draw.choice(
            [
                damage_bytes(whole, draw),
                whole[: draw.randrange(len(whole))],
                draw.randbytes(draw.choice([1, 20, 2000])),
                head + length + length.replace(b": ", b": 1") + b"\r\n" + body,
                head + b"Content-Length: -1\r\n\r\n" + body,
                head + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
                head + length + b"Transfer-Encoding: chunked\r\n\r\n" + body,
                head + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n" + body,
                head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
                head + b"X: " + b"y" * 20_000 + b"\r\n" + length + b"\r\n" + body,
                head + b"".join(b"X%d: y\r\n" % index for index in range(500)) + length + b"\r\n" + body,
                head + b"X\0Y: z\r\n" + length + b"\r\n" + body,
                head + b" folded: x\r\n" + length + b"\r\n" + body,
                whole.replace(b"HTTP/1.1", draw.choice([b"HTTP/9.9", b"HTTP/1.0", b"HTTP/2", b"", b"FTP/1"])),
                whole.replace(b"\r\n", b"\n"),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                whole * 3,
            ]
        )
        return SocketCase("socket", data)


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Give each container of a JSON value with each of its keys or places."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        # Long lists of numbers are one place, or nothing else would ever be changed.
        yield from list(walk(inner))[:8] if isinstance(inner, list) else walk(inner)


# --- gRPC ---


@dataclass(frozen=True)
class GrpcCase:
    """Bytes for a method."""

    kind: str
    method: str
    message: bytes
    described: str = ""

    def send(self, channel: grpc.Channel) -> Outcome:
        """Send it; replies to inference are looked at too, those of other methods only if they are errors."""
        known = self.method.removeprefix(SERVICE) in OFFERED
        described = self.described or f"{self.method} {self.message[:300]!r}"
        try:
            if self.method.endswith("ModelStreamInfer"):
                stream = channel.stream_stream(self.method)(iter([self.message]), timeout=REPLY_SECONDS)
                status, message = "OK", b"".join(stream)
            else:
                reply = channel.unary_unary(self.method)(self.message, timeout=REPLY_SECONDS)
                status, message = "OK", reply if "Infer" in self.method else b""
        except grpc.RpcError as error:
            details: Any = error
            status, message = details.code().name, (details.details() or "").encode()
        return Outcome(self.kind, status, message, described, known)


OTHER_METHODS = {
    "ServerLive": service_pb2.ServerLiveRequest,
    "ServerReady": service_pb2.ServerReadyRequest,
    "ServerMetadata": service_pb2.ServerMetadataRequest,
    "ModelReady": service_pb2.ModelReadyRequest,
    "ModelMetadata": service_pb2.ModelMetadataRequest,
    "ModelConfig": service_pb2.ModelConfigRequest,
    "ModelStatistics": service_pb2.ModelStatisticsRequest,
    "RepositoryIndex": service_pb2.RepositoryIndexRequest,
    "RepositoryModelLoad": service_pb2.RepositoryModelLoadRequest,
    "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest,
    "SystemSharedMemoryStatus": service_pb2.SystemSharedMemoryStatusRequest,
    "SystemSharedMemoryRegister": service_pb2.SystemSharedMemoryRegisterRequest,
    "SystemSharedMemoryUnregister": service_pb2.SystemSharedMemoryUnregisterRequest,
    "CudaSharedMemoryStatus": service_pb2.CudaSharedMemoryStatusRequest,
    "CudaSharedMemoryRegister": service_pb2.CudaSharedMemoryRegisterRequest,
    "CudaSharedMemoryUnregister": service_pb2.CudaSharedMemoryUnregisterRequest,
    "TraceSetting": service_pb2.TraceSettingRequest,
    "LogSettings": service_pb2.LogSettingsRequest,
}
NOT_OFFERED = {f"{kind}SharedMemory{what}" for kind in ("System", "Cuda") for what in ("Register", "Unregister")}
OFFERED = {"ModelInfer", *OTHER_METHODS} - NOT_OFFERED
CONTENTS = ["bool", "int", "int64", "uint", "uint64", "fp32", "fp64", "bytes"]


class GrpcFuzzer:
    """Makes gRPC cases."""

    def __init__(self, requests: Requests, draw: random.Random) -> None:
        self._requests, self._draw = requests, draw
        self._makers: list[tuple[int, Callable[[], GrpcCase]]] = [
            (55, self._mutated),
            (10, self._damaged),
            (5, self._random_bytes),
            (10, self._other),
            (3, self._unknown_method),
            (3, self._streamed),
        ]
        self._mutations: list[tuple[str, Callable[[Any], None]]] = [
            ("shape", self._change_shape),
            ("datatype", self._change_datatype),
            ("array", self._change_array),
            ("raw contents", self._change_raw),
            ("typed contents", self._change_contents),
            ("names", self._change_names),
            ("inputs", self._change_inputs),
            ("outputs", self._change_outputs),
            ("request parameters", self._add_parameters),
            ("input parameters", lambda request: self._add_parameters(self._draw.choice(request.inputs))),
            ("shared memory", self._add_shared_memory),
            ("id", self._change_id),
            ("model", self._change_model),
        ]

    def make(self) -> GrpcCase:
        """Return one case."""
        weights, makers = zip(*self._makers, strict=True)
        return self._draw.choices(makers, weights)[0]()

    def _valid(self) -> Any:
        model = self._draw.choice(MODEL_NAMES)
        return make_infer_request(model, self._requests.tensors[model])

    def _mutated(self) -> GrpcCase:
        request, names = self._valid(), []
        for _ in range(self._draw.choice([1, 1, 1, 2, 3])):
            name, mutate = self._draw.choice(self._mutations)
            if request.inputs:
                mutate(request)
                names.append(name)
        kind = f"grpc {request.model_name[:20]!r}: {' + '.join(names)}"
        text = str(request)[:1500]
        return GrpcCase(kind, SERVICE + "ModelInfer", request.SerializeToString(), described=text)

    def _change_shape(self, request: Any) -> None:
        entry, draw = self._draw.choice(request.inputs), self._draw
        if entry.shape and draw.random() < 0.5:
            entry.shape[draw.randrange(len(entry.shape))] = draw.choice(HOSTILE_NUMBERS)
        else:
            entry.shape[:] = [draw.choice(HOSTILE_NUMBERS) for _ in range(draw.choice([0, 1, 2, 3, 4, 5]))]

    def _change_datatype(self, request: Any) -> None:
        self._draw.choice(request.inputs).datatype = self._draw.choice(DATATYPES)

    def _change_array(self, request: Any) -> None:
        """Hostile elements and axes that agree with each other: it is for the model to refuse them."""
        tensors = self._requests.tensors.get(request.model_name, {})
        for index, entry in enumerate(request.inputs):
            if entry.name in tensors and index < len(request.raw_input_contents) and self._draw.random() < 0.6:
                array = hostile_array(tensors[entry.name][1], self._draw)
                entry.shape[:] = array.shape
                request.raw_input_contents[index] = np.ascontiguousarray(array).tobytes()

    def _change_raw(self, request: Any) -> None:
        raw, draw = request.raw_input_contents, self._draw
        action = draw.randrange(5)
        if action == 0 or not raw:
            del raw[:]
        elif action == 1:
            raw.append(draw.randbytes(draw.choice([0, 8, 1000])))
        elif action == 2:
            raw.pop()
        elif action == 3:
            raw[draw.randrange(len(raw))] = draw.randbytes(draw.choice([0, 1, 7, 8, 96, 100_000]))
        else:
            index = draw.randrange(len(raw))
            raw[index] = damage_bytes(raw[index], draw)

    def _change_contents(self, request: Any) -> None:
        """Data in typed fields: in the right one, a wrong one or several, with or without raw contents beside it."""
        draw = self._draw
        if draw.random() < 0.8:
            del request.raw_input_contents[:]
        for entry in request.inputs:
            for kind in draw.sample(CONTENTS, draw.choice([0, 1, 1, 2])) + ["int64"] * (draw.random() < 0.5):
                values = getattr(entry.contents, f"{kind}_contents")
                count = draw.choice([0, 1, 12, 12, 1000])
                element = {"bool": True, "bytes": draw.randbytes(draw.choice([0, 8])), "fp32": float("nan")}.get(
                    kind, 1
                )
                values.extend([element] * count)

    def _change_names(self, request: Any) -> None:
        self._draw.choice(request.inputs).name = self._draw.choice(HOSTILE_TEXTS)

    def _change_inputs(self, request: Any) -> None:
        draw, action = self._draw, self._draw.randrange(4)
        if action == 0:
            del request.inputs[:]
        elif action == 1:
            del request.inputs[draw.randrange(len(request.inputs))]
        elif action == 2:
            request.inputs.add().CopyFrom(draw.choice(request.inputs))
        else:
            for _ in range(2000):
                request.inputs.add(name=str(draw.random()), datatype="INT64", shape=[1])

    def _change_outputs(self, request: Any) -> None:
        draw = self._draw
        names = ["scores", "scores", "user_keys", "manifest", "encode_report", "fuse_report", "kv_id", *HOSTILE_TEXTS]
        for _ in range(draw.choice([1, 2, 500])):
            output = request.outputs.add(name=draw.choice(names))
            if draw.random() < 0.5:
                self._add_parameters(output)

    def _add_parameters(self, message: Any) -> None:
        draw = self._draw
        for _ in range(draw.choice([1, 1, 2, 5])):
            parameter = message.parameters[draw.choice(PARAMETER_NAMES)]
            kind = draw.choice(["bool_param", "int64_param", "string_param", "double_param", "uint64_param", ""])
            values: dict[str, Any] = {
                "bool_param": draw.random() < 0.5,
                "int64_param": draw.choice(HOSTILE_NUMBERS + LARGE_NUMBERS),
                "string_param": draw.choice(HOSTILE_TEXTS),
                "double_param": draw.choice([0.0, 1.5, float("nan"), float("inf"), -1e308]),
                "uint64_param": abs(draw.choice(HOSTILE_NUMBERS + LARGE_NUMBERS)),
            }
            if kind:
                setattr(parameter, kind, values[kind])

    def _add_shared_memory(self, request: Any) -> None:
        draw = self._draw
        for message in draw.sample(list(request.inputs), 1) + [request.outputs.add(name="scores")] * (
            draw.random() < 0.5
        ):
            message.parameters["shared_memory_region"].string_param = draw.choice(["x", ""])
            message.parameters["shared_memory_byte_size"].int64_param = draw.choice(HOSTILE_NUMBERS)
            if draw.random() < 0.5:
                message.parameters["shared_memory_offset"].int64_param = draw.choice(HOSTILE_NUMBERS)

    def _change_id(self, request: Any) -> None:
        request.id = self._draw.choice([*HOSTILE_TEXTS, "i" * 1_000_000])

    def _change_model(self, request: Any) -> None:
        if self._draw.random() < 0.5:
            request.model_version = self._draw.choice(["1", "2", "0", "-1", "x", "9" * 30, "1.0", " 1", "\0"])
        else:
            request.model_name = self._draw.choice([*MODEL_NAMES, *HOSTILE_TEXTS])

    def _damaged(self) -> GrpcCase:
        message = damage_bytes(self._valid().SerializeToString(), self._draw)
        return GrpcCase("grpc damaged message", SERVICE + "ModelInfer", message)

    def _random_bytes(self) -> GrpcCase:
        message = self._draw.randbytes(self._draw.choice([0, 1, 2, 10, 100, 10_000]))
        return GrpcCase("grpc random bytes", SERVICE + self._draw.choice(["ModelInfer", *OTHER_METHODS]), message)

    def _other(self) -> GrpcCase:
        method, draw = self._draw.choice(list(OTHER_METHODS)), self._draw
        request = OTHER_METHODS[method]()
        for described in request.DESCRIPTOR.fields:
            if described.label == described.LABEL_REPEATED or draw.random() < 0.3:
                continue
            if described.cpp_type == described.CPPTYPE_STRING and described.type == described.TYPE_STRING:
                setattr(request, described.name, draw.choice([*MODEL_NAMES, *HOSTILE_TEXTS]))
            elif described.type == described.TYPE_BYTES:
                setattr(request, described.name, draw.randbytes(64))
            elif described.cpp_type == described.CPPTYPE_BOOL:
                setattr(request, described.name, True)
            else:
                setattr(request, described.name, abs(draw.choice(HOSTILE_NUMBERS)) % (1 << 63))
        return GrpcCase(
            f"grpc {method}", SERVICE + method, request.SerializeToString(), described=f"{method} {request}"[:600]
        )

    def _unknown_method(self) -> GrpcCase:
        draw = self._draw
        method = draw.choice([SERVICE + "Nothing", "/x/y", "/inference.GRPCInferenceService/", "/" + "x" * 500])
        return GrpcCase("grpc unknown method", method, draw.randbytes(20))

    def _streamed(self) -> GrpcCase:
        case = self._mutated()
        return GrpcCase("grpc stream", SERVICE + "ModelStreamInfer", case.message, described=case.described)
