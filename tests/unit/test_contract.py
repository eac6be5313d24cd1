"""The contract: configurations, validation with its messages, the manifest and the request as JSON."""

import copy
import dataclasses
import json
import re
import tomllib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcast.protocol.config import CONFIGS, MIN_VOCABULARY, list_configs, load_config, parse_config
from kvcast.protocol.errors import (
    ERRORS,
    ArtefactError,
    ConfigError,
    ErrorKind,
    InvalidRequestError,
    KvcastError,
    read_tagged,
    tag_message,
)
from kvcast.protocol.golden import Golden
from kvcast.protocol.locate import locate
from kvcast.protocol.manifest import CONTRACT_VERSION, Dims, Manifest, Parity, parse_manifest, read_manifest
from kvcast.protocol.request import RankRequest
from kvcast.protocol.schema import Field, KVLayout, Limits
from kvcast.protocol.validation import (
    check_candidates,
    check_finite,
    check_history,
    check_kv_id,
    check_same_users,
    check_user_kv,
)

FIELDS = (Field("item", 100), Field("action", 64))
LIMITS = Limits(history=10, candidates=5)
LAYOUT = KVLayout(layers=2, heads=3, key_rows=6, value_columns=5, lead_slots=1, mask_row=5, mask_value=-1e9)


def test_shipped_configurations():
    assert {"bench", "demo", "hstu", "seed", "tiny", "tiny-hstu"} <= set(list_configs())
    for name in list_configs():
        config = load_config(name)
        assert config.name == name
        assert {"item", "action"} <= {field.name for field in config.schema.history_fields}
        assert [field.name for field in config.schema.candidate_fields] == ["item", "category", "brand", "price_bucket"]
        assert all(field.vocab_size >= MIN_VOCABULARY for field in config.schema.candidate_fields)
    bench, seed = load_config("bench"), load_config("seed")
    assert (bench.workload.history, bench.network.width, bench.network.heads, bench.network.layers) == (1000, 256, 4, 4)
    assert (seed.workload.history, seed.network.width, seed.network.heads, seed.network.layers) == (1000, 768, 12, 50)
    assert bench.limits.candidates >= 1000
    assert bench.limits.history >= 4000


def read_tiny_table() -> dict[str, Any]:
    text = (locate(CONFIGS) / "tiny.toml").read_text()
    return tomllib.loads(text)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["limits"], {"history": 5}, "limits: expected the keys ['candidates', 'history'], got ['history']"),
        (["network", "width"], 33, "network.width: expected a multiple of heads = 2, got 33"),
        (["limits"], {"history": 7, "candidates": 5}, "limits.history: expected at least 8, got 7"),
        (["network", "layers"], 0, "network.layers: expected `int` >= 1, got 0"),
        (["network", "layers"], True, "network.layers: expected `int`, got True"),
        (["limits", "candidates"], "5", "limits.candidates: expected `int`, got '5'"),
        (
            ["network", "family"],
            "transformer.py",
            "network.family: expected a family's short name, 'package.module:Class' or 'file.py:Class', got",
        ),
        (["vocabularies", "item"], 1, "vocabularies.item: expected `int` >= 2, got 1"),
        (["vocabularies", "class"], 9, "vocabularies: expected names that are no keywords of Python"),
        (["vocabularies"], 63, "vocabularies: expected `object`, got 63"),
        (["name"], 5, "name: expected `str`, got 5"),
        (["weights"], "trained.pt", "weights: expected a file *.safetensors, got 'trained.pt'"),
        (
            ["fields", "candidates"],
            ["item", "colour"],
            "fields.candidates: expected names listed under [vocabularies], got ['colour']",
        ),
        (["fields", "history"], [], "fields.history: expected a list of different names, at least one, got []"),
        (["fields", "history"], ["item", "item"], "fields.history: expected a list of different names, at least one"),
        (["fields", "history"], [["item"]], "fields.history[0]: expected `str`, got ['item']"),
        (["workload", "history"], 1000, "workload: expected it within limits"),
        (["speed"], 3, "config: expected the keys"),
        (["network"], 3, "network: expected the keys ['family', 'heads', 'layers', 'options', 'width'], got 3"),
    ],
)
def test_a_wrong_configuration_is_named(path, value, words):
    table = copy.deepcopy(read_tiny_table())
    inner = table
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        parse_config(table)
    assert words in str(caught.value)


