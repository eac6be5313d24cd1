"""Columns of Parquet and CSV files as numbers; invalid cells are counted and reported by row."""

from collections.abc import Sequence
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
    """Faults of rows: how often, and the first few row numbers (1 is the first row after the header).

    A row with two faults is counted in both kinds and once in `rows`.
    """

    rows: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)

    def describe(self) -> str:
        """Return a line a kind."""
        lines = []
        for kind, count in self.kinds.items():
            shown = ", ".join(str(number) for number in self.examples[kind])
            lines.append(f"  {count} × {kind}: row {shown}{', …' if count > len(self.examples[kind]) else ''}")
        return "\n".join(lines)


class Columns:
    """The columns of one file, read with types; rows with invalid cells are no longer `good`."""

    def __init__(self, path: Path, table: pa.Table, crooked: Ids) -> None:
        """Take a file's content.

        Args:
            path: the file, for messages.
            table: its rows.
            crooked: numbers of the rows of the file that are not in the table, as they have too few or too many cells.
        """
        self.path, self.table = path, table
        self.bad = BadRows()
        self.good: Mask = np.ones(len(table), bool)
        self._numbers: Ids = np.delete(np.arange(1, len(table) + len(crooked) + 1), crooked - 1)
        self._crooked = len(crooked)
        self._note("wrong number of columns", crooked)

    def reject(self, kind: str, mask: Mask) -> None:
        """Mark the rows of the mask as bad, with this fault."""
        self._note(kind, self._numbers[mask])
        self.good[mask] = False

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
        self.reject(f"{name} is missing", missing)
        usable, values = _to_integers(column)
        self.reject(f"{name} is not an integer", ~usable & ~missing)
        return np.where(usable, values, 0)

    def read_flags(self, name: str) -> Ids:
        """Return a column of 0 and 1."""
        values = self.read_integers(name)
        self.reject(f"{name} is not 0 or 1", (values != 0) & (values != 1))
        return values

    def read_numbers(self, name: str, low: float, high: float) -> Floats:
        """Return a column of numbers within low..high."""
        column = self.table[name]
        if pa.types.is_string(column.type):
            fits = pc.fill_null(pc.match_substring_regex(column, NUMBER_TEXT), fill_value=False)
            column = pc.utf8_trim_whitespace(pc.if_else(fits, column, pa.scalar(None, pa.string())))
        elif not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            column = pa.chunked_array([pa.nulls(len(column))])
        values: Floats = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy()
        self.reject(f"{name} is not within {low:g}..{high:g}", ~((values >= low) & (values <= high)))
        return values

    def read_names(self, name: str) -> pa.ChunkedArray:
        """Return a column as text: integers and text name the same users."""
        column = self.table[name]
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            self.reject(f"{name} is neither text nor an integer", np.ones(len(column), bool))
            return pa.chunked_array([pa.nulls(len(column), pa.string())])
        text = column.cast(pa.string())
        self.reject(f"{name} is missing", _as_mask(pc.fill_null(pc.equal(text, ""), fill_value=True)))
        return text

    def _note(self, kind: str, numbers: Ids) -> None:
        if len(numbers):
            self.bad.kinds[kind] = self.bad.kinds.get(kind, 0) + len(numbers)
            said = self.bad.examples.setdefault(kind, [])
            said += [int(number) for number in numbers[: EXAMPLES - len(said)]]


def read_csv(path: Path, only: Sequence[str] | None = None) -> Columns:
    """Read a CSV file (UTF-8, comma, a header) as text, empty cells as null; `only` these of its columns.

    Raises:
        LogError: the file cannot be read, or has not these columns.
    """
    try:
        with path.open("rb") as file:
            line = file.readline().decode("utf-8-sig", errors="replace").strip("\r\n")
        names = [name.strip().strip('"') for name in line.split(",")]
        missing = [name for name in only or () if name not in names]
        if missing:
            raise LogError(f"{path}: expected the columns {', '.join(only or ())}: missing {', '.join(missing)}")
        return _parse_csv(path, path, names, only)
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"{path}: cannot be read: {error}") from error


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
        return _parse_csv(path, pa.BufferReader(content), list(names), None, UNIT_SEPARATOR)
    except (pa.ArrowException, OSError) as error:
        raise LogError(f"{path}: cannot be read: {error}") from error


def _parse_csv(
    path: Path, source: Any, names: list[str], only: Sequence[str] | None, separator: str | None = None
) -> Columns:
    """Read cells as text. A separator means: no header and no quotes."""
    crooked: list[int] = []
    header = int(separator is None)

    def skip(row: pa.csv.InvalidRow) -> str:
        crooked.append(row.number - header)
        return "skip"

    table = pa.csv.read_csv(
        source,
        # Row numbers are known only with one thread.
        read_options=pa.csv.ReadOptions(use_threads=False, column_names=names, skip_rows=header),
        parse_options=pa.csv.ParseOptions(
            delimiter=separator or ",", quote_char='"' if header else False, invalid_row_handler=skip
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()),
            include_columns=only,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    return Columns(path, table, np.array(crooked, np.int64))


def number_names(text: pa.ChunkedArray) -> tuple[tuple[str, ...], Ids]:
    """Return the different names, sorted, and each row's index in them."""
    encoded = text.combine_chunks().dictionary_encode()
    names = np.array(encoded.dictionary.to_pylist(), dtype=object)
    order = np.argsort(names, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return tuple(names[order]), place[encoded.indices.to_numpy(zero_copy_only=False)]


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
