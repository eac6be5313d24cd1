"""Inference bodies of HTTP, KServe v2 with its binary extension, to and from the messages of gRPC: pure functions.

tritonserver 2.51 ends on some malformed bodies, so none reaches it: a body becomes a ModelInferRequest here, or is
refused. Which models and tensors there are is left to Triton and the models.
"""

import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any

import msgspec
from tritonclient.grpc import service_pb2

from kvcast.gateway.inference import MAX_RANK
from kvcast.protocol.decoding import decode_json
from kvcast.protocol.errors import InvalidRequestError, ServerFaultError

# Parsing holds up every other request, for half a second at worst. Larger tensors belong in the binary extension.
MAX_JSON_BYTES = 2 << 20
# Of one output: the same, in the other direction.
MAX_JSON_TENSOR_BYTES = 4 << 20
MAX_TENSORS = 64
LARGEST_EXACT_FLOAT = 2**53
STRING_LENGTH_BYTES = 4
BINARY_DATA_SIZE = "binary_data_size"
BINARY_DATA_OUTPUT = "binary_data_output"
BINARY_DATA = "binary_data"
# How a parameter's type is called in its message.
PARAMETER_KINDS = {bool: "bool", int: "int64", float: "double", str: "string"}
INTEGER_CODES = {
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
}
FLOAT_CODES = {"FP32": "f", "FP64": "d"}
# Of a datatype's JSON: the Python types of its elements, and how a message calls them.
ELEMENTS: dict[str, tuple[set[type], str]] = {
    "BOOL": ({bool}, "true or false"),
    "BYTES": ({str}, "texts"),
    **dict.fromkeys(INTEGER_CODES, ({int}, "whole numbers")),
    **dict.fromkeys(FLOAT_CODES, ({int, float}, "numbers")),
}

Axis = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Shape = Annotated[list[Axis], msgspec.Meta(max_length=MAX_RANK)]
Parameters = dict[str, bool | int | float | str]


class Input(msgspec.Struct):
    """An input tensor: its data, or the size of that in the binary part."""

    name: str
    shape: Shape
    datatype: str
    parameters: Parameters | None = None
    data: Any = None


