"""Bodies of HTTP to messages of gRPC and back: the same tensors, and a refusal where a body disagrees with itself."""

import json
import struct
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from kvcast.gateway.http_inference import (
    MAX_JSON_TENSOR_BYTES,
    ReplyFormat,
    read_header_length,
    read_request,
    write_reply,
)
from kvcast.protocol.errors import InvalidRequestError, ServerFaultError

NUMPY = {
    "BOOL": np.bool_,
    **{f"{sign}INT{bits}": np.dtype(f"{sign}int{bits}".lower()) for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP32": np.float32,
    "FP64": np.float64,
}
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
scalars = st.one_of(texts, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, width=32))
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, int, list[np.ndarray]]:
    """Return a valid body, the length of its header, and its tensors."""
    inputs, arrays, binary = [], [], b""
    for name in draw(st.lists(texts, min_size=1, max_size=3, unique=True)):
        datatype, shape = draw(st.sampled_from(sorted(NUMPY))), draw(shapes)
        seed = draw(st.integers(0, 2**32 - 1))
        array = np.random.default_rng(seed).integers(0, 2, shape).astype(NUMPY[datatype])
        entry: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
        if draw(st.booleans()):
            entry["parameters"] = {"binary_data_size": array.nbytes}
            binary += array.tobytes()
        else:
            entry["data"] = (array if array.ndim and draw(st.booleans()) else array.ravel()).tolist()
        inputs.append(entry)
        arrays.append(array)
    table: dict[str, Any] = {"inputs": inputs, "unheard_of": draw(scalars)}
    if draw(st.booleans()):
        table["id"] = draw(texts)
        table["parameters"] = {
            f"own_{key}": value for key, value in draw(st.dictionaries(texts, scalars)).items() if finite(value)
        }
        table["outputs"] = [{"name": "scores", "parameters": {"binary_data": draw(st.booleans())}}]
    if not finite(table["unheard_of"]):
        del table["unheard_of"]
    header = json.dumps(table).encode()
    return header + binary, len(header), arrays


def finite(value: Any) -> bool:
    return not isinstance(value, float) or bool(np.isfinite(value))


@given(bodies())
@settings(deadline=None)
def test_a_message_has_every_tensor_of_its_body(body):
    data, length, arrays = body
    message, form = read_request(data, length, "ranker", "3")
    assert (message.model_name, message.model_version) == ("ranker", "3")
    assert list(message.raw_input_contents) == [array.tobytes() for array in arrays]
    assert [list(tensor.shape) for tensor in message.inputs] == [list(array.shape) for array in arrays]
    table = json.loads(data[:length])
    assert message.id == table.get("id", "")
    assert [output.name for output in message.outputs] == [each["name"] for each in table.get("outputs", [])]
    wanted = {name: getattr(each, each.WhichOneof("parameter_choice")) for name, each in message.parameters.items()}
    assert wanted == table.get("parameters", {})
    for output in table.get("outputs", []):
        assert form.wants_binary(output["name"]) == output["parameters"]["binary_data"]


@given(bodies(), st.data())
@settings(deadline=None, max_examples=300)
def test_a_damaged_body_is_refused_or_agrees_with_itself(body, data):
    original, length, _ = body
    place = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(place, min(len(original), place + 8)))
    damaged = original[:place] + data.draw(st.binary(max_size=8)) + original[end:]
    header_length = data.draw(st.sampled_from([None, length, length + len(damaged) - len(original)]))
    if header_length is not None and not 0 <= header_length <= len(damaged):
        return
    expect_agreement(damaged, header_length)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data):
    expect_agreement(data, None)


