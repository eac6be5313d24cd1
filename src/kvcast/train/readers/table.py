"""Logs of which only the columns are known: any CSV file, and RecBole's atomic files (`.inter`, `.item`).

A row is what a user did to an item, or was shown; which rows are positive is said by a rule. Users, items and all else
are text that gets ids. A file is read block by block, and its cells are numbered meanwhile, so that rows take 4 bytes a
column and each different text is in memory once.
"""

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvcast.protocol.log import LABEL, TIME, USER
from kvcast.train.columns import Columns, Ids, LogError, OnBadRows, number_names, read_header, read_text
from kvcast.train.readers.vocabulary import RawLog, Values, look_up

ITEM, ACTION = "item", "action"
LEFT_OUT = "-"
# Times in seconds are below this, those in milliseconds are above.
LATEST_SECOND = 10**11
# RecBole's own names of columns, and the types that they can have.
RECBOLE = {USER: "user_id", ITEM: "item_id", TIME: "timestamp"}
RECBOLE_TYPES = ("token", "token_seq", "float", "float_seq")
RULE = re.compile(r"(?P<column>[^<>=]+)(?P<sign>>?=)(?P<value>.+)")


@dataclass(frozen=True)
class Table:
    """What is said of a file.

    columns: of a CSV file without a header, the names of its columns in order (`-`: not read); or `name=header` each;
    none: those of the header. label: `column=value,value` or `column>=number`, the rows that are positive; empty:
    those whose column `label` is 1. separator: between cells. milliseconds: times are.
    """

    columns: tuple[str, ...] = ()
    label: str = ""
    separator: str = ","
    milliseconds: bool = False


def read_table(path: Path, bad_rows: OnBadRows, table: Table) -> RawLog:
    """Read any CSV file.

    Offers a field for each column but `user`, `time` and `label`. Where none is called `action`, it is the column of
    the rule, so that every row is an event, or else the label.

    Raises:
        LogError: the file or its columns are not as said; a row is bad and `bad_rows` is "stop".
    """
    if not path.is_file():
        raise LogError(f"{path}: expected a file, found none")
    by_header = [name.partition("=")[::2] for name in table.columns if "=" in name]
    if by_header and len(by_header) < len(table.columns):
        raise LogError(f"columns: expected name=header for all or for none, got {','.join(table.columns)}")
    has_header = bool(by_header) or not table.columns
    named = [f"{name}{place}" if name == LEFT_OUT else name for place, name in enumerate(table.columns)]
    header = read_header(path, table.separator)
    if not has_header and len(header) != len(named):
        raise LogError(f"{path}: line 1: expected the {len(named)} columns that are named, got {len(header)}")
    names = header if has_header else named
    sources = dict(by_header) or {name: name for name in names if not name.startswith(LEFT_OUT)}
    _check_names(path, [name for name, _ in by_header] or [name for name in names if name in sources], names)
    columns = read_text(
        path, table.separator, names, only=list(sources.values()), header=int(has_header), numbered=True
    )
    columns.table = columns.table.rename_columns(list(sources))
    return _make_raw(columns, bad_rows, table)


def read_recbole(folder: Path, bad_rows: OnBadRows, table: Table) -> RawLog:
    """Read RecBole's atomic files of one data set: `*.inter`, and `*.item` if there is one.

    Offers `item`, and under its own name each other column of the two (`class_` for `class`: a field's name is no
    keyword of Python); of a sequence, the first token. Positive is, if no rule is given, a `label` of 1 or a `rating`
    of 4 or more.

    Raises:
        LogError: the files are not there, or not as documented; a row is bad and `bad_rows` is "stop".
    """
    if table.columns or table.separator != Table.separator:
        raise LogError("--columns, --separator: expected none with --from recbole, whose files name their columns")
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise LogError(f"{folder}: expected one file *.inter, found {len(found) or 'none'}")
    columns = _read_atomic(found[0], RECBOLE)
    names = columns.table.column_names
    if not table.label and LABEL not in names and "rating" in names:
        table = replace(table, label="rating>=4")
    raw = _make_raw(columns, bad_rows, table)
    items = found[0].with_suffix(".item")
    if not items.is_file():
        return raw
    features = _read_atomic(items, {ITEM: RECBOLE[ITEM]})
    item = features.read_names(ITEM)
    features.settle(bad_rows)
    kept, item = features.table.filter(pa.array(features.good)), item.filter(pa.array(features.good))
    known = item.cast(pa.string()).combine_chunks()
    place = pc.fill_null(pc.index_in(pa.array(raw.values[ITEM].names), value_set=known), -1).to_numpy()
    place = place.astype(np.int64)[raw.values[ITEM].index]
    values = {name: look_up(kept[name], place) for name in kept.column_names if name != ITEM}
    unlisted = int((place < 0).sum())
    notes = [f"{unlisted} rows are of items that {items.name} does not list"] if unlisted else []
    notes = [*raw.notes, *features.describe_skipped(), *notes]
    return replace(raw, values={**values, **raw.values}, notes=tuple(notes))


