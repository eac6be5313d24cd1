"""Click logs from Parquet or CSV, checked row by row against the model's schema.

`read_log` returns columns of numbers or says which rows are bad and why; nothing that is wrong becomes an id. It knows
the columns of a log (`contract/log.py`); it does not know what requests, splits or models are. A log is read as a
whole: it has to fit into memory, about 8 bytes a number and as much again while it is read.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from kvcast.contract.errors import ErrorKind, KvcastError
from kvcast.contract.log import LABEL, OPTIONAL, REQUEST, REQUIRED, TIME, TRUTH, USER, log_fields
from kvcast.contract.schema import FeatureSchema

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

# Row numbers that a report names of each kind.
EXAMPLES = 5
INTEGER_TEXT = r"^\s*[+-]?[0-9]{1,18}\s*$"
NUMBER_TEXT = r"^\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
LARGEST = pa.scalar((1 << 63) - 1, pa.uint64())
# Doubles beyond this do not stand for one integer.
LARGEST_EXACT = float(1 << 53)


class LogError(KvcastError):
    """A log, or a data set that a log is made from, is not as documented."""

    kind: ClassVar[ErrorKind] = ErrorKind.INVALID_ARGUMENT


@dataclass
class BadRows:
    """What is wrong with rows: how often, and the first few row numbers (1 is the first row after the header).

    A row with two faults is counted in both kinds and once in `rows`.
    """

    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def note(self, kind: str, numbers: npt.NDArray[np.intp]) -> None:
        """Count rows of a kind; `numbers` are ascending row numbers."""
        if len(numbers):
            self.kinds[kind] = self.kinds.get(kind, 0) + len(numbers)
            self.examples[kind] = (self.examples.get(kind, []) + [int(number) for number in numbers[:EXAMPLES]])[
                :EXAMPLES
            ]

    def describe(self) -> str:
        """Return a line a kind."""
        lines = []
        for kind, count in self.kinds.items():
            shown = ", ".join(str(number) for number in self.examples[kind])
            lines.append(f"  {count} × {kind}: row {shown}{', …' if count > len(self.examples[kind]) else ''}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Log:
    """The rows of a log, in the order of the file.

    users: a name per user, sorted. user: whose row it is, as an index of `users`. time: seconds. ids: a column a field.
    label: 0 or 1. request: what was shown together, as integers that mean nothing else; None: what one user saw at one
    time. truth: the probabilities of a generated log, if asked for. bad: what was skipped.
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


def read_log(
    path: Path | str, schema: FeatureSchema, *, bad_rows: Literal["stop", "skip"] = "stop", truth: bool = False
) -> Log:
    """Read a log.

    Args:
        path: a file `*.parquet` or `*.csv` (UTF-8, comma, a header).
        schema: the model's fields; the log has a column for each, and no others.
        bad_rows: "stop": one bad row is an error; "skip": bad rows are left out and counted in `Log.bad`.
        truth: the log is a generated one and has its probabilities with it.

    Raises:
        LogError: the file cannot be read, its columns are not these, or a row is bad and `bad_rows` is "stop".
    """
    path = Path(path)
    sizes = {one.name: one.vocab_size for one in log_fields(schema)}
    bad = BadRows()
    table, rows = _read_table(path, bad)
    _check_columns(path, table.column_names, [*REQUIRED, *sizes, *([TRUTH] if truth else [])])
    good = np.ones(len(table), bool)

    def reject(kind: str, mask: Mask) -> None:
        bad.note(kind, rows[mask])
        good[mask] = False

    numbers = {name: _read_integers(table[name], name, reject) for name in (TIME, LABEL, *sizes)}
    _check_ranges(numbers, sizes, reject)
    probabilities = _read_truth(table[TRUTH], reject) if truth else None
    names = {name: _read_names(table[name], name, reject) for name in (USER, REQUEST) if name in table.column_names}
    every = len(table) + bad.rows
    bad.rows += int((~good).sum())
    if bad.rows and bad_rows == "stop":
        raise LogError(f"{path}: {bad.rows} of {every} rows are bad; mend them or skip them:\n{bad.describe()}")
    users, user = _number_names(names[USER], good)
    return Log(
        users=users,
        user=user,
        time=numbers[TIME][good],
        ids={name: numbers[name][good] for name in sizes},
        label=numbers[LABEL][good],
        request=_number_names(names[REQUEST], good)[1] if REQUEST in names else None,
        truth=None if probabilities is None else probabilities[good],
        bad=bad,
    )


def write_log(
    path: Path | str, columns: dict[str, npt.NDArray[Any]], schema: FeatureSchema, *, truth: bool = False
) -> None:
    """Write a log as Parquet or CSV, by the file's name.

    Raises:
        LogError: a column is missing or not one of a log, or the name ends in neither.
    """
    path = Path(path)
    sizes = [one.name for one in log_fields(schema)]
    _check_columns(path, list(columns), [*REQUIRED, *sizes, *([TRUTH] if truth else [])])
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        raise LogError(f"{path}: expected a file *.parquet or *.csv")


