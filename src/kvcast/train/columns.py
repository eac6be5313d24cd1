"""Columns of Parquet and CSV files as numbers; invalid cells are counted and reported by row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from kvcast.protocol.errors import ErrorKind, KvcastError

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
OnBadRows = Literal["stop", "skip"]

# Arrow needs one byte between cells; this one does not occur in text.
UNIT_SEPARATOR = "\x1f"
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
    """Faults of rows: how often, where the first few are, and what the first one has instead.

    A row with two faults is counted in both kinds and once in `rows`. unit: what is numbered from 1: lines of text, or
    rows of Parquet.
    """

    unit: str = "line"
    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    got: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, numbers: Ids, got: Callable[[], str]) -> None:
        """Count rows, by number, with a fault; `got` says what the first one of them has."""
        if len(numbers):
            self.got[kind] = self.got.get(kind) or got()
            self.kinds[kind] = self.kinds.get(kind, 0) + len(numbers)
            said = self.examples.setdefault(kind, [])
            said += [int(number) for number in numbers[: EXAMPLES - len(said)]]

    def describe(self) -> str:
        """Return a line a kind."""
        lines = []
        for kind, count in self.kinds.items():
            shown = ", ".join(str(number) for number in self.examples[kind])
            more = ", …" if count > len(self.examples[kind]) else ""
            lines.append(f"  {count} × {kind}: {self.unit} {shown}{more} (got {self.got[kind]})")
        return "\n".join(lines)


class Columns:
    """The columns of one file, read with types; rows with invalid cells are no longer `good`."""

    def __init__(self, path: Path, table: pa.Table, lines: Ids | None = None) -> None:
        """Take a file's content.

        Args:
            path: the file, for messages.
            table: its rows.
            lines: the line of each row, from 1; None: the file has rows and no lines.
        """
        self.path, self.table = path, table
        self.bad = BadRows("row" if lines is None else "line")
        self.good: Mask = np.ones(len(table), bool)
        self._numbers: Ids = np.arange(1, len(table) + 1) if lines is None else lines
        self._crooked = 0

    def reject(self, name: str, fault: str, mask: Mask) -> None:
        """Mark the rows of the mask as bad, because this column has this fault."""
        column = self.table[name]
        numbers = self._numbers[mask]
        self.bad.note(f"{name} {fault}", numbers, lambda: _show(column[int(np.flatnonzero(mask)[0])].as_py()))
        self.good[mask] = False

    def reject_crooked(self, lines: Ids, got: str) -> None:
        """Count lines that are not in the table, because they have too few or too many cells."""
        self._crooked += len(lines)
        self.bad.note("wrong number of columns", lines, lambda: got)

    def settle(self, bad_rows: OnBadRows) -> None:
        """Count the bad rows; called after all columns are read.

        Raises:
            LogError: there are bad rows and `bad_rows` is "stop".
        """
        self.bad.rows = self._crooked + int((~self.good).sum())
        if self.bad.rows and bad_rows == "stop":
            every = len(self.good) + self._crooked
            raise LogError(
                f"{self.path}: {self.bad.rows} of {every} rows are bad; fix them or skip them:\n{self.bad.describe()}"
            )

    def describe_skipped(self) -> list[str]:
        """Return a note on skipped rows, if any."""
        return [f"{self.path.name}: {self.bad.rows} bad rows skipped:\n{self.bad.describe()}"] if self.bad.rows else []

    def read_integers(self, name: str) -> Ids:
        """Return a column as INT64; a cell that is missing or not an integer is bad, and 0 here."""
        column = self.table[name]
        missing = _as_mask(column.is_null(nan_is_null=True))
        self.reject(name, "is missing", missing)
        usable, values = _to_integers(column)
        self.reject(name, "is not an integer", ~usable & ~missing)
        return np.where(usable, values, 0)

    def read_flags(self, name: str) -> Ids:
        """Return a column of 0 and 1."""
        values = self.read_integers(name)
        self.reject(name, "is not 0 or 1", (values != 0) & (values != 1))
        return values

    def read_numbers(self, name: str, low: float, high: float) -> Floats:
        """Return a column of numbers within low..high, which may be infinite."""
        values = _to_numbers(self.table[name])
        fault = f"is not within {low:g}..{high:g}" if math.isfinite(high) else "is not a number"
        self.reject(name, fault, ~((values >= low) & (values <= high)))
        return values

    def read_names(self, name: str) -> pa.ChunkedArray:
        """Return a column as text: integers and text name the same users."""
        column = self.table[name]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            self.reject(name, "is neither text nor an integer", np.ones(len(column), bool))
            return pa.chunked_array([pa.nulls(len(column), pa.string())])
        if pa.types.is_dictionary(column.type) and pa.types.is_string(kind):
            known, index = _unify(column)
            self.reject(name, "is missing", np.append(_as_mask(pc.equal(known, "")), True)[index])
            return column
        text = column.cast(pa.string())
        self.reject(name, "is missing", _as_mask(pc.fill_null(pc.equal(text, ""), fill_value=True)))
        return text


def read_header(path: Path, separator: str = ",") -> list[str]:
    """Return the names in the first line of a text file.

    Raises:
        LogError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            line = file.readline().decode("utf-8-sig", errors="replace").strip("\r\n")
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error}") from error
    return [name.strip().strip('"') for name in line.split(separator)]


