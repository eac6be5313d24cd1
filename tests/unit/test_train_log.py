"""Logs: what is read is what was written, and every kind of bad row is counted, named, and stopped at or skipped."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from kvcast.protocol.config import load_config
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.log import event_fields, log_fields
from kvcast.protocol.schema import FeatureSchema, Field
from kvcast.train.log import LogError, read_log, write_log

SCHEMA = load_config("tiny").schema
HEADER = "user,time,item,category,brand,price_bucket,action,label"


def write_rows(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "log.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def make_columns(rows: int = 5) -> dict[str, np.ndarray]:
    columns = {field.name: np.arange(rows) % 60 for field in log_fields(SCHEMA)}
    users = np.array([f"user {row % 2}" for row in range(rows)], dtype=object)
    return {"user": users, "time": np.arange(rows), "label": np.arange(rows) % 2, **columns}


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_a_log_round_trips(tmp_path, name):
    columns = make_columns()
    write_log(tmp_path / name, columns | {"request": np.array(list("aabbc"), dtype=object)}, SCHEMA)
    log = read_log(tmp_path / name, SCHEMA)
    assert len(log) == 5
    assert [log.users[user] for user in log.user] == list(columns["user"])
    assert np.array_equal(log.time, columns["time"])
    assert np.array_equal(log.label, columns["label"])
    assert all(np.array_equal(log.ids[field.name], columns[field.name]) for field in log_fields(SCHEMA))
    assert log.request is not None
    assert [log.request[row] == log.request[0] for row in range(5)] == [True, True, False, False, False]
    assert log.bad.rows == 0
    assert log.truth is None


# kind of bad row → a row of that kind; what is said to be there instead
BAD_ROWS = {
    "item is missing": "ann,1,,3,4,5,0,1",
    "user is missing": ",1,2,3,4,5,0,1",
    "item is not an integer": "ann,1,shoe,3,4,5,0,1",
    "time is not an integer": "ann,1.5,2,3,4,5,0,1",
    "brand is not an integer": "ann,1,2,3,99999999999999999999,5,0,1",
    "item is not within 0..499": "ann,1,500,3,4,5,0,1",
    "action is not within 0..63": "ann,1,2,3,4,5,-1,1",
    "label is not 0 or 1": "ann,1,2,3,4,5,0,2",
    "time is negative": "ann,-1,2,3,4,5,0,1",
    "wrong number of columns": "ann,1,2,3,4,5,0,1,1",
}
GOT = dict(
    zip(
        BAD_ROWS,
        ["nothing", "nothing", "'shoe'", "'1.5'", f"'{'9' * 20}'", "'500'", "'-1'", "'2'", "'-1'", "9 instead of 8"],
        strict=True,
    )
)


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_named_with_its_number(tmp_path, kind):
    path = write_rows(tmp_path, "ann,1,2,3,4,5,0,1", BAD_ROWS[kind], "bob,2,2,3,4,5,1,1")
    with pytest.raises(LogError) as caught:
        read_log(path, SCHEMA)
    assert f"{path}: 1 of 3 rows are bad" in str(caught.value)
    assert str(caught.value).endswith(f"1 × {kind}: line 3 (got {GOT[kind]})")


def test_lines_are_those_of_the_file_where_some_are_blank(tmp_path):
    path = write_rows(tmp_path, "", "ann,1,2,3,4,5,0,1", "", "  ", "ann,1,shoe,3,4,5,0,1", "ann,1", "")
    with pytest.raises(LogError) as caught:
        read_log(path, SCHEMA)
    assert "item is not an integer: line 6 (got 'shoe')" in str(caught.value)
    assert "wrong number of columns: line 5, 7 (got 1 instead of 8)" in str(caught.value), "spaces are a cell"


def test_text_that_is_not_utf_8_is_named_by_its_line(tmp_path):
    path = write_rows(tmp_path, "ann,1,2,3,4,5,0,1")
    path.write_bytes(path.read_bytes() + "André,1,2,3,4,5,0,1\n".encode("latin-1"))
    with pytest.raises(LogError, match=rf"{path}: line 3: expected UTF-8, got the byte 0xe9 after 'Andr'; convert"):
        read_log(path, SCHEMA)


def test_bad_rows_are_skipped_and_counted_when_asked(tmp_path):
    path = write_rows(tmp_path, "ann,1,2,3,4,5,0,1", *BAD_ROWS.values(), "bob,2,7,3,4,5,1,1")
    log = read_log(path, SCHEMA, bad_rows="skip")
    assert log.users == ("ann", "bob")
    assert log.ids["item"].tolist() == [2, 7]
    assert log.bad.rows == len(BAD_ROWS)
    assert log.bad.kinds == dict.fromkeys(BAD_ROWS, 1)
    numbers = {kind: [3 + row] for row, kind in enumerate(BAD_ROWS)}
    assert log.bad.examples == numbers


def test_a_row_with_two_faults_is_one_bad_row(tmp_path):
    log = read_log(write_rows(tmp_path, "ann,-1,2,3,4,5,0,2"), SCHEMA, bad_rows="skip")
    assert log.bad.rows == 1
    assert log.bad.kinds == {"time is negative": 1, "label is not 0 or 1": 1}
    assert len(log) == 0


def test_only_the_first_few_row_numbers_are_reported(tmp_path):
    path = write_rows(tmp_path, *["ann,1,2,3,4,5,0,2"] * 50)
    with pytest.raises(LogError, match=r"50 × label is not 0 or 1: line 2, 3, 4, 5, 6, … \(got '2'\)"):
        read_log(path, SCHEMA)


def test_wrong_columns_are_listed_all_at_once(tmp_path):
    path = write_rows(tmp_path, header="user,time,item,category,price,colour,label,label")
    with pytest.raises(LogError, match=r"missing brand, price_bucket, action; .*: price, colour; there twice: label"):
        read_log(path, SCHEMA)


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([1.0, 2.5, None]), "not an integer"),
        (pa.array([1.0, float("nan"), float("nan")]), "missing"),
        (pa.array([1, None, None], pa.int8()), "missing"),
        (pa.array(["1", "two", "3"]), "not an integer"),
        (pa.array([1, 2**63 + 1, 2], pa.uint64()), "not an integer"),
        (pa.array([[1], [2], [3]]), "not an integer"),
    ],
)
def test_parquet_columns_of_any_type_are_checked(tmp_path, column, kind):
    columns = make_columns(3) | {"item": column}
    pa.parquet.write_table(pa.table(columns), tmp_path / "log.parquet")
    with pytest.raises(LogError, match=f"× item is {kind}: row "):
        read_log(tmp_path / "log.parquet", SCHEMA)


def test_text_and_integer_user_names_are_equivalent(tmp_path):
    for name, user in (("text", pa.array(["10", "9", "10"])), ("integer", pa.array([10, 9, 10]))):
        pa.parquet.write_table(pa.table(make_columns(3) | {"user": user}), tmp_path / f"{name}.parquet")
    text, integer = (read_log(tmp_path / f"{name}.parquet", SCHEMA) for name in ("text", "integer"))
    assert text.users == integer.users == ("10", "9")
    assert text.user.tolist() == integer.user.tolist() == [0, 1, 0]
    pa.parquet.write_table(pa.table(make_columns(3) | {"user": pa.array([1.0, 2.0, 3.0])}), tmp_path / "float.parquet")
    with pytest.raises(LogError, match="3 × user is neither text nor an integer"):
        read_log(tmp_path / "float.parquet", SCHEMA)


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_the_truth_column_is_read_only_on_request(tmp_path, name):
    columns = make_columns() | {"truth": np.linspace(0, 1, 5)}
    write_log(tmp_path / name, columns, SCHEMA, truth=True)
    with pytest.raises(LogError, match="not one of a log: truth"):
        read_log(tmp_path / name, SCHEMA)
    truth = read_log(tmp_path / name, SCHEMA, truth=True).truth
    assert truth is not None
    assert np.allclose(truth, columns["truth"])


def test_a_probability_outside_0_to_1_is_a_bad_row(tmp_path):
    path = write_rows(
        tmp_path, "a,1,2,3,4,5,0,1,1.5", "a,1,2,3,4,5,0,1,x", "a,1,2,3,4,5,0,1,", header=HEADER + ",truth"
    )
    with pytest.raises(LogError, match=r"3 × truth is not within 0..1: (line 2, 3, 4|row 1, 2, 3) \(got"):
        read_log(path, SCHEMA, truth=True)


def test_a_non_numeric_truth_is_a_bad_row(tmp_path):
    for truth in (pa.array([[1.0], [1.0], [1.0]]), pa.array([2**60, -1, None])):
        pa.parquet.write_table(pa.table(make_columns(3) | {"truth": truth}), tmp_path / "log.parquet")
        with pytest.raises(LogError, match=r"3 × truth is not within 0..1: (line 2, 3, 4|row 1, 2, 3) \(got"):
            read_log(tmp_path / "log.parquet", SCHEMA, truth=True)


def test_an_unreadable_log_file_is_reported_by_name(tmp_path):
    for name in ("nothing.parquet", "nothing.csv", "broken.parquet", "log.txt"):
        path = tmp_path / name
        if not name.startswith("nothing"):
            path.write_text("PAR1 is how it starts")
        with pytest.raises(LogError, match=name):
            read_log(path, SCHEMA)


def test_an_empty_log_can_be_read(tmp_path):
    write_log(tmp_path / "log.parquet", {name: column[:0] for name, column in make_columns().items()}, SCHEMA)
    assert len(read_log(tmp_path / "log.parquet", SCHEMA)) == 0
    assert len(read_log(write_rows(tmp_path), SCHEMA)) == 0


def test_field_names_must_not_clash_with_log_columns():
    fields = (Field("item", 64), Field("time", 64))
    with pytest.raises(ConfigError, match="time"):
        log_fields(FeatureSchema(fields, fields))
    assert [field.name for field in event_fields(SCHEMA)] == ["action"]