@given(st.recursive(scalars | st.none(), lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=20))
@settings(deadline=None)
def test_any_json_in_any_place_is_refused_or_agrees_with_itself(value):
    entry = {"name": "history", "shape": [1], "datatype": "INT64", "data": [1]}
    for table in (
        value,
        {"inputs": value},
        {"inputs": [value]},
        *({"inputs": [{**entry, key: value}]} for key in [*entry, "parameters"]),
        *({"inputs": [entry], key: value} for key in ("id", "parameters", "outputs")),
        {"inputs": [entry], "outputs": [value]},
    ):
        expect_agreement(json.dumps(table).encode(), None)


def expect_agreement(data: bytes, header_length: int | None) -> None:
    """Expect our error and no other, or a body whose tensors are as large as their shapes say."""
    try:
        message, _ = read_request(data, header_length, "ranker")
    except InvalidRequestError as error:
        text = str(error)
    else:
        text = ""
        check_agreement(message)
    assert text.isascii() or text.isprintable()
    assert len(text) < 2000


def check_agreement(message: Any) -> None:
    assert len(message.inputs) == len(message.raw_input_contents)
    for tensor in message.inputs:
        assert all(0 <= axis < 1 << 31 for axis in tensor.shape)


def write(**changes: Any) -> bytes:
    entry = {"name": "history", "shape": [1, 2], "datatype": "INT64", "data": [1, 2], **changes}
    return json.dumps({"inputs": [{key: value for key, value in entry.items() if value is not None}]}).encode()


