"""Batches of requests of similar size, padded, and their scores by the calls that serve.

A batch keeps a user's candidates together, so `encode_user` runs once a request, whatever N is. Padding is 0 in every
field, and padding candidates are marked; neither changes a score.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvcast.networks.interface import RankingNetwork
from kvcast.train.requests import Requests, TrainingRequest

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
# The served mask; every token attends to every token, which costs a row a candidate; candidates alone.
Scheme = Literal["target_blind", "undirected", "no_history"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

# Requests are shuffled, and sorted by size within this many batches: batches stay random and waste little padding.
POOL_BATCHES = 50


@dataclass(frozen=True)
class Batch:
    """B requests, padded to the longest history and to the most candidates.

    history: INT64 `[B, L, history_fields]`, L at least 1. candidates: INT64 `[B, N, T]`. labels: FP32 `[B, N]`, 0 for
    padding. is_candidate: BOOL `[B, N]`.
    """

    history: Tensor
    candidates: Tensor
    labels: Tensor
    is_candidate: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        return Batch(*(each.to(device) for each in (self.history, self.candidates, self.labels, self.is_candidate)))


def pad_requests(requests: Sequence[TrainingRequest]) -> Batch:
    """Put requests into one batch, in their order."""
    length = max(len(request.history) for request in requests)
    count = max(len(request.candidates) for request in requests)
    length = max(1, length)  # a network needs one event, if only padding
    history = np.zeros((len(requests), length, requests[0].history.shape[1]), np.int64)  # [B, L, fields]
    candidates = np.zeros((len(requests), count, requests[0].candidates.shape[1]), np.int64)  # [B, N, T]
    labels = np.zeros((len(requests), count), np.float32)  # [B, N]
    is_candidate = np.zeros((len(requests), count), np.bool_)  # [B, N]
    for row, request in enumerate(requests):
        history[row, : len(request.history)] = request.history
        candidates[row, : len(request.candidates)] = request.candidates
        labels[row, : len(request.labels)] = request.labels
        is_candidate[row, : len(request.candidates)] = True
    return Batch(*(torch.from_numpy(each) for each in (history, candidates, labels, is_candidate)))


def measure_sizes(requests: Sequence[TrainingRequest]) -> Ids:
    """Return the history length and the number of candidates of each request, `[requests, 2]`."""
    if isinstance(requests, Requests):
        return np.stack([requests.history_lengths, requests.candidate_counts], axis=1)
    sizes = [(len(request.history), len(request.candidates)) for request in requests]
    return np.array(sizes, np.int64).reshape(len(sizes), 2)


def plan_batches(sizes: Ids, batch_size: int, seed: Sequence[int]) -> list[Ids]:
    """Return the requests of each batch of an epoch, shuffled; the same for the same seed.

    Args:
        sizes: `[requests, 2]`, see `measure_sizes`.
        batch_size: requests of a batch; the last of each pool may have fewer.
        seed: of the shuffling: the run's seed and the epoch.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(sizes))
    batches: list[Ids] = []
    for pool in _cut(order, POOL_BATCHES * batch_size):
        batches += _cut(pool[_order_by_size(sizes[pool])], batch_size)
    return [batches[index] for index in generator.permutation(len(batches))]


def score_batch(network: RankingNetwork, batch: Batch, scheme: Scheme) -> Tensor:
    """Return scores FP32 `[B, N]`; those of padding candidates are meaningless."""
    if scheme == "undirected":
        scores, _ = network.run_monolith(batch.history, batch.candidates, "undirected")
        return scores
    history = batch.history if scheme == "target_blind" else torch.zeros_like(batch.history[:, :1])
    return network.fuse(network.encode_user(history), batch.candidates)


@torch.no_grad()
def score_requests(
    network: RankingNetwork,
    requests: Sequence[TrainingRequest],
    scheme: Scheme,
    batch_size: int,
    device: torch.device,
) -> list[Floats]:
    """Return the scores of each request, FP32 `[N]`, in their order; in evaluation mode."""
    scores: list[Floats] = [np.zeros(0, np.float32)] * len(requests)
    was_training = network.training
    network.eval()
    for indices in _cut(_order_by_size(measure_sizes(requests)), batch_size):
        chosen = [requests[index] for index in indices]
        rows = score_batch(network, pad_requests(chosen).to(device), scheme).float().cpu().numpy()
        for index, request, row in zip(indices, chosen, rows, strict=True):
            scores[index] = row[: len(request.candidates)].copy()
    network.train(was_training)
    return scores


def _order_by_size(sizes: Ids) -> Ids:
    """Return the order by history length, then by number of candidates."""
    return np.asarray(np.lexsort((sizes[:, 1], sizes[:, 0])), np.int64)


def _cut(indices: Ids, size: int) -> Iterator[Ids]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
