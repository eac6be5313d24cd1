"""Batches: a user's candidates together, padding that changes nothing, and gradients that are those of the monolith."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcast.networks.interface import RankingNetwork, UserKV
from kvcast.networks.transformer import Transformer
from kvcast.networks.weights import draw_weights
from kvcast.train.batches import (
    POOL_BATCHES,
    SCHEMES,
    Scheme,
    measure_sizes,
    pad_requests,
    plan_batches,
    score_batch,
    score_requests,
)
from kvcast.train.objective import LOSSES, LossKind, measure_loss
from kvcast.train.requests import TrainingRequest
from tests.support import TOLERANCE, make_config, make_network
from tests.train_data import draw_training_request

CONFIG = make_config(layers=3)
CPU = torch.device("cpu")
# (L, N) of the requests of a batch: of one size without padding, ragged, with users without history.
BATCHES = {
    "one size": [(9, 4), (9, 4)],
    "ragged": [(3, 5), (12, 2), (7, 4)],
    "new users": [(0, 3), (5, 6), (0, 1)],
    "only new users": [(0, 3), (0, 2)],
}


def draw_batch(name: str, seed: int = 0) -> list[TrainingRequest]:
    return [draw_training_request(CONFIG, *size, seed=7 * seed + row) for row, size in enumerate(BATCHES[name])]


def score_alone(network: RankingNetwork, request: TrainingRequest, scheme: Scheme) -> Tensor:
    """A request by the slow reference, without padding: a full sequence a candidate."""
    events = request.history if scheme != "no_history" else request.history[:0]
    mask = "undirected" if scheme == "undirected" else "target_blind"
    return network(torch.from_numpy(events)[None], torch.from_numpy(request.candidates)[None], mask)[0]


def collect_gradients(network: RankingNetwork, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradients_equal_the_monoliths_without_padding(name: str, loss: LossKind, scheme: Scheme):
    network = make_network(CONFIG).double().requires_grad_(True)
    requests = draw_batch(name)
    batch = pad_requests(requests)
    fast = measure_loss(score_batch(network, batch, scheme), batch, loss)
    gradients = collect_gradients(network, fast)

    scores = [score_alone(network, request, scheme) for request in requests]
    labels = [torch.from_numpy(request.labels) for request in requests]
    slow = refer_loss(scores, labels, loss)
    expected = collect_gradients(network, slow)

    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    assert any(each.abs().max() > 1e-2 for each in expected.values()), "there must be something to compare"
    for parameter, gradient in expected.items():
        got = gradients.get(parameter, torch.zeros_like(gradient))  # of the user side, if there is no event
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-11, msg=lambda text, at=parameter: f"{at}: {text}")
    assert gradients.keys() <= expected.keys()


def refer_loss(scores: list[Tensor], labels: list[Tensor], kind: LossKind) -> Tensor:
    """The losses by their definitions, request by request."""
    if kind == "pointwise":
        score, label = torch.cat(scores), torch.cat(labels)
        return -(label * torch.sigmoid(score).log() + (1 - label) * torch.sigmoid(-score).log()).mean()
    losses = [
        -(score.softmax(dim=0).log() * label).sum() / label.sum()
        for score, label in zip(scores, labels, strict=True)
        if label.sum() > 0
    ]
    return torch.stack(losses).mean()


def test_fp32_gradients_equal_the_monoliths():
    network = make_network(CONFIG).requires_grad_(True)
    batch = pad_requests(draw_batch("one size"))
    gradients = collect_gradients(network, score_batch(network, batch, "target_blind").sum())
    expected = collect_gradients(network, network(batch.history, batch.candidates).sum())
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", range(3))
def test_batched_scores_equal_single_request_scores(seed: int, scheme: Scheme):
    network = make_network(CONFIG, seed)
    for name in BATCHES:
        requests = draw_batch(name, seed)
        scores = score_batch(network, pad_requests(requests), scheme)
        for row, request in zip(scores, requests, strict=True):
            alone = score_alone(network, request, scheme)
            torch.testing.assert_close(row[: len(alone)], alone, rtol=0, atol=TOLERANCE)


def test_only_the_no_history_scheme_ignores_the_history():
    network = make_network(CONFIG)
    one, other = (draw_training_request(CONFIG, 8, 4, seed) for seed in (1, 2))
    same_candidates = TrainingRequest("", 0, other.history, one.candidates, one.labels)
    for scheme in SCHEMES:
        first, second = (score_batch(network, pad_requests([each]), scheme) for each in (one, same_candidates))
        assert torch.equal(first, second) == (scheme == "no_history")


class CountsRows(Transformer):
    """Notes how many histories it encodes."""

    encoded: int

    def encode_user(self, history: Tensor) -> UserKV:
        self.encoded += len(history)
        return super().encode_user(history)


def test_a_history_is_encoded_once_for_all_its_candidates():
    network = CountsRows(CONFIG).eval().requires_grad_(False)
    draw_weights(network, 0)
    network.encoded = 0
    requests = draw_batch("ragged")
    score_batch(network, pad_requests(requests), "target_blind")
    assert network.encoded == len(requests) < sum(len(request.candidates) for request in requests)


def test_padding_candidates_do_not_contribute_to_the_loss():
    batch = pad_requests(draw_batch("ragged"))
    for kind in LOSSES:
        scores = torch.randn(batch.labels.shape, requires_grad=True)
        measure_loss(scores, batch, kind).backward()
        assert (scores.grad[~batch.is_candidate] == 0).all()
        assert (scores.grad[batch.is_candidate] != 0).any()


def test_a_listwise_loss_without_positives_is_zero():
    request = draw_training_request(CONFIG, 4, 3, seed=1)
    batch = pad_requests([TrainingRequest("", 0, request.history, request.candidates, np.zeros(3, np.float32))])
    assert measure_loss(torch.randn(1, 3), batch, "listwise") == 0


def test_an_epoch_has_every_request_once_in_batches_of_similar_sizes():
    generator = np.random.default_rng(0)
    sizes = np.stack([generator.integers(0, 97, 2000), generator.integers(1, 33, 2000)], axis=1)
    batches = plan_batches(sizes, 16, [3, 0])
    assert sorted(np.concatenate(batches)) == list(range(2000))
    assert {len(batch) for batch in batches} == {16}

    def count_padded(indices: list[np.ndarray]) -> int:
        return sum(len(each) * int(sizes[each, 0].max()) for each in indices)

    real, unsorted = sizes[:, 0].sum(), np.split(generator.permutation(2000), 125)
    assert count_padded(batches) < 1.1 * real < count_padded(unsorted) / 1.5
    lengths = [int(sizes[batch, 0].max()) for batch in batches]
    assert lengths != sorted(lengths), "batches come in random order"


def test_the_seed_and_the_epoch_decide_the_batches():
    sizes = np.ones((40 * POOL_BATCHES, 2), np.int64)
    first, again, later, other = (plan_batches(sizes, 8, seed) for seed in ([1, 0], [1, 0], [1, 1], [2, 0]))
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))
    for different in (later, other):
        assert not np.array_equal(np.concatenate(first), np.concatenate(different))


def test_scores_are_returned_in_request_order():
    network = make_network(CONFIG).train()
    requests = [draw_training_request(CONFIG, length, 1 + length % 4, length) for length in (9, 0, 3, 12, 5, 1, 7)]
    scores = score_requests(network, requests, "target_blind", 3, CPU)
    for request, row in zip(requests, scores, strict=True):
        alone = score_alone(network, request, "target_blind").numpy()
        np.testing.assert_allclose(row, alone, rtol=0, atol=TOLERANCE)
    assert network.training, "as it was"
    np.testing.assert_array_equal(measure_sizes(requests)[:, 0], [9, 0, 3, 12, 5, 1, 7])