def test_a_configuration_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=", ".join(list_configs())):
        load_config("huge")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(str(broken))


def test_a_configuration_from_a_path(tmp_path):
    path = tmp_path / "own.toml"
    text = (locate(CONFIGS) / "tiny.toml").read_text()
    path.write_text(text.replace('name = "tiny"', 'name = "own"'))
    assert load_config(str(path)) == dataclasses.replace(load_config("tiny"), name="own")


def test_weights_lie_beside_the_configuration_and_are_no_part_of_it(tmp_path):
    path = tmp_path / "demo.toml"
    text = (locate(CONFIGS) / "demo.toml").read_text()
    path.write_text(text.replace("../weights/demo.safetensors", "other.safetensors"))
    own, shipped = load_config(str(path)), load_config("demo")
    assert own.weights == tmp_path / "other.safetensors"  # which nobody has trained yet
    assert shipped.weights is not None
    assert shipped.weights.is_file()
    assert own == shipped
    assert own.list_settings() == shipped.list_settings()
    assert "safetensors" not in json.dumps(own.list_settings())
    assert load_config("tiny").weights is None


def test_valid_histories_pass_whatever_their_integer_type():
    for dtype in (np.int8, np.uint8, np.int32, np.uint32, np.int64):
        checked = check_history(np.ones((2, 3, 2), dtype), FIELDS, LIMITS)
        assert checked.dtype == np.int64
        assert checked.shape == (2, 3, 2)
    assert check_history(np.zeros((1, 0, 2)), FIELDS, LIMITS).shape == (1, 0, 2)


WRONG_IDS = [
    (np.ones((0, 3, 2), int), "expected at least 1 user on the batch axis, got 0"),
    (np.ones((3, 2), int), "expected rank 3 [users, events, fields], got shape [3, 2]"),
    (np.ones((1, 3, 1), int), "expected 2 fields (item, action) per event, got 1"),
    (np.ones((1, 3, 2)), "expected dtype INT64, got float64"),
    (np.ones((1, 3, 2), bool), "expected dtype INT64, got bool"),
    (np.ones((1, 3, 2), np.uint64), "expected dtype INT64, got uint64"),
    (np.full((1, 3, 2), None), "expected dtype INT64, got object"),
    (np.ones((1, 11, 2), int), "expected at most L = 10 events, got 11: send the newest (truncate=True of the client)"),
    (np.full((1, 3, 2), 64), "expected field 'action' within 0..63, got 64 at event 0"),
    (np.full((2, 3, 2), -1), "expected field 'item' within 0..99, got -1 at event 0 of user 0"),
]


@pytest.mark.parametrize(("array", "words"), WRONG_IDS)
def test_wrong_histories(array, words):
    with pytest.raises(InvalidRequestError) as caught:
        check_history(array, FIELDS, LIMITS)
    assert str(caught.value) == f"history: {words}"


@given(st.integers(-(2**63), 2**63 - 1))
def test_ids_are_accepted_exactly_within_the_vocabulary(value):
    history = np.array([[[1, 1], [value, 1]]])
    if 0 <= value < 100:
        assert check_history(history, FIELDS, LIMITS)[0, 1, 0] == value
    else:
        with pytest.raises(InvalidRequestError, match="at event 1"):
            check_history(history, FIELDS, LIMITS)


@pytest.mark.parametrize("count", [0, 6])
def test_wrong_numbers_of_candidates(count):
    with pytest.raises(InvalidRequestError, match=f"candidates: expected N = 1 to 5 candidates, got {count}"):
        check_candidates(np.ones((1, count, 2), int), FIELDS, LIMITS)


