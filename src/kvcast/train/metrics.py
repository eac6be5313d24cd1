"""Ranking metrics: AUC, NDCG@10, log loss and calibration, overall and by request.

Ties get the mean over their orders.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from kvcast.train.requests import TrainingRequest

Numbers = npt.NDArray[np.float32] | npt.NDArray[np.float64]

NDCG_PLACES = 10
# Pseudo-counts of the popularity baseline: an item starts at the average rate.
POPULARITY_PRIOR = 10.0


@dataclass(frozen=True)
class Metrics:
    """Metrics of a set of requests; NaN where undefined.

    auc: over all candidates of all requests. request_auc: the mean over requests that have both labels, weighted by
    their candidates. ndcg_at_10: the mean over requests with a positive. log_loss: of sigmoid(score). calibration: mean
    predicted over mean label.
    """

    auc: float
    request_auc: float
    ndcg_at_10: float
    log_loss: float
    calibration: float
    requests: int
    candidates: int
    positives: int

    def describe(self) -> str:
        """Return one line."""
        return (
            f"AUC {self.auc:.4f}, within requests {self.request_auc:.4f}, NDCG@{NDCG_PLACES} {self.ndcg_at_10:.4f}, "
            f"log loss {self.log_loss:.4f}, calibration {self.calibration:.3f}"
        )

    def to_json(self) -> dict[str, float | None]:
        """Return a JSON document; null where undefined."""
        return {name: None if math.isnan(value) else value for name, value in dataclasses.asdict(self).items()}


def measure_ranking(labels: Sequence[Numbers], scores: Sequence[Numbers]) -> Metrics:
    """Return the metrics of scores (logits) against labels 0 and 1, an array `[N]` a request each."""
    label, score = (np.concatenate(each).astype(np.float64) for each in (labels, scores))
    rated = [(len(y), measure_auc(y, s)) for y, s in zip(labels, scores, strict=True) if 0 < y.sum() < len(y)]
    gains = [measure_ndcg(y, s, NDCG_PLACES) for y, s in zip(labels, scores, strict=True) if y.sum() > 0]
    probability = np.exp(-np.logaddexp(0, -score))  # sigmoid, without overflow
    return Metrics(
        auc=float(roc_auc_score(label, score)) if 0 < label.sum() < len(label) else math.nan,
        request_auc=_average([auc for _, auc in rated], [count for count, _ in rated]),
        ndcg_at_10=_average(gains, [1] * len(gains)),
        log_loss=float(np.mean(np.logaddexp(0, score) - label * score)),
        calibration=float(probability.mean() / label.mean()) if label.any() else math.nan,
        requests=len(labels),
        candidates=len(label),
        positives=int(label.sum()),
    )


def measure_auc(labels: Numbers, scores: Numbers) -> float:
    """Return the share of (positive, negative) pairs in the right order; a tie counts half. Both labels must occur."""
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # [N], from 1; ties share their mean rank
    positives = float(labels.sum())
    pairs = positives * (len(labels) - positives)
    return float((rank[labels > 0].sum() - positives * (positives + 1) / 2) / pairs)


def measure_ndcg(labels: Numbers, scores: Numbers, places: int) -> float:
    """Return the discounted gain of the first `places`, over that of the best order. A positive must occur."""
    discount = 1 / np.log2(np.arange(2, len(labels) + 2))
    discount[places:] = 0
    _, place, count = np.unique(-np.asarray(scores), return_inverse=True, return_counts=True)
    shares = np.add.reduceat(discount, np.cumsum(count) - count) / count  # what one of tied candidates gets
    best = np.sort(labels)[::-1] @ discount
    return float(labels @ shares[place] / best)


def score_by_popularity(
    training: Sequence[TrainingRequest], requests: Sequence[TrainingRequest]
) -> list[npt.NDArray[np.float64]]:
    """Return the scores of the popularity baseline: the logit of an item's own rate of positives.

    An item is the target token (the first candidate field). Rates come from `training` alone, smoothed towards the mean
    for rare items.
    """
    items = np.concatenate([request.candidates[:, 0] for request in training])
    labels = np.concatenate([request.labels for request in training]).astype(np.float64)
    size = 1 + max(items.max(), *(request.candidates[:, 0].max() for request in requests))
    seen, positive = np.bincount(items, minlength=size), np.bincount(items, labels, size)
    rate = (positive + POPULARITY_PRIOR * labels.mean()) / (seen + POPULARITY_PRIOR)
    rate = rate.clip(1e-6, 1 - 1e-6)
    logit = np.log(rate / (1 - rate))
    return [logit[request.candidates[:, 0]] for request in requests]


def _average(values: list[float], weights: list[int]) -> float:
    return float(np.average(values, weights=weights)) if values else math.nan
