"""Requests: histories hold the past and nothing else; splits keep the future out of training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.protocol.schema import FeatureSchema, Field, Limits
from kvcast.train.log import Log, LogError
from kvcast.train.requests import Requests
from kvcast.train.splits import hold_out_users, split_by_shares, split_by_times

ITEM, ACTION, CATEGORY = Field("item", 1000), Field("action", 64), Field("category", 64)
SCHEMA = FeatureSchema(history_fields=(ITEM, ACTION), candidate_fields=(ITEM, CATEGORY))
LIMITS = Limits(history=4, candidates=3)

# user, time, action, label, request: few values, so that users, times and requests often fall together
ROW = st.tuples(*(st.integers(0, most) for most in (2, 6, 2, 1, 3)))
ROWS = st.lists(ROW, max_size=40)
Row = tuple[int, int, int, int, int]


def make_log(rows: list[Row], with_request: bool = False) -> Log:
    """Return a log in which the row number is the item, so that rows can be identified."""
    user, time, action, label, request = np.array(rows, np.int64).reshape(-1, 5).T
    item = np.arange(1, len(rows) + 1)
    ids = {"item": item, "category": item % 64, "action": action}
    return Log(("ann", "bob", "eve"), user, time, ids, label, request if with_request else None)


def list_all(requests: Requests) -> list[tuple]:
    return [
        (one.user, one.time, one.history.tolist(), one.candidates.tolist(), one.labels.tolist()) for one in requests
    ]


def expect_requests(rows: list[Row], with_request: bool) -> list[tuple]:
    """Say it again, row by row and slowly: what the requests of a log are."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row[0], row[4] if with_request else row[1]), []).append(number)
    expected = []
    for (user, _), numbers in groups.items():
        time = min(rows[number][1] for number in numbers)
        past = sorted(
            (row[1], number) for number, row in enumerate(rows) if row[0] == user and row[2] and row[1] < time
        )
        history = [[number + 1, rows[number][2]] for _, number in past][-LIMITS.history :]
        for start in range(0, len(numbers), LIMITS.candidates):
            part = numbers[start : start + LIMITS.candidates]
            candidates = [[number + 1, (number + 1) % 64] for number in part]
            labels = [float(rows[number][3]) for number in part]
            expected.append((("ann", "bob", "eve")[user], time, history, candidates, labels))
    return expected


@settings(max_examples=150, deadline=None)
@given(rows=ROWS, with_request=st.booleans())
def test_requests_equal_a_row_by_row_reference(rows, with_request):
    requests = Requests(make_log(rows, with_request), SCHEMA, LIMITS)
    assert sorted(list_all(requests)) == sorted(expect_requests(rows, with_request))
    assert np.all(np.diff(requests.time) >= 0)
    assert requests.history_lengths.tolist() == [len(one.history) for one in requests]
    assert requests.candidate_counts.tolist() == [len(one.candidates) for one in requests]
    assert [(requests.rows(index) + 1).tolist() for index in range(len(requests))] == [
        one.candidates[:, 0].tolist() for one in requests
    ]


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, with_request=st.booleans())
def test_every_event_of_a_history_is_strictly_before_the_request(rows, with_request):
    log = make_log(rows, with_request)
    requests = Requests(log, SCHEMA, LIMITS)
    for index, one in enumerate(requests):
        events = one.history[:, 0] - 1  # rows of the log
        assert np.all(log.time[events] < one.time)
        assert np.all(np.diff(log.time[events]) >= 0)
        assert np.all(log.user[events] == requests.user[index])
        assert one.time <= log.time[requests.rows(index)].min()


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, others=ROWS, cut=st.integers(0, 6))
def test_nothing_at_or_after_a_request_changes_its_history(rows, others, cut):
    past = [row for row in rows if row[1] < cut]
    now = [(user, cut, 0, 0, 0) for user in range(3)]
    future = [row for row in rows if row[1] >= cut]
    other_future = [(user, max(time, cut), *rest) for user, time, *rest in others]
    histories = []
    for later in (future, other_future):
        requests = Requests(make_log([*past, *now, *later]), SCHEMA, LIMITS)
        histories.append({one.user: one.history.tolist() for one in requests if one.time == cut})
    assert histories[0] == histories[1]
    assert set(histories[0]) == {"ann", "bob", "eve"}


def test_rows_without_an_action_are_candidates_only():
    rows = [(0, 1, 0, 0, 0), (0, 2, 2, 1, 0), (0, 3, 0, 1, 0), (0, 4, 0, 0, 0)]
    assert Requests(make_log(rows), SCHEMA, LIMITS)[3].history.tolist() == [[2, 2]]


