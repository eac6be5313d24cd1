"""The check of HTTP bodies: what passes comes out the same, and is refused or the same when something changes it."""

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.gateway.inference_body import ELEMENT_BYTES, InferenceBody, check_body, read_header_length
from kvcast.protocol.errors import InvalidRequestError

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
def test_a_checked_body_keeps_every_tensor_and_checks_the_same_again(body):
    data, length, arrays = body
    checked = check_body(data, length)
    assert [bytes(tensor) for tensor in checked.tensors] == [array.tobytes() for array in arrays]
    assert [entry["shape"] for entry in checked.header["inputs"]] == [list(array.shape) for array in arrays]
    table = json.loads(data[:length])
    assert {key: checked.header.get(key) for key in ("id", "outputs")} == {
        key: table.get(key) for key in ("id", "outputs")
    }
    assert checked.header.get("parameters", {}) == table.get("parameters", {})
    assert "unheard_of" not in checked.header
    again = check_body(*checked.encode())
    assert again == checked


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
        checked = check_body(data, header_length)
    except InvalidRequestError as error:
        message = str(error)
    else:
        message = ""
        check_agreement(checked)
    assert message.isascii() or message.isprintable()
    assert len(message) < 2000


def check_agreement(checked: InferenceBody) -> None:
    for entry, tensor in zip(checked.header["inputs"], checked.tensors, strict=True):
        if entry["datatype"] != "BYTES":
            assert len(tensor) == int(np.prod(entry["shape"], dtype=np.int64)) * ELEMENT_BYTES[entry["datatype"]]
        assert entry["parameters"]["binary_data_size"] == len(tensor)
    assert check_body(*checked.encode()) == checked


def write(**changes: Any) -> bytes:
    entry = {"name": "history", "shape": [1, 2], "datatype": "INT64", "data": [1, 2], **changes}
    return json.dumps({"inputs": [{key: value for key, value in entry.items() if value is not None}]}).encode()