class Output(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: Parameters | None = None


class Body(msgspec.Struct):
    """The JSON of a request. Keys that the protocol does not know are left out."""

    inputs: Annotated[list[Input], msgspec.Meta(max_length=MAX_TENSORS)]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: Annotated[list[Output], msgspec.Meta(max_length=MAX_TENSORS)] | None = None


@dataclass(frozen=True)
class ReplyFormat:
    """Which outputs a caller wants as binary data: those named, and by default all others or none."""

    is_binary: bool
    by_name: Mapping[str, bool]

    def wants_binary(self, name: str) -> bool:
        """Whether an output is to be sent as binary data."""
        return self.by_name.get(name, self.is_binary)


def read_header_length(text: str | None, body_length: int) -> int | None:
    """Read the header `Inference-Header-Content-Length`; None if there is none: all of the body is JSON then.

    Raises:
        InvalidRequestError: it is not a whole number within the body.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) > body_length:
        raise InvalidRequestError(
            f"Inference-Header-Content-Length: expected a whole number up to the body's {body_length} bytes, "
            f"got {text[:100]!r}"
        )
    return int(text)


def read_request(body: bytes, header_length: int | None, model: str, version: str = "") -> tuple[Any, ReplyFormat]:
    """Read the body of an inference request.

    Args:
        body: as it came, decompressed.
        header_length: bytes of JSON at its start; None if it is JSON altogether.
        model: whose name is in the path.
        version: of the model, empty for any.

    Returns:
        The same request as a ModelInferRequest, and how the reply is to be written.

    Raises:
        InvalidRequestError: it is not what the protocol says, or does not agree with itself.
    """
    length = len(body) if header_length is None else header_length
    table = parse_json(body[:length], Body)
    try:
        return _write_request(
            table, body[length:], service_pb2.ModelInferRequest(model_name=model, model_version=version)
        )
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"body: expected texts that UTF-8 can write: {error}") from None


def _write_request(table: Body, binary: bytes, message: Any) -> tuple[Any, ReplyFormat]:
    message.id = table.id or ""
    parameters = dict(table.parameters or {})
    # Triton reads this parameter only where no outputs are named.
    is_binary = bool(parameters.pop(BINARY_DATA_OUTPUT, False)) and not table.outputs
    _write_parameters("parameters", message.parameters, parameters)
    _read_inputs(table.inputs, binary, message)
    by_name = {}
    for index, output in enumerate(table.outputs or []):
        parameters = dict(output.parameters or {})
        if BINARY_DATA in parameters:
            by_name[output.name] = bool(parameters.pop(BINARY_DATA))
        _write_parameters(f"outputs[{index}]", message.outputs.add(name=output.name).parameters, parameters)
    return message, ReplyFormat(is_binary, by_name)


def write_reply(reply: bytes, form: ReplyFormat) -> tuple[bytes, int | None]:
    """Write a ModelInferResponse as a body; return it, and the length of its JSON if binary data follows.

    Raises:
        InvalidRequestError: an output cannot be written as JSON.
        ServerFaultError: an output is not what its datatype says.
    """
    message: Any = service_pb2.ModelInferResponse.FromString(reply)
    table: dict[str, Any] = {"id": message.id} if message.id else {}
    table |= {"model_name": message.model_name, "model_version": message.model_version}
    if message.parameters:
        table["parameters"] = {name: _read_parameter(each) for name, each in sorted(message.parameters.items())}
    outputs, pieces = [], []
    for output, data in zip(message.outputs, message.raw_output_contents, strict=True):
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if form.wants_binary(output.name):
            entry["parameters"] = {BINARY_DATA_SIZE: len(data)}
            pieces.append(data)
        else:
            entry["data"] = _unpack(output.name, output.datatype, data)
        outputs.append(entry)
    header = msgspec.json.encode({**table, "outputs": outputs})
    return (b"".join([header, *pieces]), len(header)) if pieces else (header, None)


def parse_json(text: bytes, kind: Any) -> Any:
    """Parse a body that is JSON.

    Raises:
        InvalidRequestError: it is too large, nested too deep, or not of this kind.
    """
    if len(text) > MAX_JSON_BYTES:
        raise InvalidRequestError(
            f"body: expected at most {MAX_JSON_BYTES} bytes of JSON, got {len(text)}: send large tensors as binary data"
        )
    try:
        return decode_json(text, kind, "body", InvalidRequestError)
    except RecursionError:
        raise InvalidRequestError("body: expected JSON, got lists or objects nested too deep") from None


def _write_parameters(where: str, target: Any, parameters: Parameters) -> None:
    for name, value in parameters.items():
        # gRPC has a type of its own for this one.
        kind = "uint64" if name == "priority" and type(value) is int else PARAMETER_KINDS[type(value)]
        try:
            setattr(target[name], f"{kind}_param", value)
        except UnicodeEncodeError:
            raise
        except (ValueError, TypeError):
            raise InvalidRequestError(f"{where}: {name[:100]!r}: expected a number of at most 64 bits") from None


def _read_parameter(parameter: Any) -> Any:
    return getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")


def _read_inputs(inputs: list[Input], binary: bytes, message: Any) -> None:
    """Add the inputs, and the bytes of each, to a message."""
    used = 0
    for index, each in enumerate(inputs):
        where = f"inputs[{index}]"
        size = (each.parameters or {}).get(BINARY_DATA_SIZE)
        shared = [name for name in each.parameters or {} if name.startswith("shared_memory_")]
        if shared:
            raise InvalidRequestError(f"{where}: {shared[0][:100]}: shared memory is not offered: send the data itself")
        if size is None:
            data = _pack(where, each)
        elif type(size) is int and 0 <= size <= len(binary) - used and each.data is None:
            data = binary[used : used + size]
            used += size
        else:
            raise InvalidRequestError(
                f"{where}: expected data, or as {BINARY_DATA_SIZE} at most the {len(binary) - used} bytes that are "
                f"left, got {size!r}{' and data' if each.data is not None else ''}"
            )
        message.inputs.add(name=each.name, datatype=each.datatype, shape=each.shape)
        message.raw_input_contents.append(data)
    if used != len(binary):
        raise InvalidRequestError(f"inputs: expected {used} bytes of binary data after the JSON, got {len(binary)}")


def _pack(where: str, tensor: Input) -> bytes:
    """Return JSON data as the bytes of its datatype."""
    (flat, lengths), datatype = _flatten(where, tensor.data), tensor.datatype
    if len(flat) != math.prod(tensor.shape):
        raise InvalidRequestError(
            f"{where}.data: expected {math.prod(tensor.shape)} elements for its shape, got {len(flat)}"
        )
    if flat and not fits(lengths, tensor.shape):
        raise InvalidRequestError(
            f"{where}.data: expected a flat list, or lists in lists as its shape {tensor.shape} says, "
            f"got lengths {lengths[:MAX_RANK]}"
        )
    if datatype not in ELEMENTS:
        raise InvalidRequestError(
            f"{where}.datatype: expected one of {', '.join(ELEMENTS)} for JSON, got {datatype[:100]!r}"
        )
    allowed, expected = ELEMENTS[datatype]
    flat = _read_whole_numbers(flat) if allowed == {int} else flat
    wrong = set(map(type, flat)) - allowed
    if wrong:
        index, value = next((index, each) for index, each in enumerate(flat) if type(each) in wrong)
        got = type(value).__name__ + ("" if isinstance(value, list | dict) else f" {value!r}"[:100])
        raise InvalidRequestError(f"{where}.data: expected {expected} for {datatype}, got {got} at element {index}")
    try:
        packed = pack_elements(datatype, map(str.encode, flat) if datatype == "BYTES" else flat)
    except OverflowError as error:
        raise InvalidRequestError(
            f"{where}.data: expected {expected} within the range of {datatype}: {error}"
        ) from None
    if datatype in FLOAT_CODES and not all(map(math.isfinite, array(FLOAT_CODES[datatype], packed))):
        raise InvalidRequestError(f"{where}.data: expected finite numbers within the range of {datatype}")
    return packed


def pack_elements(datatype: str, elements: Iterable[Any]) -> bytes:
    """Return elements as the bytes of their datatype.

    Raises:
        OverflowError: one is out of its range.
    """
    if datatype == "BOOL":
        return bytes(elements)
    if datatype == "BYTES":
        return b"".join(len(each).to_bytes(STRING_LENGTH_BYTES, "little") + each for each in elements)
    return array((INTEGER_CODES | FLOAT_CODES)[datatype], elements).tobytes()


def _read_whole_numbers(flat: list[Any]) -> list[Any]:
    """Return as integers what some clients write as floats, where it is whole and exact."""
    return [
        int(each) if type(each) is float and each.is_integer() and abs(each) <= LARGEST_EXACT_FLOAT else each
        for each in flat
    ]


def _flatten(where: str, data: Any) -> tuple[list[Any], list[int]]:
    """Return the elements of a list, or of lists in lists as deep and long as each other, and the lengths of those."""
    if not isinstance(data, list):
        raise InvalidRequestError(f"{where}.data: expected a list, got {type(data).__name__}")
    elements, lengths = data, [len(data)]
    while set(map(type, elements)) == {list}:
        different = sorted(set(map(len, elements)))
        if len(different) > 1:
            raise InvalidRequestError(
                f"{where}.data: expected lists as long as each other, got lengths {different[:10]}"
            )
        lengths += different
        elements = list(chain.from_iterable(elements))
    return elements, lengths


def fits(lengths: list[int], shape: list[int]) -> bool:
    """Whether nested lists are a tensor's rows, and not its columns: several axes may be one list, in their order."""
    axes = (axis for axis in shape if axis != 1)
    for length in lengths:
        size = 1
        while size < length:
            size *= next(axes, length + 1)
        if size != length:
            return False
    return True


def _unpack(name: str, datatype: str, data: bytes) -> list[Any]:
    """Return the elements of an output for JSON."""
    if len(data) > MAX_JSON_TENSOR_BYTES:
        raise InvalidRequestError(
            f"{name}: expected at most {MAX_JSON_TENSOR_BYTES} bytes as JSON, got {len(data)}: ask for binary data"
        )
    if datatype == "BYTES":
        return [text.decode(errors="replace") for text in _iterate_strings(name, data)]
    if datatype == "BOOL":
        return [bool(each) for each in data]
    code = (INTEGER_CODES | FLOAT_CODES).get(datatype)
    if code is None:
        raise InvalidRequestError(f"{name}: {datatype} is not a type of JSON: ask for binary data")
    return array(code, data).tolist()


def _iterate_strings(name: str, data: bytes) -> Iterator[bytes]:
    """Return the strings of a BYTES tensor: each is preceded by its length."""
    place = 0
    while place < len(data):
        end = place + STRING_LENGTH_BYTES + int.from_bytes(data[place : place + STRING_LENGTH_BYTES], "little")
        if place + STRING_LENGTH_BYTES > len(data) or end > len(data):
            raise ServerFaultError(f"{name}: expected strings, each after its length, got other bytes")
        yield data[place + STRING_LENGTH_BYTES : end]
        place = end