def test_a_time_makes_no_impression_an_event():
    """Rows 0 and 2 are mere impressions with a time; in the third schema a time is all that only events have."""
    rows = [(0, 1, 0, 1, 0), (0, 2, 5, 0, 0), (0, 3, 0, 0, 0), (0, 4, 0, 0, 0)]
    hour = Field("hour", 1000)
    log = make_log(rows)
    log.ids["hour"] = 100 + log.time
    timed = FeatureSchema((ITEM, ACTION, hour), SCHEMA.candidate_fields)
    assert Requests(log, timed, LIMITS, "hour")[3].history.tolist() == [[2, 5, 102]]
    assert len(Requests(log, timed, LIMITS)[3].history) == 3
    without_action = FeatureSchema((ITEM, hour), SCHEMA.candidate_fields)
    assert Requests(log, without_action, LIMITS, "hour")[3].history.tolist() == [[1, 101]]


def test_without_event_fields_positive_rows_are_history():
    schema = FeatureSchema(history_fields=(ITEM,), candidate_fields=(ITEM, CATEGORY))
    rows = [(0, 1, 0, 0, 0), (0, 2, 2, 1, 0), (0, 3, 2, 0, 0), (0, 4, 0, 0, 0)]
    assert Requests(make_log(rows), schema, LIMITS)[3].history.tolist() == [[2]]


def test_a_request_over_the_limit_is_split_and_shares_its_history():
    rows = [(0, 1, 1, 1, 0), *[(0, 5, 1, 0, 0)] * 7]
    parts = Requests(make_log(rows), SCHEMA, LIMITS)[1:]
    assert [len(part.candidates) for part in parts] == [3, 3, 1]
    assert all(part.history.tolist() == [[1, 1]] for part in parts)
    assert [item for part in parts for item in part.candidates[:, 0]] == list(range(2, 9))


def test_histories_are_views_of_one_array():
    rows = [(0, time, 1, 1, 0) for time in range(50)]
    requests = Requests(make_log(rows), SCHEMA, Limits(history=40, candidates=3))
    assert np.shares_memory(requests[45].history, requests[46].history)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, cuts=st.tuples(st.integers(0, 7), st.integers(0, 7)))
def test_a_split_keeps_later_requests_out_of_training(rows, cuts):
    first, second = sorted(cuts)
    log = make_log(rows, with_request=True)
    requests = Requests(log, SCHEMA, LIMITS)
    split = split_by_times(requests, first, second)
    parts = (split.training, split.validation, split.test)
    for part, (start, end) in zip(parts, ((-1, first), (first, second), (second, 100)), strict=True):
        for index in range(len(part)):
            times = log.time[part.rows(index)]
            assert np.all((times >= start) & (times < end))
    assert sum(map(len, parts)) + split.left_out == len(requests)


def test_a_split_by_shares_has_these_shares_and_describes_its_sizes():
    requests = Requests(make_log([(time % 3, time, 1, 0, 0) for time in range(100)]), SCHEMA, LIMITS)
    split = split_by_shares(requests, validation=0.2, test=0.1)
    assert [len(part) for part in (split.training, split.validation, split.test)] == [70, 20, 10]
    assert (split.validation_from, split.test_from) == (70, 90)
    assert "training 70 requests, 70 rows" in split.describe()
    whole = split_by_shares(requests, 0, 0)
    assert (len(whole.training), len(whole.validation), len(whole.test)) == (100, 0, 0)


def test_requests_at_the_time_of_a_cut_are_in_the_later_part():
    requests = Requests(make_log([(user, 5, 1, 0, 0) for user in range(3)]), SCHEMA, LIMITS)
    split = split_by_shares(requests, 0.3, 0.3)
    assert len(split.training) == 0


@pytest.mark.parametrize("shares", [(0.5, 0.5), (-0.1, 0.1), (0.1, float("nan"))])
def test_shares_that_leave_no_training_part_are_rejected(shares):
    requests = Requests(make_log([(0, 1, 1, 0, 0)]), SCHEMA, LIMITS)
    with pytest.raises(LogError, match="shares"):
        split_by_shares(requests, *shares)


def test_held_out_users_are_the_same_in_every_log():
    def hold(count: int) -> tuple[set[str], set[str]]:
        names = tuple(f"user {number}" for number in range(count))
        numbers = np.arange(count)
        ids = {"item": numbers, "category": numbers % 64, "action": numbers % 64}
        log = Log(names, numbers, numbers, ids, numbers % 2)
        kept, held = hold_out_users(Requests(log, SCHEMA, LIMITS), 0.25, seed=3)
        return {one.user for one in kept}, {one.user for one in held}

    kept, held = hold(400)
    assert not kept & held
    assert len(kept | held) == 400
    assert 60 < len(held) < 140
    fewer_kept, fewer_held = hold(100)
    assert fewer_kept <= kept
    assert fewer_held <= held