WRONG = {
    "nothing": (b"", "expected JSON"),
    "garbage": (b"garbage", "expected JSON"),
    "a list": (b"[]", "expected a JSON object, got a list"),
    "another encoding": ('{"inputs":[]}'.encode("utf-16"), "UTF-8"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "expected JSON"),
    "two values": (b"{}{}", "expected JSON"),
    "NaN": (write(datatype="FP32").replace(b"[1, 2]}", b"[1, NaN]}"), "NaN"),
    "an infinity": (write(datatype="FP32").replace(b"[1, 2]}", b"[1, -Infinity]}"), "-Infinity"),
    "a number over every range": (write(datatype="FP64").replace(b"[1, 2]}", b"[1, 1e999]}"), "finite"),
    "a number over its range": (write(datatype="FP32", data=[1, 1e39]), "range of FP32"),
    "a number of 5000 digits": (write().replace(b"[1, 2]}", b"[1, " + b"9" * 5000 + b"]}"), "expected JSON"),
    "a number over 64 bits": (write(data=[1, 2**63]), "range of INT64"),
    "a number below 0 where none is": (write(datatype="UINT8", data=[1, -1]), "range of UINT8"),
    "a fraction": (write(data=[1, 2.5]), "expected whole numbers for INT64, got float"),
    "truth for a number": (write(data=[1, True]), "got bool"),
    "a number for truth": (write(datatype="BOOL", data=[1, 0]), "got int"),
    "numbers for texts": (write(datatype="BYTES", data=[1, 0]), "got int"),
    "half a character": (write(datatype="BYTES", data=["\ud800", "b"]), "half a character"),
    "a type that JSON has not": (write(datatype="FP16"), "FP16 is not a type of JSON"),
    "a key twice": (b'{"inputs":[],"inputs":[]}', '"inputs" twice'),
    "depth": (b"[" * 1100, "nested too deep"),
    "depth in data": (write().replace(b"[1, 2]}", b"[" * 1100 + b"]" * 1100 + b"}"), "nested too deep"),
    "uneven lists": (write(data=[[1], 2]), "got list"),
    "no inputs": (b"{}", "inputs: expected a list"),
    "empty inputs": (b'{"inputs": []}', "expected at least one"),
    "a name twice": (json.dumps({"inputs": [json.loads(write())["inputs"][0]] * 2}).encode(), "each name once"),
    "a name with an end in it": (write(name="history\0x"), "control characters"),
    "an axis over its limit": (write(shape=[0, 1 << 31], data=[]), "2^31 - 1, got 2147483648"),
    "a tensor just over its limit": (write(shape=[(256 << 20) // 8 + 1]), "at most 268435456 bytes"),
    "axes that are too much multiplied": (write(shape=[5793, 5793]), "at most 268435456 bytes"),
    "axes that are too much behind a 0": (write(shape=[0, 5793, 5793], data=[]), "at most 268435456 bytes"),
    "a negative shape": (write(shape=[-1, 2]), "got -1"),
    "a shape of truth": (write(shape=[True, 2]), "got true"),
    "too little data": (write(shape=[1, 3]), "expected 3 elements for its shape, got 2"),
    "an unknown type": (write(datatype="INT128"), "expected one of BOOL"),
    "shared memory": (write(data=None, parameters={"shared_memory_region": "x"}), "shared memory is not offered"),
    "data and bytes": (write(parameters={"binary_data_size": 16}), "got both"),
    "more bytes than there are": (write(data=None, parameters={"binary_data_size": 16}), "0 bytes that are left"),
    "bytes of truth": (write(data=None, parameters={"binary_data_size": True}), "whole number of bytes"),
    "a parameter of nothing": (b'{"inputs": [], "parameters": {"x": null}}', "parameters.x"),
    "a sequence flag that is a number": (b'{"inputs": [], "parameters": {"sequence_start": 1}}', "true or false"),
    "a long sequence id": (
        json.dumps({"inputs": [], "parameters": {"sequence_id": "x" * 129}}).encode(),
        "at most 128 characters",
    ),
    "a long id": (json.dumps({"inputs": [], "id": "x" * 5000}).encode(), "at most 1024 characters"),
    "more JSON than is read": (b" " * (9 << 20), "send large tensors as binary data"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_body(name):
    data, words = WRONG[name]
    with pytest.raises(InvalidRequestError) as caught:
        check_body(data)
    assert words in str(caught.value)


def test_bytes_after_the_header_have_to_be_all_used():
    header = write(data=None, parameters={"binary_data_size": 16})
    assert check_body(header + bytes(16), len(header)).tensors == (bytes(16),)
    for tail in (bytes(15), bytes(17)):
        with pytest.raises(InvalidRequestError, match=str(len(tail))):
            check_body(header + tail, len(header))


@pytest.mark.parametrize("tail", [b"\1\0\0\0a\xff\xff\xff\xff", b"\1\0\0\0a\0\0\0", bytes(12), b"\xff\xff\xff\xffaaaa"])
def test_strings_have_to_fill_their_bytes(tail):
    header = write(data=None, datatype="BYTES", parameters={"binary_data_size": len(tail)})
    with pytest.raises(InvalidRequestError, match="expected 2 strings"):
        check_body(header + tail, len(header))


def test_strings_leave_as_bytes_with_their_lengths():
    checked = check_body(write(datatype="BYTES", data=["é", ""]))
    assert checked.tensors == (struct.pack("<I", 2) + "é".encode() + struct.pack("<I", 0),)
    assert check_body(*checked.encode()) == checked


def test_a_tensor_without_elements_is_valid():
    body = write(shape=[1, 0, 4], data=[])
    assert check_body(body, len(body)) == InferenceBody(
        {
            "inputs": [
                {"name": "history", "shape": [1, 0, 4], "datatype": "INT64", "parameters": {"binary_data_size": 0}}
            ]
        },
        (b"",),
    )


@pytest.mark.parametrize("text", ["", "-1", "+1", "1 ", "0x1", "1e1", "11", "9" * 30, "²", "1_0"])
def test_a_header_length_is_a_whole_number_within_the_body(text):
    with pytest.raises(InvalidRequestError, match="up to the body's 10 bytes"):
        read_header_length(text, 10)
    assert read_header_length("10", 10) == 10
    assert read_header_length(None, 10) is None


def test_json_alone_wants_json_back_unless_it_says_otherwise():
    assert check_body(write()).header["parameters"] == {"binary_data_output": False}
    table = {**json.loads(write()), "parameters": {"binary_data_output": True}}
    assert check_body(json.dumps(table).encode()).header["parameters"] == {"binary_data_output": True}
