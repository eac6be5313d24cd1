"""Metrics against scikit-learn, ties included, and the popularity baseline."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from kvcast.train.metrics import POPULARITY_PRIOR, measure_auc, measure_ndcg, measure_ranking, score_by_popularity
from kvcast.train.requests import TrainingRequest


def draw(count: int, seed: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both kinds, and scores of which some are equal."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count).astype(np.float32)
    labels[:2] = 0, 1
    return labels, generator.integers(0, levels, count).astype(np.float32) / levels - 0.5


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 30), seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 50), places=st.integers(1, 12))
def test_auc_and_ndcg_of_a_request_equal_scikit_learn(count: int, seed: int, levels: int, places: int):
    labels, scores = draw(count, seed, levels)
    assert measure_auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    expected = ndcg_score(labels[None], scores[None], k=places)
    assert measure_ndcg(labels, scores, places) == pytest.approx(expected, abs=1e-9)


def test_metrics_of_many_requests_are_overall_or_weighted_means():
    drawn = [draw(count, seed, levels=8) for seed, count in enumerate((3, 12, 30, 7))]
    alike = [
        (np.ones(4, np.float32), np.arange(4, dtype=np.float32)),
        (np.zeros(5, np.float32), np.zeros(5, np.float32)),
    ]
    labels, scores = zip(*drawn, *alike, strict=True)
    metrics = measure_ranking(labels, scores)

    label, score = np.concatenate(labels), np.concatenate(scores).astype(np.float64)
    probability = 1 / (1 + np.exp(-score))
    assert metrics.auc == pytest.approx(roc_auc_score(label, score))
    aucs = [roc_auc_score(*pair) for pair in drawn]
    assert metrics.request_auc == pytest.approx(np.average(aucs, weights=[len(pair[0]) for pair in drawn]))
    gains = [ndcg_score(pair[0][None], pair[1][None], k=10) for pair in drawn]
    assert metrics.ndcg_at_10 == pytest.approx(np.mean([*gains, 1.0])), (
        "a request of positives only is in the best order"
    )
    assert metrics.log_loss == pytest.approx(log_loss(label, probability))
    assert metrics.calibration == pytest.approx(probability.mean() / label.mean())
    assert (metrics.requests, metrics.candidates, metrics.positives) == (6, len(label), label.sum())


def test_large_scores_do_not_overflow():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics = measure_ranking([np.array([0, 1.0])], [np.array([-1e4, 1e4])])
        wrong = measure_ranking([np.array([0, 1.0])], [np.array([1e4, -1e4])])
    assert (metrics.log_loss, metrics.auc, metrics.ndcg_at_10, metrics.calibration) == (0, 1, 1, 1)
    assert wrong.log_loss == 1e4
    assert wrong.auc == 0


def test_undefined_metrics_are_null():
    metrics = measure_ranking([np.zeros(3)], [np.arange(3.0)])
    assert math.isnan(metrics.auc)
    document = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert document["auc"] is document["request_auc"] is document["ndcg_at_10"] is document["calibration"] is None
    assert document["log_loss"] > 0


def make_request(items: list[int], labels: list[float]) -> TrainingRequest:
    candidates = np.stack([items, np.ones(len(items), np.int64)], axis=1)
    return TrainingRequest("", 0, np.zeros((0, 2), np.int64), candidates, np.array(labels, np.float32))


def test_popularity_is_an_items_rate_of_positives_in_the_training_part():
    training = [make_request([3, 5], [1, 0])] * 30 + [make_request([7, 8], [1, 0])]
    (scores,) = score_by_popularity(training, [make_request([3, 5, 7, 9], [0, 1, 0, 1])])
    rates = 1 / (1 + np.exp(-scores))
    often, once = 30 + POPULARITY_PRIOR, 1 + POPULARITY_PRIOR
    expected = [
        (30 + 0.5 * POPULARITY_PRIOR) / often,
        0.5 * POPULARITY_PRIOR / often,
        (1 + 0.5 * POPULARITY_PRIOR) / once,
        0.5,
    ]
    np.testing.assert_allclose(rates, expected)