def _read_table(path: Path, bad: BadRows) -> tuple[pa.Table, npt.NDArray[np.intp]]:
    """Return the file's columns, and the row number of each row."""
    try:
        if path.suffix == ".parquet":
            table = pa.parquet.read_table(path)
        elif path.suffix == ".csv":
            table, crooked = read_csv(path)
            bad.note("wrong number of columns", crooked)
            bad.rows += len(crooked)
            every = np.arange(1, len(table) + len(crooked) + 1)
            return table, np.delete(every, crooked - 1)
        else:
            raise LogError(f"{path}: expected a file *.parquet or *.csv")
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"{path}: cannot be read: {error}") from error
    return table, np.arange(1, len(table) + 1)


def read_csv(path: Path) -> tuple[pa.Table, npt.NDArray[np.intp]]:
    """Read a CSV file as text, empty cells as null; return it, and the numbers of rows with too few or many cells."""
    crooked: list[int] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        crooked.append(row.number - 1)  # the header is row 1
        return "skip"

    with path.open("rb") as file:
        header = file.readline().decode("utf-8-sig", errors="replace").strip("\r\n").split(",")
    names = [name.strip().strip('"') for name in header]
    table = pa.csv.read_csv(
        path,
        # Only one thread knows the numbers of rows.
        read_options=pa.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=1),
        parse_options=pa.csv.ParseOptions(invalid_row_handler=skip),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )
    return table, np.array(crooked, np.intp)


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


def _read_integers(column: pa.ChunkedArray, name: str, reject: Callable[[str, Mask], None]) -> Ids:
    """Return a column as INT64; where it is missing or not an integer it is rejected, and 0 here."""
    missing = _as_mask(column.is_null(nan_is_null=True))
    reject(f"{name} is missing", missing)
    usable, values = _to_integers(column)
    reject(f"{name} is not an integer", ~usable & ~missing)
    return np.where(usable, values, 0)


def _to_integers(column: pa.ChunkedArray) -> tuple[Mask, Ids]:
    """Return which cells are integers, and the integers."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _to_integers(column.cast(kind.value_type))
    if pa.types.is_boolean(kind):
        kind, column = pa.int8(), column.cast(pa.int8())
    if pa.types.is_integer(kind):
        fits = pc.less_equal(column, LARGEST) if kind == pa.uint64() else column.is_valid()
        fits = _as_mask(pc.fill_null(fits, fill_value=False))
        return fits, pc.fill_null(column, 0).cast(pa.int64(), safe=False).to_numpy()
    if pa.types.is_floating(kind):
        values = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
        fits = np.isfinite(values) & (np.abs(values) <= LARGEST_EXACT) & (values == np.floor(values))
        return fits, np.where(fits, values, 0).astype(np.int64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        fits = pc.fill_null(pc.match_substring_regex(column, INTEGER_TEXT), fill_value=False)
        digits = pc.utf8_ltrim(pc.utf8_trim_whitespace(pc.if_else(fits, column, "0")), "+")
        return _as_mask(fits), digits.cast(pa.int64()).to_numpy()
    return np.zeros(len(column), bool), np.zeros(len(column), np.int64)


def _check_ranges(numbers: dict[str, Ids], sizes: dict[str, int], reject: Callable[[str, Mask], None]) -> None:
    reject(f"{TIME} is negative", numbers[TIME] < 0)
    reject(f"{LABEL} is not 0 or 1", (numbers[LABEL] != 0) & (numbers[LABEL] != 1))
    for name, size in sizes.items():
        reject(f"{name} is not within 0..{size - 1}", (numbers[name] < 0) | (numbers[name] >= size))


def _read_truth(column: pa.ChunkedArray, reject: Callable[[str, Mask], None]) -> npt.NDArray[np.float64]:
    if pa.types.is_string(column.type):
        fits = pc.fill_null(pc.match_substring_regex(column, NUMBER_TEXT), fill_value=False)
        column = pc.utf8_trim_whitespace(pc.if_else(fits, column, pa.scalar(None, pa.string())))
    values: npt.NDArray[np.float64] = pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    reject(f"{TRUTH} is not within 0..1", ~((values >= 0) & (values <= 1)))
    return values


def _read_names(column: pa.ChunkedArray, name: str, reject: Callable[[str, Mask], None]) -> pa.ChunkedArray:
    """Return a column as text: integers and text name the same users."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        reject(f"{name} is neither text nor an integer", np.ones(len(column), bool))
        return pa.chunked_array([pa.nulls(len(column), pa.string())])
    text = column.cast(pa.string())
    reject(f"{name} is missing", _as_mask(pc.fill_null(pc.equal(text, ""), fill_value=True)))
    return text


def _number_names(text: pa.ChunkedArray, good: Mask) -> tuple[tuple[str, ...], Ids]:
    """Return the names of the good rows, sorted, and each good row's index in them."""
    encoded = text.filter(pa.array(good)).combine_chunks().dictionary_encode()
    names = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(names, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    indices = encoded.indices.to_numpy(zero_copy_only=False)
    return tuple(names[order]), place[indices] if len(names) else np.zeros(0, np.int64)


def _as_mask(values: Any) -> Mask:
    mask: Mask = values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    return mask.astype(bool)
