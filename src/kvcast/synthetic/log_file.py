"""Writes a log with known truth as Parquet or CSV. It needs pyarrow, which nothing else in this room does."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from kvcast.protocol.log import TRUTH
from kvcast.synthetic.truth import PlantedRows

SUFFIXES = (".parquet", ".csv")


def check_name(path: Path) -> None:
    """Check that a log can have this name, before the work of drawing one.

    Raises:
        ValueError: it ends neither in .parquet nor in .csv.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a file *.parquet or *.csv")


def write_rows(path: Path, rows: PlantedRows, *, with_truth: bool = False) -> None:
    """Write rows; `with_truth` adds the probabilities as a column, which readers of a log refuse unless told.

    Raises:
        ValueError: the file's name ends in neither.
    """
    check_name(path)
    table = pa.table(rows.columns | ({TRUTH: rows.truth} if with_truth else {}))
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pa.parquet.write_table(table, path)
