"""Ids for what a data set calls its items, genres, authors: the step from a reader's values to a log.

Ids are given by frequency in the earliest rows alone, so that the test part does not affect them.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvcast.protocol.log import LABEL, REQUEST, TIME, USER, log_fields, marking_fields
from kvcast.protocol.schema import FeatureSchema, Field
from kvcast.train.columns import Ids, LogError, number_names

# The share of the rows, by time, whose values get ids: the training part by default.
VOCABULARY_SHARE = 0.8
# What a time field may be called, or have in its name, and how many seconds that is.
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


@dataclass(frozen=True)
class Values:
    """A column of names: row r has `names[index[r]]`; index -1 is unknown."""

    names: tuple[str, ...]
    index: Ids


@dataclass(frozen=True)
class RawLog:
    """The rows of a data set, in any order.

    values: columns whose names get ids. ids: columns with ids defined by the reader, such as `action`. notes: for the
    user. titles: of items by name. users: names of the users, which `user` indexes; none: `user` is the name.
    """

    user: Ids
    time: Ids
    label: Ids
    values: dict[str, Values]
    ids: dict[str, Ids]
    notes: tuple[str, ...] = ()
    titles: dict[str, str] = field(default_factory=dict)
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class MadeLog:
    """A log's columns by time, the vocabularies (field → name → id), the titles of items by id, and notes."""

    columns: dict[str, npt.NDArray[Any]]
    vocabularies: dict[str, dict[str, int]]
    titles: dict[str, str]
    notes: tuple[str, ...]


def make_log(raw: RawLog, schema: FeatureSchema, pause: int = 0, time_field: str = "") -> MadeLog:
    """Give ids to a reader's values.

    Args:
        raw: of the reader.
        schema: the model's fields. Those that the data set does not have are 0, unknown.
        pause: rows of a user are one request until nothing happens for more than so many seconds; 0: rows of one time.
        time_field: the field of an event's time (`ModelConfig.time_field`); it gets the rows' times in the unit that
            its name says (`hour`), else in seconds.

    Raises:
        LogError: a vocabulary is too small for a time, for ids of the reader, or for a field that makes rows events.
    """
    order = np.lexsort((raw.user, raw.time))
    time = raw.time[order]
    early = np.arange(len(order)) < round(VOCABULARY_SHARE * len(order))
    columns: dict[str, npt.NDArray[Any]] = {USER: raw.user[order], TIME: time}
    if pause:
        columns[REQUEST] = _number_sessions(columns[USER], time, pause)
    if raw.users:
        columns[USER] = np.array(raw.users, dtype=object)[columns[USER]]
    marks = marking_fields(schema, time_field)
    has = _list_fields(raw, marks)
    vocabularies, notes, absent = {}, list(raw.notes), []
    for one in log_fields(schema):
        if one.name == time_field:
            column, note = _tell_time(one, time)
            notes.append(note)
        elif one.name in raw.values:
            is_mark = one in marks  # a row whose value has no id would be no event: all of them have one
            _expect_within(one, len(raw.values[one.name].names) if is_mark else 0)
            column, vocabularies[one.name], note = _give_ids(raw.values[one.name], order, early | is_mark, one)
            notes.append(note)
        elif one.name in raw.ids:
            column = raw.ids[one.name][order]
            _expect_within(one, int(column.max(initial=0)))
        else:
            column = np.zeros(len(order), np.int64)
            absent.append(one.name)
        columns[one.name] = column
    if absent:
        notes.append(f"not in the data set, 0 in every row: {', '.join(absent)} (it has {has})")
    titles = {
        str(number): raw.titles[name] for name, number in vocabularies.get("item", {}).items() if name in raw.titles
    }
    return MadeLog({**columns, LABEL: raw.label[order]}, vocabularies, titles, tuple(notes))


def _list_fields(raw: RawLog, marks: tuple[Field, ...]) -> str:
    """Return the names of the fields that the data has, among which is one that makes rows events."""
    names, has = [one.name for one in marks], sorted({*raw.values, *raw.ids})
    if names and not set(names) & set(has):
        raise LogError(
            f"expected a field that makes rows events ({', '.join(names)}) in the data, which has {', '.join(has)}"
        )
    return ", ".join(has)


def _tell_time(one: Field, time: Ids) -> tuple[Ids, str]:
    """Return the column of a time field, and what it holds."""
    unit = next((unit for unit in UNITS if unit in one.name), "second")
    column = 1 + time // UNITS[unit]
    _expect_within(one, int(column.max(initial=0)))
    return column, f"{one.name}: 1 + the time in {unit}s, in every row"


def _expect_within(one: Field, most: int) -> None:
    if most >= one.vocab_size:
        raise LogError(f"{one.name}: expected a vocabulary of at least {most + 1} for this data, got {one.vocab_size}")


def find_places(known: Ids, numbers: Ids) -> Ids:
    """Return where each number is known first, or -1."""
    if not len(known):
        return np.full(len(numbers), -1)
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known[order], numbers), len(known) - 1)
    return np.where(known[order][place] == numbers, order[place], -1)


def look_up(column: pa.ChunkedArray, place: Ids, unknown: tuple[str, ...] = ("",)) -> Values:
    """Return the values of a table's column at these places: -1 is no place, and some texts mean unknown."""
    names, index = number_names(column)
    is_unknown = np.array([*(name in unknown for name in names), True])  # the last one is that of null
    index = np.append(np.where(is_unknown[index], -1, index), -1)
    return Values(names, index[place])


def _give_ids(values: Values, order: Ids, early: npt.NDArray[np.bool_], one: Field) -> tuple[Ids, dict[str, int], str]:
    """Return the column, the vocabulary and how far it reaches."""
    index = values.index[order]
    seen = index[early & (index >= 0)]
    counts = np.bincount(seen, minlength=len(values.names))
    by_count = np.argsort(-counts, kind="stable")
    listed = by_count[: min(one.vocab_size - 1, int((counts > 0).sum()))]
    ids = np.zeros(len(values.names) + 1, np.int64)  # the last one is that of index -1
    ids[listed] = np.arange(1, len(listed) + 1)
    column = ids[index]
    unknown = float((column == 0).mean()) if len(column) else 0.0
    note = f"{one.name}: {len(listed)} of {len(values.names)} values have an id; {unknown:.1%} of the rows have none"
    return column, {values.names[number]: rank for rank, number in enumerate(listed, start=1)}, note


def _number_sessions(user: Ids, time: Ids, pause: int) -> Ids:
    """Return the number of each row's session. Rows are in order of time."""
    order = np.argsort(user, kind="stable")
    starts = (np.diff(user[order], prepend=-1) != 0) | (np.diff(time[order], prepend=0) > pause)
    sessions = np.empty(len(order), np.int64)
    sessions[order] = np.cumsum(starts)
    return sessions