def make_kv(users: int = 1, history: int = 4) -> tuple[np.ndarray, np.ndarray]:
    keys = np.ones((users, *LAYOUT.keys_shape(history)), np.float32)
    return keys, np.ones((users, *LAYOUT.values_shape(history)), np.float32)


def test_user_kv_of_the_layout_passes():
    for users, history in ((1, 0), (3, 10)):
        check_user_kv(*make_kv(users, history), LAYOUT, LIMITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda keys, values: (keys[0], values), "user_keys"),
        (lambda keys, values: (keys[:0], values[:0]), "user_keys: expected at least 1 user on the batch axis, got 0"),
        (lambda keys, values: (keys[:, :1], values), "user_keys: expected shape [1, 2, 3, 6, 5]"),
        (lambda keys, values: (keys, values[..., :4]), "user_values: expected shape [1, 2, 3, 5, 5]"),
        (lambda keys, values: (keys[..., :0], values), "1 to 11 slots"),
        (lambda keys, values: (np.repeat(keys, 9, axis=-1), values), "1 to 11 slots"),
        (lambda keys, values: (keys, np.repeat(values, 2, axis=0)), "user_values"),
        (
            lambda keys, values: (keys * np.inf, values),
            "user_keys: expected finite numbers, got inf at [0, 0, 0, 0, 0]",
        ),
    ],
)
def test_wrong_user_kv(change, words):
    keys, values = change(*make_kv())
    with pytest.raises(InvalidRequestError) as caught:
        check_user_kv(keys, values, LAYOUT, LIMITS)
    assert words in str(caught.value)


@given(st.integers(0, 99), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_single_number_that_is_not_finite_is_found(place, value):
    array = np.linspace(-1, 1, 100, dtype=np.float32)
    check_finite("tensor", array)
    array[place] = value
    with pytest.raises(InvalidRequestError, match=f"at \\[{place}\\]"):
        check_finite("tensor", array)


def test_large_numbers_are_not_mistaken_for_infinity():
    check_finite("tensor", np.full(10, 3e38, np.float32))


def test_kv_id_and_users():
    kv_id = bytes(range(32))
    array = np.frombuffer(kv_id, np.uint8)
    check_kv_id(np.stack([array, array]), 2, kv_id.hex())
    with pytest.raises(InvalidRequestError, match="kv_id: expected user KV of kv_id"):
        check_kv_id(np.stack([array, array[::-1]]), 2, kv_id.hex())
    with pytest.raises(InvalidRequestError, match=r"expected shape \[1, 32\], got \[1, 31\]"):
        check_kv_id(array[None, :31], 1, kv_id.hex())
    with pytest.raises(InvalidRequestError, match="candidates: expected 2 users"):
        check_same_users("history", 2, "candidates", 1)


def make_manifest() -> Manifest:
    return Manifest(
        model="doc_fusion", config="own", network="a:B", release="ab" * 32,
        kv_id="cd" * 32,
        history_fields=FIELDS, candidate_fields=FIELDS, limits=LIMITS, workload=load_config("tiny").workload,
        dims=Dims(2, 3, 12, 2), user_kv=LAYOUT, dtype="FP32", opset=20, versions={"torch": "2"},
        parity=Parity(3e-7, 1e-7, 2e-7, 0.1, "ab"), files={"model.onnx": "00"},
    )  # fmt: skip


def test_manifest_survives_json():
    manifest = make_manifest()
    assert parse_manifest(manifest.to_json()) == manifest


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"contract_version": 1}'])
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(ArtefactError, match="manifest"):
        parse_manifest(text)


