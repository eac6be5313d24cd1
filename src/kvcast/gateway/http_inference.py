"""Inference bodies of HTTP, KServe v2 with its binary extension, to and from the messages of gRPC: pure functions.

tritonserver 2.51 ends on some malformed bodies, so none reaches it: a body is parsed strictly, checked against itself
(does the data fill the shape?), and becomes a ModelInferRequest. Which models and tensors there are is not known here;
that is left to Triton and the models.
"""

import json
import math
import re
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, NoReturn

import msgspec
from tritonclient.grpc import service_pb2

from kvcast.protocol.errors import InvalidRequestError, ServerFaultError

MAX_TENSOR_BYTES = 256 << 20
MAX_TEXT = 1024
MAX_RANK = 16
MAX_TENSORS = 64
MAX_PARAMETERS = 64
# One string of a BYTES tensor is looked at at a time, in Python.
MAX_STRINGS = 1 << 16
# Parsing holds up every other request, for half a second at worst. Larger tensors belong in the binary extension.
MAX_JSON_BYTES = 2 << 20
# Of one output: the same, in the other direction.
MAX_JSON_TENSOR_BYTES = 4 << 20
STRING_LENGTH_BYTES = 4
BINARY_DATA_SIZE = "binary_data_size"
BINARY_DATA_OUTPUT = "binary_data_output"
BINARY_DATA = "binary_data"
PARAMETER_KINDS = {bool: "bool", int: "int64", float: "double", str: "string"}
# Triton's own limit, which it calls UNIMPLEMENTED.
MAX_SEQUENCE_ID = 128

# Bytes of an element; of a string, the least that one takes.
ELEMENT_BYTES = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
    "BYTES": STRING_LENGTH_BYTES,
}
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

Object = dict[str, Any]


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


