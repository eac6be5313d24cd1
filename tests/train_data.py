"""Training requests for tests: users prefer one kind of item, so the history predicts the labels."""

import numpy as np

from kvcast.protocol.config import ModelConfig
from kvcast.train.requests import TrainingRequest
from kvcast.train.trainer import Parts
from tests.support import draw_request, draw_rows

KINDS = 4


def draw_training_request(config: ModelConfig, length: int, count: int, seed: int) -> TrainingRequest:
    """Return a request of random ids, unknown (0) included, with random labels."""
    history, candidates = draw_request(config, length, count, seed)
    labels = np.random.default_rng(seed).integers(0, 2, count).astype(np.float32)
    return TrainingRequest(f"user {seed}", seed, history, candidates, labels)


def draw_tasteful_requests(config: ModelConfig, count: int, seed: int) -> list[TrainingRequest]:
    """Return requests whose positives are mostly of the kind (second field of both sides) that fills their history."""
    generator = np.random.default_rng(seed)
    requests = []
    for time in range(count):
        taste = generator.integers(1, KINDS + 1)
        history = draw_rows(config.schema.history_fields, (int(generator.integers(3, 9)),), generator)
        history[:, 1] = taste
        candidates = draw_rows(config.schema.candidate_fields, (int(generator.integers(4, 9)),), generator)
        candidates[:, 1] = generator.integers(1, KINDS + 1, len(candidates))
        chance = np.where(candidates[:, 1] == taste, 0.9, 0.1)
        labels = (generator.random(len(candidates)) < chance).astype(np.float32)
        requests.append(TrainingRequest(f"user {time}", time, history, candidates, labels))
    return requests


def draw_parts(config: ModelConfig, count: int, seed: int = 0) -> Parts:
    """Return `count` requests to learn from, and fewer to choose and to judge by."""
    requests = draw_tasteful_requests(config, count + count // 2, seed)
    return Parts(requests[:count], requests[count : count + count // 4], requests[count + count // 4 :])
