"""HSTU once more: a candidate, a head, a token at a time, float64, plain numpy, from the formulas of the paper.

It shares no code with `network`; it only takes the same weights, by name.
"""

import math
from typing import Any

import numpy as np

from kvcast.protocol.config import ModelConfig

Array = Any


def score_candidates(
    weights: dict[str, Array], config: ModelConfig, history: Array, candidates: Array, *, undirected: bool = False
) -> Array:
    """Scores [N] of one user's candidates [N, T] after a history [L, fields], each in a sequence of its own."""
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    events = [event for event in history.tolist() if any(event)]
    return np.array([_score_one(w, config, events, candidate, undirected) for candidate in candidates.tolist()])


def _score_one(
    w: dict[str, Array], config: ModelConfig, events: list[list[int]], candidate: list[int], undirected: bool
) -> float:
    fields = [field.name for field in config.schema.history_fields]
    clock = config.network.options.get("time_field")
    times = [event[fields.index(str(clock))] if clock else 0 for event in events]
    now = max(times, default=0)
    tokens, places = [], []  # a place: position, time, whether it is the item's
    for column, field in enumerate(config.schema.candidate_fields):
        tokens.append(w[f"embeddings.{field.name}.weight"][candidate[column]] + w["types.weight"][column])
        places.append((len(events), now, True))
    for place, event in enumerate(events):
        known = [(name, value) for name, value in zip(fields, event, strict=True) if name != clock]
        tokens.append(sum(w[f"embeddings.{name}.weight"][value] for name, value in known))
        places.append((place, times[place], False))
    x = np.stack(tokens)
    for layer in range(config.network.layers):
        x = _run_layer(w, f"blocks.{layer}.", x, places, config, undirected)
    return float(_normalise(x[0], w, "score_norm") @ w["score.weight"][0] + w["score.bias"][0])


def _run_layer(
    w: dict[str, Array], name: str, x: Array, places: list[tuple[int, int, bool]], config: ModelConfig, undirected: bool
) -> Array:
    projected = _silu(_normalise(x, w, f"{name}norm") @ w[f"{name}project.weight"].T + w[f"{name}project.bias"])
    key, value, query, gate = np.split(projected, 4, axis=1)
    attended = np.zeros_like(value)
    width = config.network.head_width
    for i, row in enumerate(places):
        for j, column in enumerate(places):
            if column[2] and not row[2] and not undirected:
                continue  # history does not see the item
            bias = w[f"{name}position_bias"][row[0] - column[0] + config.limits.history]
            bias += w[f"{name}time_bias"][_find_bucket(row, column)]
            for head in range(config.network.heads):
                own = slice(head * width, (head + 1) * width)
                score = query[i, own] @ key[j, own] / math.sqrt(width) + bias
                attended[i, own] += _silu(score) * value[j, own] / config.limits.history
    gated = _normalise(attended, w, f"{name}attention_norm") * gate
    return x + gated @ w[f"{name}output.weight"].T + w[f"{name}output.bias"]


def _find_bucket(row: tuple[int, int, bool], column: tuple[int, int, bool]) -> int:
    if row[2] and column[2]:
        return 0
    if not (row[1] and column[1]):
        return 22
    return min(abs(row[1] - column[1]), 1 << 20).bit_length()


def _silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def _normalise(x: Array, w: dict[str, Array], name: str) -> Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]
