"""Packing users of different lengths into runs of one graph, and taking padding out first.

A run is a padded rectangle of users: lengths and arrays only, whatever the graph does with them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


def strip_padding(history: Ids) -> Ids:
    """Return the real events of one history: INT64 `[L, fields]` without the rows that are 0 in every field.

    Padding changes no score, so it need not be computed. One row of padding stands for an empty history, because
    ONNX Runtime's broadcasting refuses dimensions of size 0.
    """
    is_event = history.any(axis=1)
    if not is_event.any():
        return np.zeros((1, history.shape[1]), np.int64)
    return history if is_event.all() else history[is_event]


def plan_runs(lengths: Sequence[int], cells_per_run: int) -> list[list[int]]:
    """Group users into runs of at most `cells_per_run` padded cells, users of similar length together.

    A user alone may exceed the bound: it then has a run to itself, and nothing is padded or copied for it.

    Args:
        lengths: a length per user, in any unit.
        cells_per_run: the bound on users · longest length of a run, same unit.

    Returns:
        Lists of indices into `lengths`, every index once.
    """
    runs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda user: lengths[user]):
        # Sorted, the newcomer is the longest: the run becomes (users + 1) · its length.
        if runs and (len(runs[-1]) + 1) * lengths[index] <= cells_per_run:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def plan_groups(lengths: Sequence[int], cells_per_run: int) -> list[list[int]]:
    """Group waiting requests as `plan_runs` does, the group with the one that has waited longest first."""
    return sorted(plan_runs(lengths, cells_per_run), key=min)


def stack_padded(arrays: Sequence[Ids]) -> Ids:
    """Stack `[length, fields]` arrays into `[users, longest, fields]`, zeros after the shorter ones."""
    if len(arrays) == 1:
        return arrays[0][None]
    stacked = np.zeros((len(arrays), max(len(array) for array in arrays), arrays[0].shape[1]), np.int64)
    for row, array in zip(stacked, arrays, strict=True):
        row[: len(array)] = array
    return stacked
