"""Training requests: the history of each request of a log, and its candidates with labels.

A history holds events strictly before the request's time, so no effect of the request and nothing later is in it.
Histories are views of one array of events, so the memory is that of the rows however many requests share an event.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from kvcast.protocol.log import marking_fields
from kvcast.protocol.schema import FeatureSchema, Limits
from kvcast.train.log import Log

Ids = npt.NDArray[np.int64]
Labels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TrainingRequest:
    """One request.

    history: INT64 `[L, history_fields]`, oldest first, strictly before `time`. candidates: INT64 `[N, T]`.
    labels: FP32 `[N]`.
    """

    user: str
    time: int
    history: Ids
    candidates: Ids
    labels: Labels


@dataclass(frozen=True)
class _Table:
    """The arrays that all selections of one log's requests share.

    Rows are sorted by user, request and place in the file; a request's candidates lie next to each other. Events are
    sorted by user and time; those of request i that count lie in `[history_starts[i], history_ends[i])`.
    """

    users: tuple[str, ...]
    rows: Ids  # [R] which row of the log
    candidates: Ids  # [R, T]
    labels: Labels  # [R]
    events: Ids  # [E, history_fields]
    user: Ids  # [requests], as the rest
    time: Ids
    last_time: Ids
    starts: Ids
    ends: Ids
    history_starts: Ids
    history_ends: Ids


class Requests(Sequence[TrainingRequest]):
    """The requests of a log in order of time, or some of them.

    Rows of one user with the same `request` are one request; in a log without that column, rows of one user at one
    time. The request's time is that of its earliest row. One with more than `limits.candidates` rows is taken as
    several with the same time and history, as a caller would have to send it.
    """

    def __init__(self, log: Log, schema: FeatureSchema, limits: Limits, time_field: str = "") -> None:
        """Group the rows of a log.

        Args:
            log: the rows.
            schema: the fields of a history event and of a candidate, in column order.
            limits: the most events of a history, of which the last are kept, and the most candidates.
            time_field: the field that holds an event's time, if there is one (`ModelConfig.time_field`).
        """
        self._table = _group(log, schema, limits, time_field)
        self._chosen: Ids = np.argsort(self._table.time, kind="stable")

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> TrainingRequest: ...

    @overload
    def __getitem__(self, index: slice) -> "Requests": ...

    def __getitem__(self, index: int | slice) -> "TrainingRequest | Requests":
        """Return a request, or a selection of them."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        table, chosen = self._table, self._chosen[index]
        rows = slice(table.starts[chosen], table.ends[chosen])
        return TrainingRequest(
            user=table.users[table.user[chosen]],
            time=int(table.time[chosen]),
            history=table.events[table.history_starts[chosen] : table.history_ends[chosen]],
            candidates=table.candidates[rows],
            labels=table.labels[rows],
        )

    def select(self, chosen: npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]) -> "Requests":
        """Return these requests, by index or by mask, in the order asked for."""
        selection = object.__new__(Requests)
        selection._table, selection._chosen = self._table, self._chosen[chosen]
        return selection

    def rows(self, index: int) -> Ids:
        """Return which rows of the log are the candidates of a request, so that its other columns can be looked up."""
        chosen = self._chosen[index]
        return self._table.rows[self._table.starts[chosen] : self._table.ends[chosen]]

    @property
    def users(self) -> tuple[str, ...]:
        """The names of all users of the log, which `user` indexes."""
        return self._table.users

    @property
    def user(self) -> Ids:
        """Whose request each is, as an index of `users`."""
        return self._table.user[self._chosen]

    @property
    def time(self) -> Ids:
        """The time of each request: that of its earliest row."""
        return self._table.time[self._chosen]

    @property
    def last_time(self) -> Ids:
        """The time of the last row of each request."""
        return self._table.last_time[self._chosen]

    @property
    def history_lengths(self) -> Ids:
        """The events in the history of each request."""
        return (self._table.history_ends - self._table.history_starts)[self._chosen]

    @property
    def candidate_counts(self) -> Ids:
        """The candidates of each request."""
        return (self._table.ends - self._table.starts)[self._chosen]


def _group(log: Log, schema: FeatureSchema, limits: Limits, time_field: str) -> _Table:
    shown = log.time if log.request is None else log.request
    order = np.lexsort((shown, log.user))  # stable: within a request as in the file
    user, shown, time = log.user[order], shown[order], log.time[order]
    starts = _split_starts(_find_starts(user, shown), len(order), limits.candidates)
    ends = np.append(starts[1:], len(order)).astype(np.int64)
    # A request in parts has one time, that of its earliest row.
    whole = _find_starts(user, shown)
    part_of = np.searchsorted(whole, starts, side="right") - 1
    times = np.minimum.reduceat(time, whole)[part_of] if len(order) else time
    last_times = np.maximum.reduceat(time, whole)[part_of] if len(order) else time
    events, event_user, event_time = _collect_events(log, schema, time_field)
    first, end = _find_histories(event_user, event_time, user[starts], times)
    return _Table(
        users=log.users,
        rows=order,
        candidates=np.stack([log.ids[field.name][order] for field in schema.candidate_fields], axis=1),
        labels=log.label[order].astype(np.float32),
        events=events,
        user=user[starts],
        time=times,
        last_time=last_times,
        starts=starts,
        ends=ends,
        history_starts=np.maximum(first, end - limits.history),
        history_ends=end,
    )


def _find_starts(user: Ids, shown: Ids) -> Ids:
    """Return where a new request starts in sorted rows."""
    changes = (user[1:] != user[:-1]) | (shown[1:] != shown[:-1])
    return np.flatnonzero(np.append(True, changes)) if len(user) else np.zeros(0, np.int64)


def _split_starts(starts: Ids, rows: int, most: int) -> Ids:
    """Return where parts of at most `most` rows start."""
    place = np.arange(rows) - np.repeat(starts, np.diff(np.append(starts, rows)))  # of a row within its request
    return np.flatnonzero(place % most == 0)


def _collect_events(log: Log, schema: FeatureSchema, time_field: str) -> tuple[Ids, Ids, Ids]:
    """Return the events `[E, history_fields]` by user and time, whose they are, and when."""
    marks = marking_fields(schema, time_field)
    acted = np.any([log.ids[field.name] != 0 for field in marks], axis=0) if marks else log.label == 1
    events = np.flatnonzero(acted)
    events = events[np.lexsort((log.time[events], log.user[events]))]
    columns = [log.ids[field.name][events] for field in schema.history_fields]
    return np.stack(columns, axis=1), log.user[events], log.time[events]


def _find_histories(event_user: Ids, event_time: Ids, user: Ids, time: Ids) -> tuple[Ids, Ids]:
    """Return, per request, its user's first event and the first event that is not strictly before its time."""
    first = np.searchsorted(event_user, user, side="left")
    # Events and requests in one order of user and time; of equals the request is first: the event is not before it.
    is_event = np.append(np.ones(len(event_user), np.int64), np.zeros(len(user), np.int64))
    order = np.lexsort((is_event, np.append(event_time, time), np.append(event_user, user)))
    events_before = np.cumsum(is_event[order])
    end = np.empty(len(order), np.int64)
    end[order] = events_before
    return first, end[len(event_user) :]