def test_a_manifest_of_another_contract_is_refused(tmp_path):
    table = json.loads(make_manifest().to_json())
    with pytest.raises(ArtefactError, match=f"contract version {CONTRACT_VERSION}, got {CONTRACT_VERSION + 1}"):
        parse_manifest(json.dumps({**table, "contract_version": CONTRACT_VERSION + 1}))
    with pytest.raises(ArtefactError, match="run the export first"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ('{"history": [], "candidates": []}', "expected the keys ['candidates', 'history', 'scores']"),
        ('{"history": [[true]], "candidates": [], "scores": []}', "history[0][0]: expected `int`, got True"),
        ('{"history": [[1]], "candidates": [[1], [1, 2]], "scores": [1]}', "expected history [L, fields], candidates"),
        ('{"history": [[1]], "candidates": [[1]], "scores": []}', "expected history [L, fields], candidates"),
    ],
)
def test_what_is_no_golden_request_is_named(text, words):
    with pytest.raises(ArtefactError, match=f"golden.json: .*{re.escape(words)}"):
        Golden.from_json(text)


def test_request_survives_json_in_any_column_order():
    schema = load_config("tiny").schema
    request = RankRequest(np.arange(6).reshape(3, 2), np.arange(8).reshape(2, 4))
    again = RankRequest.from_json(request.to_json(schema), schema)
    np.testing.assert_array_equal(again.history, request.history)
    np.testing.assert_array_equal(again.candidates, request.candidates)
    shuffled = json.loads(request.to_json(schema))
    shuffled["candidates"] = [dict(reversed(row.items())) for row in shuffled["candidates"]]
    again = RankRequest.from_json(json.dumps(shuffled), schema)
    np.testing.assert_array_equal(again.candidates, request.candidates)
    empty = RankRequest.from_json('{"history": [], "candidates": []}', schema)
    assert empty.history.shape == (0, 2)
    assert empty.candidates.shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "expected JSON"),
        ("[]", "request: expected the keys ['candidates', 'history'], got []"),
        ('{"history": []}', "got ['history']"),
        ('{"history": [], "candidates": [], "k": 1}', "got ['candidates', 'history', 'k']"),
        ('{"history": {}, "candidates": []}', "history: expected `array`, got {}"),
        ('{"history": [{"item": 1}], "candidates": []}', "[0]: expected the keys ['action', 'item'], got ['item']"),
        ('{"history": [[1, 2]], "candidates": []}', "history[0]: expected the keys ['action', 'item'], got [1, 2]"),
        ('{"history": [{"item": 1.5, "action": 1}], "candidates": []}', "history[0].item: expected `int`, got 1.5"),
        ('{"history": [{"item": true, "action": 1}], "candidates": []}', "history[0].item: expected `int`, got True"),
        ('{"history": [{"item": 1e400, "action": 1}], "candidates": []}', "history[0].item: expected `int`, got inf"),
        ('{"history": [{"item": 9223372036854775808, "action": 1}], "candidates": []}', "item: expected `int` <= 92"),
    ],
)  # fmt: skip
def test_a_wrong_request_file_is_named(text, words):
    with pytest.raises(InvalidRequestError) as caught:
        RankRequest.from_json(text, load_config("tiny").schema)
    assert words in str(caught.value)


def test_error_kinds_are_spelled_as_triton_spells_them():
    grpc = pytest.importorskip("grpc")
    for kind in ErrorKind:
        assert hasattr(grpc.StatusCode, kind.grpc_status)
    assert {kind.http_status for kind in ErrorKind} == {400, 500, 503, 504}
    for each in all_subclasses(KvcastError):
        assert isinstance(each.kind, ErrorKind)
    for reason, error in ERRORS.items():
        assert reason == error.kind.reason == error.kind.name


@pytest.mark.parametrize("prefix", ["", "in ensemble 'ranker', "])
def test_a_models_error_is_read_as_it_was_written(prefix):
    for kind in ERRORS.values():
        read = read_tagged(prefix + tag_message(kind("x: [BUSY] y")))
        assert (type(read), str(read)) == (kind, "x: [BUSY] y")
    for text in ("BUSY", "[BUSY]", "x: [BUSY] y", "[NOTHING] x", " [BUSY] x", "[request id: [BUSY] x] y"):
        assert read_tagged(prefix + text) is None


def all_subclasses(kind: type) -> set[Any]:
    return {kind_below for below in kind.__subclasses__() for kind_below in {below, *all_subclasses(below)}}