# Parameters that Triton itself reads from a request: with a value of another kind some are internal errors to it.
REQUEST_PARAMETERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "sequence_id": (
        f"a whole number or a text of at most {MAX_SEQUENCE_ID} characters",
        lambda value: _is_count(value) or (isinstance(value, str) and len(value.encode()) <= MAX_SEQUENCE_ID),
    ),
    "sequence_start": ("true or false", lambda value: isinstance(value, bool)),
    "sequence_end": ("true or false", lambda value: isinstance(value, bool)),
    "priority": ("a whole number", _is_count),
    "timeout": ("a whole number of microseconds", _is_count),
    BINARY_DATA_OUTPUT: ("true or false", lambda value: isinstance(value, bool)),
}
INPUT_PARAMETERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    BINARY_DATA_SIZE: ("a whole number of bytes", _is_count),
}
OUTPUT_PARAMETERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    BINARY_DATA: ("true or false", lambda value: isinstance(value, bool)),
    "classification": ("a whole number", lambda value: _is_count(value) and value < 1 << 31),
}


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
            f"got {_show(text)}"
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
        The same request as a ModelInferRequest, and how the reply is to be written. Keys that the protocol does not
        know are left out.

    Raises:
        InvalidRequestError: it is not what the protocol says, or does not agree with itself.
    """
    length = len(body) if header_length is None else header_length
    table = parse_json_object(body[:length], "body")
    message: Any = service_pb2.ModelInferRequest(model_name=model, model_version=version)
    if table.get("id") is not None:
        message.id = _check_text("id", table["id"], may_be_empty=True)
    parameters = _check_parameters("parameters", table.get("parameters") or {}, REQUEST_PARAMETERS)
    _write_parameters(message.parameters, parameters)
    _read_inputs(table, memoryview(body)[length:], message)
    by_name = _read_outputs(table["outputs"], message) if table.get("outputs") is not None else {}
    # Triton reads this parameter only where no outputs are named.
    is_binary = bool(parameters.get(BINARY_DATA_OUTPUT)) and not message.outputs
    return message, ReplyFormat(is_binary, by_name)


def write_reply(reply: bytes, form: ReplyFormat) -> tuple[bytes, int | None]:
    """Write a ModelInferResponse as a body; return it, and the length of its JSON if binary data follows.

    Raises:
        InvalidRequestError: an output cannot be written as JSON.
    """
    message: Any = service_pb2.ModelInferResponse.FromString(reply)
    table: Object = {"id": message.id} if message.id else {}
    table |= {"model_name": message.model_name, "model_version": message.model_version}
    if message.parameters:
        table["parameters"] = {name: _read_parameter(each) for name, each in sorted(message.parameters.items())}
    outputs, pieces = [], []
    for output, data in zip(message.outputs, message.raw_output_contents, strict=True):
        entry: Object = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if form.wants_binary(output.name):
            entry["parameters"] = {BINARY_DATA_SIZE: len(data)}
            pieces.append(data)
        else:
            entry["data"] = _unpack(output.name, output.datatype, data)
        outputs.append(entry)
    header = msgspec.json.encode({**table, "outputs": outputs})
    return (b"".join([header, *pieces]), len(header)) if pieces else (header, None)


def _write_parameters(target: Any, parameters: Object) -> None:
    for name, value in parameters.items():
        if name == BINARY_DATA_OUTPUT:
            continue
        kind = "uint64" if name == "priority" else PARAMETER_KINDS[type(value)]
        setattr(target[name], f"{kind}_param", value)


def _read_parameter(parameter: Any) -> Any:
    return getattr(parameter, parameter.WhichOneof("parameter_choice") or "string_param")


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


def parse_json_object(text: bytes, where: str) -> Object:
    """Parse JSON strictly: UTF-8, no key twice, no NaN or infinity, not nested too deep.

    Raises:
        InvalidRequestError: it is anything else, or not an object.
    """
    if len(text) > MAX_JSON_BYTES:
        raise InvalidRequestError(
            f"{where}: expected at most {MAX_JSON_BYTES} bytes of JSON, got {len(text)}: "
            "send large tensors as binary data"
        )
    try:
        table = json.loads(text.decode(), object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{where}: expected JSON in UTF-8, got another byte at {error.start}") from None
    except RecursionError:
        raise InvalidRequestError(f"{where}: expected JSON, got lists or objects nested too deep") from None
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise InvalidRequestError(f"{where}: expected JSON, got {_show(str(error))}") from None
    if not isinstance(table, dict):
        raise InvalidRequestError(f"{where}: expected a JSON object, got {_name_kind(table)}")
    return table


def _build_object(pairs: list[tuple[str, Any]]) -> Object:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequestError(f"body: expected each key once, got {_show(twice)} twice")
    return table


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"body: expected JSON, got {name}, which JSON does not have")


def _read_inputs(table: Object, binary: memoryview, message: Any) -> None:
    """Add the inputs and the bytes of each to a message."""
    entries = _check_entries("inputs", table.get("inputs"))
    if not entries:
        raise InvalidRequestError("inputs: expected at least one, got none")
    used = 0
    for index, entry in enumerate(entries):
        where = f"inputs[{index}]"
        parameters = _check_parameters(f"{where}.parameters", entry.get("parameters") or {}, INPUT_PARAMETERS)
        shape, datatype = entry.get("shape"), entry.get("datatype")
        count = _check_shape(where, shape, datatype)
        if BINARY_DATA_SIZE in parameters:
            size = parameters[BINARY_DATA_SIZE]
            data = bytes(_take_binary(where, entry, binary[used:], size))
            used += size
            _check_binary(where, data, str(datatype), count)
        else:
            data = _pack(where, entry.get("data"), str(datatype), count)
        message.inputs.add(name=entry["name"], datatype=datatype, shape=shape)
        message.raw_input_contents.append(data)
    if used != len(binary):
        raise InvalidRequestError(f"inputs: expected {used} bytes of binary data after the JSON, got {len(binary)}")


def _read_outputs(value: Any, message: Any) -> dict[str, bool]:
    """Add the outputs to a message; return which of them are wanted as binary data, or not, by name."""
    by_name = {}
    for index, entry in enumerate(_check_entries("outputs", value)):
        where = f"outputs[{index}].parameters"
        parameters = _check_parameters(where, entry.get("parameters") or {}, OUTPUT_PARAMETERS)
        if BINARY_DATA in parameters:
            by_name[entry["name"]] = parameters.pop(BINARY_DATA)
        _write_parameters(message.outputs.add(name=entry["name"]).parameters, parameters)
    return by_name


def _check_entries(where: str, value: Any) -> list[Object]:
    """Check a list of objects, each with a name of its own."""
    if not isinstance(value, list) or len(value) > MAX_TENSORS:
        got = f"{len(value)}" if isinstance(value, list) else _name_kind(value)
        raise InvalidRequestError(f"{where}: expected a list of at most {MAX_TENSORS} objects, got {got}")
    names = set()
    for index, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise InvalidRequestError(f"{where}[{index}]: expected an object, got {_name_kind(entry)}")
        name = _check_text(f"{where}[{index}].name", entry.get("name"))
        if name in names:
            raise InvalidRequestError(f"{where}[{index}].name: expected each name once, got {_show(name)} again")
        names.add(name)
    return value


def _check_text(where: str, value: Any, *, may_be_empty: bool = False) -> str:
    """Check a text that Triton keeps as a C string: no control characters, and UTF-8 can write it."""
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}: expected a text, got {_name_kind(value)}")
    if not may_be_empty and not value:
        raise InvalidRequestError(f"{where}: expected a text, got an empty one")
    if len(value) > MAX_TEXT:
        raise InvalidRequestError(f"{where}: expected at most {MAX_TEXT} characters, got {len(value)}")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise InvalidRequestError(f"{where}: expected a text without control characters, got {_show(value)}")
    return value


def _check_parameters(where: str, value: Any, known: Mapping[str, tuple[str, Callable[[Any], bool]]]) -> Object:
    """Check an object of scalars; what Triton reads itself has to be of the kind that it expects."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where}: expected an object, got {_name_kind(value)}")
    if len(value) > MAX_PARAMETERS:
        raise InvalidRequestError(f"{where}: expected at most {MAX_PARAMETERS} parameters, got {len(value)}")
    for name, each in value.items():
        _check_text(f"{where}: a name", name)
        if name.startswith("shared_memory_"):
            raise InvalidRequestError(f"{where}.{name}: shared memory is not offered over HTTP: send the data itself")
        expected, is_right = known.get(name, ("a text, a number, true or false", _is_scalar))
        if isinstance(each, str):
            _check_text(f"{where}.{name}", each, may_be_empty=True)
        if not is_right(each):
            raise InvalidRequestError(f"{where}.{_show(name, quote=False)}: expected {expected}, got {_show(each)}")
    return value


