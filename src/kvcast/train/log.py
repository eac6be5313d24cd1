"""Click logs from Parquet or CSV, checked row by row against the model's schema.

`read_log` returns columns of numbers, or reports which rows are bad and why; no invalid cell becomes an id. A log is
read as a whole: it has to fit into memory, about 8 bytes a number and as much again during reading.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kvcast.protocol.log import LABEL, OPTIONAL, REQUEST, REQUIRED, TIME, TRUTH, USER, log_fields
from kvcast.protocol.schema import FeatureSchema
from kvcast.train.columns import BadRows, Columns, Ids, LogError, OnBadRows, number_names, read_csv

__all__ = ["BadRows", "Log", "LogError", "OnBadRows", "read_log", "write_log"]


@dataclass(frozen=True)
class Log:
    """The rows of a log, in the order of the file.

    users: a name per user, sorted. user: of each row, an index of `users`. time: seconds. ids: a column a field. label:
    0 or 1. request: rows of a user with the same number were shown together; None: rows of a user with the same time.
    truth: the probabilities of a generated log, if read. bad: the skipped rows.
    """

    users: tuple[str, ...]
    user: Ids
    time: Ids
    ids: dict[str, Ids]
    label: Ids
    request: Ids | None = None
    truth: npt.NDArray[np.float64] | None = None
    bad: BadRows = field(default_factory=BadRows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.time)


def read_log(path: Path | str, schema: FeatureSchema, *, bad_rows: OnBadRows = "stop", truth: bool = False) -> Log:
    """Read a log.

    Args:
        path: a file `*.parquet` or `*.csv` (UTF-8, comma, a header).
        schema: the model's fields; the log has a column for each, and no others.
        bad_rows: "stop": one bad row is an error; "skip": bad rows are left out and counted in `Log.bad`.
        truth: the log is a generated one and has its probabilities with it.

    Raises:
        LogError: the file cannot be read, its columns are not these, or a row is bad and `bad_rows` is "stop".
    """
    fields = log_fields(schema)
    columns = _read_columns(Path(path))
    has = columns.table.column_names
    _check_columns(columns.path, has, _list_columns(schema, truth))
    time, label = columns.read_integers(TIME), columns.read_flags(LABEL)
    columns.reject(TIME, "is negative", time < 0)
    ids = {}
    for one in fields:
        ids[one.name] = columns.read_integers(one.name)
        outside = (ids[one.name] < 0) | (ids[one.name] >= one.vocab_size)
        columns.reject(one.name, f"is not within 0..{one.vocab_size - 1}", outside)
    probabilities = columns.read_numbers(TRUTH, 0, 1) if truth else None
    names = {name: columns.read_names(name) for name in (USER, REQUEST) if name in has}
    columns.settle(bad_rows)
    good = columns.good
    kept = {name: number_names(text.filter(pa.array(good))) for name, text in names.items()}
    users, user = kept[USER]
    return Log(
        users=users,
        user=user,
        time=time[good],
        ids={name: column[good] for name, column in ids.items()},
        label=label[good],
        request=kept[REQUEST][1] if REQUEST in kept else None,
        truth=None if probabilities is None else probabilities[good],
        bad=columns.bad,
    )


def write_log(
    path: Path | str, columns: dict[str, npt.NDArray[Any]], schema: FeatureSchema, *, truth: bool = False
) -> None:
    """Write a log as Parquet or CSV, by the file's name.

    Raises:
        LogError: a column is missing or not one of a log, or the name ends in neither.
    """
    path = Path(path)
    _check_columns(path, list(columns), _list_columns(schema, truth))
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        raise LogError(f"{path}: expected a file *.parquet or *.csv")


def _read_columns(path: Path) -> Columns:
    if path.suffix == ".csv":
        return read_csv(path)
    if path.suffix != ".parquet":
        raise LogError(f"{path}: expected a file *.parquet or *.csv")
    try:
        return Columns(path, pa.parquet.read_table(path))
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"{path}: cannot be read: {error}") from error


def _list_columns(schema: FeatureSchema, truth: bool) -> list[str]:
    return [*REQUIRED, *(one.name for one in log_fields(schema)), *([TRUTH] if truth else [])]


def _check_columns(path: Path, got: list[str], required: list[str]) -> None:
    missing = [name for name in required if name not in got]
    surplus = [name for name in got if name not in {*required, *OPTIONAL}]
    twice = sorted({name for name in got if got.count(name) > 1})
    faults = [
        f"{what} {', '.join(names)}"
        for what, names in (("missing", missing), ("not one of a log:", surplus), ("there twice:", twice))
        if names
    ]
    if faults:
        expected = f"{', '.join(required)} and, if wanted, {', '.join(OPTIONAL)}"
        raise LogError(f"{path}: expected the columns {expected}: {'; '.join(faults)}")