WRONG = {
    "nothing": (b"", "expected JSON"),
    "garbage": (b"garbage", "expected JSON"),
    "a list": (b"[]", "expected the keys ['id', 'inputs', 'outputs', 'parameters'], got []"),
    "two values": (b"{}{}", "expected JSON"),
    "NaN": (write(datatype="FP32").replace(b"[1, 2]}", b"[1, NaN]}"), "finite"),
    "an infinity": (write(datatype="FP32").replace(b"[1, 2]}", b"[1, -Infinity]}"), "finite"),
    "a number over every range": (write(datatype="FP64").replace(b"[1, 2]}", b"[1, 1e999]}"), "finite"),
    "a number over its range": (write(datatype="FP32", data=[1, 1e39]), "range of FP32"),
    "a number of 5000 digits": (write().replace(b"[1, 2]}", b"[1, " + b"9" * 5000 + b"]}"), "expected JSON"),
    "a number over 64 bits": (write(data=[1, 2**63]), "range of INT64"),
    "a number below 0 where none is": (write(datatype="UINT8", data=[1, -1]), "range of UINT8"),
    "a fraction": (write(data=[1, 2.5]), "expected whole numbers for INT64, got float 2.5 at element 1"),
    "truth for a number": (write(data=[1, True]), "got bool"),
    "a number for truth": (write(datatype="BOOL", data=[1, 0]), "got int"),
    "numbers for texts": (write(datatype="BYTES", data=[1, 0]), "got int"),
    "half a character": (write(datatype="BYTES", data=["\ud800", "b"]), "texts that UTF-8 can write"),
    "a type that JSON has not": (write(datatype="FP16"), "expected one of BOOL"),
    "uneven lists": (write(data=[[1], 2]), "got list at element 0"),
    "a long text for a number": (write(data=[1, "x" * 9000]), f"got str '{'x' * 98} at element 1"),
    "lists of different lengths": (write(shape=[3], data=[[1, 2], [3]]), "as long as each other, got lengths [1, 2]"),
    "columns for rows": (
        write(shape=[1, 3, 2], data=[[[1, 2, 3], [1, 2, 3]]]),
        "shape [1, 3, 2] says, got lengths [1, 2, 3]",
    ),
    "columns without the first axis": (write(shape=[1, 3, 2], data=[[1, 2, 3], [1, 2, 3]]), "got lengths [2, 3]"),
    "no inputs": (b"{}", "expected the keys"),
    "an axis over its limit": (
        write(shape=[0, 1 << 31], data=[]),
        "shape[1]: expected `int` <= 2147483647, got 2147483648",
    ),
    "a tensor that is not there": (write(shape=[(256 << 20) // 8 + 1]), "expected 33554433 elements"),
    "axes that are too much multiplied": (write(shape=[(1 << 31) - 1] * 16), "elements for its shape, got 2"),
    "a negative shape": (write(shape=[-1, 2]), "got -1"),
    "too many axes": (write(shape=[(1 << 31) - 1] * 17), "inputs[0].shape: expected `array` of length <= 16"),
    "too many inputs": (json.dumps({"inputs": [json.loads(write())["inputs"][0]] * 65}).encode(), "length <= 64"),
    "a number over 64 bits as a parameter": (
        json.dumps({"inputs": [], "parameters": {"x": 1 << 70}}).encode(),
        "64 bits",
    ),
    "half a character as a parameter": (json.dumps({"inputs": [], "parameters": {"x": "\ud800"}}).encode(), "UTF-8"),
    "a shape of truth": (write(shape=[True, 2]), "expected `int`, got True"),
    "too little data": (write(shape=[1, 3]), "expected 3 elements for its shape, got 2"),
    "an unknown type": (write(datatype="INT128"), "expected one of BOOL"),
    "shared memory": (write(data=None, parameters={"shared_memory_region": "x"}), "shared memory is not offered"),
    "data and bytes": (write(parameters={"binary_data_size": 16}), "got 16 and data"),
    "more bytes than there are": (write(data=None, parameters={"binary_data_size": 16}), "0 bytes that are left"),
    "bytes of truth": (write(data=None, parameters={"binary_data_size": True}), "got True"),
    "a parameter of nothing": (
        b'{"inputs": [], "parameters": {"x": null}}',
        "parameters[...]: expected `bool | int | float | str`",
    ),
    "more JSON than is read": (b" " * (9 << 20), "send large tensors as binary data"),
}
if sys.version_info < (3, 12):  # whose limit is the lowest; newer ones refuse deeper texts in the same way
    WRONG |= {
        "depth": (b"[" * 1100, "nested too deep"),
        "depth in data": (write().replace(b"[1, 2]}", b"[" * 1100 + b"]" * 1100 + b"}"), "nested too deep"),
    }


@pytest.mark.parametrize("name", WRONG)
def test_wrong_body(name):
    data, words = WRONG[name]
    with pytest.raises(InvalidRequestError) as caught:
        read_request(data, None, "ranker")
    assert words in str(caught.value)


def test_bytes_after_the_header_have_to_be_all_used():
    header = write(data=None, parameters={"binary_data_size": 16})
    assert read_inputs(header + bytes(16), len(header)) == [bytes(16)]
    for tail in (bytes(15), bytes(17)):
        with pytest.raises(InvalidRequestError, match=str(len(tail))):
            read_request(header + tail, len(header), "ranker")


def read_inputs(data: bytes, header_length: int | None = None) -> list[bytes]:
    message, _ = read_request(data, header_length, "ranker")
    return list(message.raw_input_contents)


def test_strings_leave_as_bytes_with_their_lengths():
    expected = struct.pack("<I", 2) + "é".encode() + struct.pack("<I", 0)
    assert read_inputs(write(datatype="BYTES", data=["é", ""])) == [expected]


def test_a_tensor_without_elements_is_valid():
    message, _ = read_request(write(shape=[1, 0, 4], data=[]), None, "ranker")
    assert (list(message.inputs[0].shape), list(message.raw_input_contents)) == ([1, 0, 4], [b""])


@pytest.mark.parametrize("shape", [(6,), (1, 6), (3, 2), (1, 3, 2), (1, 3, 2, 1), (1, 3, 1, 2), (1, 1, 6)])
def test_data_is_flat_or_as_its_shape(shape):
    data = np.arange(6).reshape(shape)
    assert read_inputs(write(shape=[1, 3, 2], data=data.tolist())) == [data.tobytes()]


def test_whole_numbers_written_as_floats_are_taken_where_they_are_exact():
    assert read_inputs(write(data=[690.0, -0.0])) == [np.array([690, 0]).tobytes()]
    assert read_inputs(write(data=[[2.0**53], [1]])) == [np.array([2**53, 1]).tobytes()]
    for number in (690.5, 2.0**53 + 2, 1e300):
        with pytest.raises(InvalidRequestError, match="expected whole numbers for INT64, got float"):
            read_inputs(write(data=[1, number]))


@pytest.mark.parametrize("text", ["", "-1", "+1", "1 ", "0x1", "1e1", "11", "9" * 30, "²", "1_0"])
def test_a_header_length_is_a_whole_number_within_the_body(text):
    with pytest.raises(InvalidRequestError, match="up to the body's 10 bytes"):
        read_header_length(text, 10)
    assert read_header_length("10", 10) == 10
    assert read_header_length(None, 10) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"parameters": {"binary_data_output": True}, "outputs": [{"name": "scores"}]}, False),
        ({"outputs": [{"name": "scores", "parameters": {"binary_data": True}}]}, True),
    ],
)
def test_which_outputs_are_wanted_as_binary_data(changes, expected):
    message, form = read_request(json.dumps({**json.loads(write()), **changes}).encode(), None, "ranker")
    assert form.wants_binary("scores") is expected
    assert not message.parameters