def read_csv(path: Path, only: Sequence[str] | None = None) -> Columns:
    """Read a CSV file (UTF-8, comma, a header) as text, empty cells as null; `only` these of its columns.

    Raises:
        LogError: the file cannot be read, or has not these columns.
    """
    return read_text(path, ",", read_header(path), only=only, header=1)


def read_text(
    path: Path,
    separator: str,
    names: Sequence[str],
    *,
    only: Sequence[str] | None = None,
    header: int = 0,
    quotes: bool = True,
    numbered: bool = False,
) -> Columns:
    """Read a text file (UTF-8), empty cells as null.

    Args:
        path: the file.
        separator: one character between cells.
        names: of all its columns.
        only: the columns to read.
        header: lines to leave out at the beginning.
        quotes: cells may be quoted.
        numbered: number each column's different cells while reading, so that a row takes 4 bytes a column.

    Raises:
        LogError: the file cannot be read, or has not these columns.
    """
    missing = [name for name in only or () if name not in names]
    if missing:
        expected = f"expected the columns {', '.join(only or ())}: missing {', '.join(missing)}"
        raise LogError(f"{path}: {expected}; got {', '.join(names)}")
    kind = pa.dictionary(pa.int32(), pa.string()) if numbered else pa.string()
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, kind), include_columns=only, null_values=[""], strings_can_be_null=True
    )
    parse = pa.csv.ParseOptions(delimiter=separator, quote_char='"' if quotes else False)
    return _parse(path, path, list(names), header, parse, options)


def read_separated(path: Path, separator: str, names: Sequence[str]) -> Columns:
    """Read a file without a header, quotes and escapes, whose cells are apart by a text of any length.

    Raises:
        LogError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        content = text.replace(separator, UNIT_SEPARATOR).encode()
    except OSError as error:
        raise LogError(f"{path}: cannot be read: {error}") from error
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True
    )
    parse = pa.csv.ParseOptions(delimiter=UNIT_SEPARATOR, quote_char=False)
    return _parse(path, pa.BufferReader(content), list(names), 0, parse, options)


def _parse(
    path: Path,
    source: Any,
    names: list[str],
    header: int,
    parse: pa.csv.ParseOptions,
    options: pa.csv.ConvertOptions,
) -> Columns:
    crooked: list[int] = []
    got: list[str] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        crooked.append(row.number)
        got.append(f"{row.actual_columns} instead of {row.expected_columns}")
        return "skip"

    parse.invalid_row_handler = skip
    parse.ignore_empty_lines = False  # or lines could not be counted
    # One thread, for the same reason.
    read = pa.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=header)
    try:
        table = pa.csv.read_csv(source, read_options=read, parse_options=parse, convert_options=options)
    except (pa.ArrowException, OSError) as error:
        wrong = _find_undecodable(path) if "UTF8" in str(error) else None
        raise LogError(f"{path}: {wrong or f'cannot be read: {error}'}") from error
    lines = np.delete(
        np.arange(1 + header, 1 + header + len(table) + len(crooked)), np.array(crooked, int) - header - 1
    )
    if len(table.columns) and (blank := np.all([_as_mask(column.is_null()) for column in table.columns], axis=0)).any():
        with path.open("rb") as file:
            empty = [number for number, line in enumerate(file, 1) if not line.strip()]
        kept = ~(blank & np.isin(lines, empty))
        table, lines = table.filter(pa.array(kept)), lines[kept]
    columns = Columns(path, table, lines)
    if crooked:
        columns.reject_crooked(np.array(crooked, np.int64), got[0])
    return columns


def _find_undecodable(path: Path) -> str | None:
    """Say which line of a file is the first that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"line {number}: expected UTF-8, got the byte 0x{line[error.start]:02x} after "
                    f"{line[: error.start].decode()[-20:]!r}; convert the file (iconv -f latin1 -t utf-8)"
                )
    return None


def _show(cell: Any) -> str:
    return "nothing" if cell is None else repr(cell)


def number_names(text: pa.ChunkedArray) -> tuple[tuple[str, ...], Ids]:
    """Return the different names, sorted, and each row's index in them; -1 for null."""
    known, index = _unify(text if pa.types.is_dictionary(text.type) else text.dictionary_encode())
    names = np.array(known.to_pylist(), dtype=object)
    order = np.argsort(names, kind="stable")
    place = np.full(len(order) + 1, -1)  # the last one is that of null
    place[order] = np.arange(len(order))
    return tuple(names[order]), place[index]


def _unify(column: pa.ChunkedArray) -> tuple[pa.Array, Ids]:
    """Return the different values of a column of numbered ones, and each row's index in them; -1 for null."""
    whole = column.unify_dictionaries().combine_chunks()
    return whole.dictionary, pc.fill_null(whole.indices, -1).to_numpy(zero_copy_only=False)


def _to_numbers(column: pa.ChunkedArray) -> Floats:
    """Return a column as numbers; NaN where a cell is none."""
    if pa.types.is_dictionary(column.type):
        known, index = _unify(column)
        return np.append(_to_numbers(pa.chunked_array([known])), np.nan)[index]
    if pa.types.is_string(column.type):
        fits = pc.fill_null(pc.match_substring_regex(column, NUMBER_TEXT), fill_value=False)
        column = pc.utf8_trim_whitespace(pc.if_else(fits, column, pa.scalar(None, pa.string())))
    elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        column = pa.chunked_array([pa.nulls(len(column))])
    values: Floats = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
    return values


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


def _as_mask(values: Any) -> Mask:
    mask: Mask = values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    return mask.astype(bool)
