"""Losses, the optimiser (AdamW), and the learning rate schedule (warm-up, cosine decay)."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kvcast.networks.masks import MASKED
from kvcast.train.batches import Batch

LossKind = Literal["pointwise", "listwise"]
LOSSES: tuple[LossKind, ...] = get_args(LossKind)

# The learning rate at the end of the cosine, as a share of its peak.
LAST_RATE = 0.01
BETAS = (0.9, 0.98)


def measure_loss(scores: Tensor, batch: Batch, kind: LossKind) -> Tensor:
    """Return the loss of a batch, one element.

    Args:
        scores: FP32 `[B, N]`, logits.
        batch: which of them are candidates, and their labels.
        kind: `pointwise`, the mean cross entropy of every candidate's label; `listwise`, that of a softmax over each
            request's candidates, over requests with a positive.
    """
    labels = batch.labels.to(scores.dtype)
    if kind == "pointwise":
        losses = nn.functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        return torch.where(batch.is_candidate, losses, 0).sum() / batch.is_candidate.sum()
    positives = labels.sum(dim=1)  # [B]
    shares = torch.where(batch.is_candidate, scores, MASKED).log_softmax(dim=1)  # [B, N]
    losses = -(labels * shares).sum(dim=1) / positives.clamp(min=1)
    return losses.sum() / (positives > 0).sum().clamp(min=1)


def make_optimiser(network: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW over all parameters; embeddings, norms and biases do not decay."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in network.parameters():
        decays = parameter.ndim > 1 and id(parameter) not in tables
        (decaying if decays else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def shape_rate(step: int, warmup: int, steps: int) -> float:
    """Return the learning rate of a step (from 0) as a share of its peak.

    It rises linearly for `warmup` of `steps` steps and then decays along a cosine.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2