def _read_atomic(path: Path, renamed: Mapping[str, str]) -> Columns:
    """Read one of RecBole's files: tabs, a header of `name:type`, no quotes."""
    pairs = [name.rpartition(":")[::2] for name in read_header(path, "\t")]
    for name, kind in pairs:
        if not name or kind not in RECBOLE_TYPES:
            known = ", ".join(RECBOLE_TYPES)
            raise LogError(f"{path}: line 1: expected name:type, of the types {known}, got {name or kind!r}:{kind}")
    names = {source: name for name, source in renamed.items()}
    labels = [names.get(name, f"{name}_" if keyword.iskeyword(name) else name) for name, _ in pairs]
    missing = [source for name, source in renamed.items() if name not in labels]
    if missing:
        raise LogError(f"{path}: line 1: expected the columns {', '.join(renamed.values())}: missing {missing[0]}")
    only = [label for label, (_, kind) in zip(labels, pairs, strict=True) if kind != "float_seq"]
    columns = read_text(path, "\t", labels, only=only, header=1, quotes=False, numbered=True)
    for label, (_, kind) in zip(labels, pairs, strict=True):
        if kind == "token_seq":
            place = columns.table.column_names.index(label)
            columns.table = columns.table.set_column(place, label, _take_first(columns.table[label]))
    return columns


def _take_first(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the first of each cell's tokens."""
    text = pc.fill_null(column.cast(pa.string()), "")
    return pc.list_element(pc.split_pattern(text, " "), 0)


def _check_names(path: Path, named: list[str], header: list[str]) -> None:
    missing = [name for name in (USER, ITEM, TIME) if name not in named]
    twice = sorted({name for name in named if named.count(name) > 1})
    if missing or twice:
        what = f"missing {', '.join(missing)}" if missing else f"there twice: {', '.join(twice)}"
        raise LogError(
            f"{path}: expected the columns {USER}, {ITEM}, {TIME}: {what}; got {', '.join(header)} (--columns names "
            "them: all in order, or name=header)"
        )


def _make_raw(columns: Columns, bad_rows: OnBadRows, table: Table) -> RawLog:
    """Return the rows of a file whose columns have their names in a log."""
    users, items = columns.read_names(USER), columns.read_names(ITEM)
    time = columns.read_numbers(TIME, -np.inf, np.inf) / (1000 if table.milliseconds else 1)
    columns.reject(TIME, "is negative", time < 0)
    columns.reject(TIME, "is no time in seconds (milliseconds: --milliseconds)", time >= LATEST_SECOND)
    label, rule = _judge(columns, table.label)
    columns.settle(bad_rows)
    good = columns.good
    kept = columns.table.filter(pa.array(good))
    others = [name for name in kept.column_names if name not in (USER, ITEM, TIME, LABEL)]
    values = {name: look_up(kept[name], np.arange(len(kept))) for name in others}
    values[ITEM] = Values(*number_names(items.filter(pa.array(good))))
    ids = {}
    if ACTION not in values:
        if rule:
            values[ACTION] = values[rule]
        else:
            ids[ACTION] = label[good]
    names, user = number_names(users.filter(pa.array(good)))
    seconds, notes = time[good].astype(np.int64), tuple(columns.describe_skipped())
    return RawLog(user, seconds, label[good], values, ids, notes, users=names)


def _judge(columns: Columns, rule: str) -> tuple[Ids, str]:
    """Return which rows are positive, and the column of the rule that says so; none if there is a column `label`."""
    has = columns.table.column_names
    if not rule and LABEL in has:
        label = columns.read_numbers(LABEL, 0, 1)
        columns.reject(LABEL, "is not 0 or 1", (label > 0) & (label < 1))
        return np.nan_to_num(label).astype(np.int64), ""
    read = RULE.fullmatch(rule)
    if read is None or read["column"] not in has:
        raise LogError(
            f"{columns.path}: expected --label COLUMN=VALUE,VALUE or COLUMN>=NUMBER to say which rows are positive, by "
            f"one of the columns {', '.join(has)}; got {rule!r}"
        )
    name, value = read["column"], read["value"]
    if read["sign"] == "=":
        names, index = number_names(columns.read_names(name))
        absent = [one for one in value.split(",") if one not in names]
        if absent:
            raise LogError(
                f"{columns.path}: --label {rule}: expected values of {name} ({', '.join(names[:20])}"
                f"{', …' if len(names) > 20 else ''}), got {', '.join(absent)}"
            )
        positive = np.array([*(one in value.split(",") for one in names), False])
        return positive[index].astype(np.int64), name
    try:
        least = float(value)
    except ValueError:
        raise LogError(f"--label {rule}: expected a number after >=, got {value!r}") from None
    return (columns.read_numbers(name, -np.inf, np.inf) >= least).astype(np.int64), name