def make_reply(**arrays: np.ndarray) -> bytes:
    message = service_pb2.ModelInferResponse(model_name="ranker", model_version="1", id="7")
    names = {np.dtype(kind): name for name, kind in NUMPY.items()}
    for name, array in arrays.items():
        message.outputs.add(name=name, datatype=names[array.dtype], shape=array.shape)
        message.raw_output_contents.append(array.tobytes())
    return bytes(message.SerializeToString())


@pytest.mark.parametrize("datatype", sorted(NUMPY))
@pytest.mark.parametrize("is_binary", [False, True])
def test_a_reply_has_every_element_of_its_outputs(datatype, is_binary):
    array = np.random.default_rng(0).integers(0, 2, (2, 3)).astype(NUMPY[datatype])
    if "FP" in datatype:
        array += np.random.default_rng(1).standard_normal((2, 3)).astype(array.dtype)
    body, length = write_reply(make_reply(x=array, y=array), ReplyFormat(is_binary, {"y": True}))
    table = json.loads(body[:length])
    assert (table["id"], table["model_name"], [each["shape"] for each in table["outputs"]]) == (
        "7",
        "ranker",
        [[2, 3]] * 2,
    )
    assert length is not None
    if is_binary:
        assert body[length:] == 2 * array.tobytes()
    else:
        np.testing.assert_array_equal(np.array(table["outputs"][0]["data"], array.dtype), array.ravel())
        assert body[length:] == array.tobytes()


def test_what_json_cannot_hold_is_refused_with_the_remedy():
    large = np.zeros(MAX_JSON_TENSOR_BYTES // 4 + 1, np.float32)
    message = service_pb2.ModelInferResponse()
    message.outputs.add(name="x", datatype="FP16", shape=[1])
    message.raw_output_contents.append(b"ab")
    for reply in (make_reply(x=large), message.SerializeToString()):
        with pytest.raises(InvalidRequestError, match=r"x: .*ask for binary data"):
            write_reply(reply, ReplyFormat(is_binary=False, by_name={}))
        write_reply(reply, ReplyFormat(is_binary=True, by_name={}))


@pytest.mark.parametrize("data", [b"\1\0", b"\xff\xff\xff\xffab"])
def test_strings_that_do_not_fill_a_reply_are_the_servers_fault(data):
    message = service_pb2.ModelInferResponse()
    message.outputs.add(name="x", datatype="BYTES", shape=[1])
    message.raw_output_contents.append(data)
    with pytest.raises(ServerFaultError, match="x: "):
        write_reply(message.SerializeToString(), ReplyFormat(is_binary=False, by_name={}))