def _is_scalar(value: Any) -> bool:
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, str | bool) or (isinstance(value, float) and math.isfinite(value))


def _check_shape(where: str, shape: Any, datatype: Any) -> int:
    """Return the number of elements of a tensor whose shape and datatype can be believed."""
    if not isinstance(datatype, str) or datatype not in ELEMENT_BYTES:
        raise InvalidRequestError(
            f"{where}.datatype: expected one of {', '.join(ELEMENT_BYTES)}, got {_show(datatype)}"
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise InvalidRequestError(
            f"{where}.shape: expected a list of at most {MAX_RANK} whole numbers, got {_show(shape)}"
        )
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 31:
            raise InvalidRequestError(f"{where}.shape: expected whole numbers from 0 to 2^31 - 1, got {_show(size)}")
    # An axis of 0 must not hide what the others multiply to.
    largest = math.prod(max(1, size) for size in shape) * ELEMENT_BYTES[datatype]
    if largest > MAX_TENSOR_BYTES:
        raise InvalidRequestError(
            f"{where}.shape: expected a tensor of at most {MAX_TENSOR_BYTES} bytes, got {_show(shape)} of {datatype}"
        )
    return math.prod(shape)


def _take_binary(where: str, entry: Object, rest: memoryview, size: int) -> memoryview:
    if entry.get("data") is not None:
        raise InvalidRequestError(f"{where}: expected data or {BINARY_DATA_SIZE}, got both")
    if size > len(rest):
        raise InvalidRequestError(
            f"{where}.parameters.{BINARY_DATA_SIZE}: expected at most the {len(rest)} bytes that are left, got {size}"
        )
    return rest[:size]


def _check_binary(where: str, data: bytes, datatype: str, count: int) -> None:
    if datatype == "BYTES":
        _check_strings(where, data, count)
    elif len(data) != count * ELEMENT_BYTES[datatype]:
        raise InvalidRequestError(
            f"{where}: expected {count * ELEMENT_BYTES[datatype]} bytes for its shape and {datatype}, got {len(data)}"
        )


def _check_strings(where: str, data: bytes, count: int) -> None:
    """Check that there are `count` strings, each after its length."""
    if count > MAX_STRINGS:
        raise InvalidRequestError(f"{where}: expected at most {MAX_STRINGS} strings, got {count}")
    place = 0
    for _ in range(count):
        if place + STRING_LENGTH_BYTES > len(data):
            break
        place += STRING_LENGTH_BYTES + struct.unpack_from("<I", data, place)[0]
    else:
        if place == len(data):
            return
    raise InvalidRequestError(f"{where}: expected {count} strings, each after its length, got other bytes")


def _pack(where: str, data: Any, datatype: str, count: int) -> bytes:
    """Return JSON data as the bytes of its datatype."""
    flat = _flatten(where, data)
    if len(flat) != count:
        raise InvalidRequestError(f"{where}.data: expected {count} elements for its shape, got {len(flat)}")
    kinds = set(map(type, flat))
    if datatype == "BYTES":
        return _pack_strings(where, flat)
    if datatype == "BOOL":
        _expect_kinds(where, kinds, {bool}, "true or false")
        return bytes(flat)
    if datatype in INTEGER_CODES:
        _expect_kinds(where, kinds, {int}, f"whole numbers for {datatype}")
        return _pack_numbers(where, INTEGER_CODES[datatype], datatype, flat)
    if datatype in FLOAT_CODES:
        _expect_kinds(where, kinds, {int, float}, f"numbers for {datatype}")
        return _pack_numbers(where, FLOAT_CODES[datatype], datatype, flat)
    raise InvalidRequestError(f"{where}.data: {datatype} is not a type of JSON: send it as binary data")


def _pack_numbers(where: str, code: str, datatype: str, flat: list[Any]) -> bytes:
    try:
        packed = array(code, flat)
    except OverflowError:
        raise InvalidRequestError(f"{where}.data: expected numbers within the range of {datatype}") from None
    if datatype in FLOAT_CODES and not all(map(math.isfinite, packed)):
        raise InvalidRequestError(f"{where}.data: expected finite numbers within the range of {datatype}")
    return packed.tobytes()


def _pack_strings(where: str, flat: list[Any]) -> bytes:
    _expect_kinds(where, set(map(type, flat)), {str}, "texts")
    if len(flat) > MAX_STRINGS:
        raise InvalidRequestError(f"{where}: expected at most {MAX_STRINGS} strings, got {len(flat)}")
    try:
        encoded = [text.encode() for text in flat]
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{where}.data: expected texts that UTF-8 can write, got half a character") from None
    return b"".join(struct.pack("<I", len(each)) + each for each in encoded)


def _expect_kinds(where: str, kinds: set[type], allowed: set[type], expected: str) -> None:
    wrong = kinds - allowed
    if wrong:
        got = ", ".join(sorted(each.__name__ for each in wrong))
        raise InvalidRequestError(f"{where}.data: expected {expected}, got {got}")


def _flatten(where: str, data: Any) -> list[Any]:
    """Return the elements of a list, or of lists in lists as deep as each other."""
    if not isinstance(data, list):
        raise InvalidRequestError(f"{where}.data: expected a list, got {_name_kind(data)}")
    flat: Iterable[Any] = data
    while True:
        elements = list(flat)
        nested = sum(isinstance(each, list) for each in elements[:1]) and set(map(type, elements)) == {list}
        if not nested:
            return elements
        flat = chain.from_iterable(elements)


def _name_kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _show(value: Any, *, quote: bool = True) -> str:
    """Return a value from a request as part of a message: short, and in ASCII."""
    try:
        text = value if isinstance(value, str) and not quote else json.dumps(value)
    except (ValueError, RecursionError):  # digits or depth without end
        return _name_kind(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 100 else text[:100] + "…"
