"""A second, independent implementation: one candidate at a time, one head at a time, float64, plain numpy.

Written from the formulas of docs/mask.md and docs/networks.md. It shares no code with `network`; it only takes the
same weights, by name.
"""

import math
from typing import Any

import numpy as np

from kvcast.protocol.config import ModelConfig

Array = Any
erf = np.vectorize(math.erf, otypes=[np.float64])


def score_candidates(
    weights: dict[str, Array], config: ModelConfig, history: Array, candidates: Array, *, undirected: bool = False
) -> Array:
    """Scores [N] of one user's candidates [N, T] after a history [L, fields], each in a sequence of its own."""
    events = np.array([event for event in history if any(event)], np.int64).reshape(-1, history.shape[1])
    return np.array([_score_one(weights, config, events, candidate, undirected) for candidate in candidates])


def _score_one(
    weights: dict[str, Array], config: ModelConfig, events: Array, candidate: Array, undirected: bool
) -> float:
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    tokens = []
    for column, field in enumerate(config.schema.candidate_fields):
        tokens.append(w[f"embeddings.{field.name}.weight"][candidate[column]] + w["types.weight"][column])
    for place, event in enumerate(events):
        token = w["positions.weight"][place].copy()
        for column, field in enumerate(config.schema.history_fields):
            token += w[f"embeddings.{field.name}.weight"][event[column]]
        tokens.append(token)
    x = np.stack(tokens)  # [T + L, d]
    own = len(config.schema.candidate_fields)
    sees = np.ones((len(x), len(x)), bool)
    if not undirected:
        sees[own:, :own] = False  # history does not see the item
    heads = config.network.heads
    for layer in range(config.network.layers):
        x = _run_block(w, f"blocks.{layer}.", x, sees, heads)
    final = _normalise(x[0], w["score_norm.weight"], w["score_norm.bias"])
    return float(final @ w["score.weight"][0] + w["score.bias"][0])


def _run_block(w: dict[str, Array], name: str, x: Array, sees: Array, heads: int) -> Array:
    def linear(part: str, value: Array) -> Array:
        return value @ w[f"{name}{part}.weight"].T + w[f"{name}{part}.bias"]

    normed = _normalise(x, w[f"{name}attention_norm.weight"], w[f"{name}attention_norm.bias"])
    query, key, value = (linear(part, normed) for part in ("query", "key", "value"))
    width = x.shape[1] // heads
    outputs = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        scores = query[:, own] @ key[:, own].T / math.sqrt(width)
        scores[~sees] = -np.inf
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        outputs.append(share @ value[:, own])
    x = x + linear("output", np.concatenate(outputs, axis=1))
    normed = _normalise(x, w[f"{name}feed_forward_norm.weight"], w[f"{name}feed_forward_norm.bias"])
    hidden = linear("expand", normed)
    hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    return x + linear("contract", hidden)


def _normalise(x: Array, gain: Array, bias: Array) -> Array:
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * gain + bias
