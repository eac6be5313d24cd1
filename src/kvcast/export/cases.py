"""The kinds of request on which a network and its graphs could differ, drawn for any configuration.

A list of them, and a strategy from which hypothesis draws more. The module knows fields and limits; it runs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from kvcast.export.proofs import LONG_HISTORY, SHORT_HISTORY, SMALL_REQUEST, Ids, draw_ids
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.schema import Field
from kvcast.protocol.tensors import MAX_BATCH_SIZE

# Sizes (L, N) of random requests; what exceeds the limits is cut to them.
SIZES = ((1, 1), (2, 3), (17, 7), (192, 5))
# hypothesis draws requests of at most so many users, events and candidates: enough for every kind, and quick.
MOST_USERS, MOST_EVENTS, MOST_CANDIDATES = 3, 8, 4


@dataclass(frozen=True)
class Case:
    """A request, history INT64 `[B, L, history_fields]` and candidates INT64 `[B, N, T]`, and what it is an example of.

    is_long: the monolith would take too long for it. is_served: the models may give it to their graphs.
    """

    kind: str
    history: Ids
    candidates: Ids
    is_long: bool = False
    is_served: bool = True


def list_large_cases(config: ModelConfig) -> Iterator[Case]:
    """Return random requests of several sizes."""
    longest, most = config.limits.history, config.limits.candidates
    for events, count in dict.fromkeys((min(events, longest), min(count, most)) for events, count in SIZES):
        yield Case(f"a random request of {events} events and {count} candidates", *_draw(config, events, count))


def list_limit_cases(config: ModelConfig) -> Iterator[Case]:
    """Return requests at the limits."""
    longest, most = config.limits.history, config.limits.candidates
    history, candidates = _draw(config, longest, most)
    yield Case(f"{most} candidates, the limit", history[:, :SHORT_HISTORY], candidates)
    yield Case(f"{min(longest, LONG_HISTORY)} events", history[:, :LONG_HISTORY], candidates[:, :1])
    yield Case(f"{longest} events, the limit", history, candidates[:, :SMALL_REQUEST], is_long=longest > LONG_HISTORY)


def list_small_cases(config: ModelConfig) -> Iterator[Case]:
    """Return a small request of every kind: padding, several users, the ends of vocabularies, equal rows."""
    history, candidates = _draw(config, 5, min(4, config.limits.candidates))
    # ONNX Runtime cannot broadcast over an axis of length 0, so the models give such a user a row of padding.
    yield Case("a user without events, no rows", history[:, :0], candidates, is_served=False)
    for events, rows in ((1, "one row"), (3, "three rows")):
        yield Case(f"a user without events, {rows} of padding", 0 * history[:, :1].repeat(events, 1), candidates)
    for place, where in ((0, "in front"), (history.shape[1], "behind"), (2, "between events")):
        yield Case(f"padding {where}", np.insert(history, [place] * 3, 0, axis=1), candidates)
    yield Case("users of different length, one without events", *_draw_batch(history, candidates, 3))
    yield Case(f"{MAX_BATCH_SIZE} users", *_draw_batch(history, candidates, MAX_BATCH_SIZE))
    yield from _list_ends(config, history, candidates)
    yield Case("equal events", history[:, :1].repeat(history.shape[1], 1), candidates)
    yield Case("events that come again", history[:, [0, 1, 0, 1, 0]], candidates)
    yield Case("equal candidates", history, candidates[:, :1].repeat(candidates.shape[1], 1))
    for column, field in enumerate(config.schema.history_fields):
        yield Case(f"events that differ in {field.name} alone", _vary(history, column), candidates)
    for column, field in enumerate(config.schema.candidate_fields):
        yield Case(f"candidates that differ in {field.name} alone", history, _vary(candidates, column))


def draw_case(config: ModelConfig) -> st.SearchStrategy[Case]:
    """Return a strategy of small requests, in which the ends of vocabularies and equal rows are frequent."""
    fields, attributes = config.schema.history_fields, config.schema.candidate_fields
    events, count = min(MOST_EVENTS, config.limits.history), min(MOST_CANDIDATES, config.limits.candidates)

    @st.composite
    def build(draw: st.DrawFn) -> Case:
        users = draw(st.integers(1, MOST_USERS))
        shapes = [(users, draw(st.integers(1, events)), fields), (users, draw(st.integers(1, count)), attributes)]
        history, candidates = (
            np.array(draw(st.lists(_draw_row(of), min_size=each * rows, max_size=each * rows)), np.int64).reshape(
                each, rows, len(of)
            )
            for each, rows, of in shapes
        )
        kind = f"history {history.tolist()} and candidates {candidates.tolist()}, found by a search"
        return Case(kind, history, candidates)

    return build()


def _draw_row(fields: tuple[Field, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Return a strategy of one event or candidate: padding, either end of the vocabularies, few ids or any."""
    sizes = [field.vocab_size for field in fields]
    return st.one_of(
        st.just((0,) * len(sizes)),
        st.tuples(*(st.sampled_from((1, min(2, size - 1), size - 1)) for size in sizes)),
        st.tuples(*(st.integers(0, size - 1) for size in sizes)),
    )


def _draw_batch(history: Ids, candidates: Ids, users: int) -> tuple[Ids, Ids]:
    """Return users whose histories are parts of one, with padding behind; the second has no events."""
    events = history.shape[1]
    lengths = [0 if user == 1 else events - user % events for user in range(users)]
    is_event = np.arange(events) < np.array(lengths)[:, None]  # [users, L]
    turned = np.stack([np.roll(candidates[0], user, axis=0) for user in range(users)])  # [users, N, T]
    return history * is_event[:, :, None], turned


def _draw(config: ModelConfig, events: int, count: int) -> tuple[Ids, Ids]:
    """Return a history and candidates of one user, without padding."""
    generator = np.random.default_rng(events)
    history = draw_ids(config.schema.history_fields, events, generator)
    return history[None], draw_ids(config.schema.candidate_fields, count, generator)[None]


def _vary(rows: Ids, column: int) -> Ids:
    """Return rows equal to the first but for one column."""
    varied = rows[:, :1].repeat(rows.shape[1], 1)
    varied[:, :, column] = rows[:, :, column]
    return varied


def _list_ends(config: ModelConfig, history: Ids, candidates: Ids) -> Iterator[Case]:
    """Return requests of the first ids of all vocabularies, of the last, of both by turns, and of unknown ones."""
    sides = config.schema.history_fields, config.schema.candidate_fields
    last, last_attributes = (np.array([field.vocab_size - 1 for field in side]) for side in sides)
    lowest, highest = np.ones_like(history), np.broadcast_to(last, history.shape)
    first_items, last_items = np.ones_like(candidates), np.broadcast_to(last_attributes, candidates.shape)
    yield Case("the first id of every vocabulary", lowest, first_items)
    yield Case("the last id of every vocabulary", highest.copy(), last_items.copy())
    by_turns, items_by_turns = lowest.copy(), last_items.copy()
    by_turns[:, ::2], items_by_turns[:, ::2] = last, 1
    yield Case("first and last ids by turns", by_turns, items_by_turns)
    partly, partly_items = history.copy(), candidates.copy()
    partly[:, ::2, 0] = partly_items[:, ::2, -1] = 0
    yield Case("ids that are unknown", partly, partly_items)
    yield Case("candidates of which nothing is known", history, np.zeros_like(candidates))
