"""What the hand-written peers need of a network: pre-normalised layers of softmax attention, by their parts' names.

A peer puts another attention under the weights of such a network, so it cannot run any other. Whether a network is one
is seen by its parameters, and by its scores: a race refuses a peer whose scores differ.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig
from perf.cost_model import build_shape

# The peers that run whatever was exported.
FOR_ANY_NETWORK = ("shared", "traditional")
LINEAR_PARTS = ("query", "key", "value", "output", "expand", "contract")
NORM_PARTS = ("attention_norm", "feed_forward_norm")


class SoftmaxLayer(Protocol):
    """A layer, its parts called apart."""

    attention_norm: nn.LayerNorm
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    def split_heads(self, tokens: Tensor) -> Tensor:
        """`[..., d]` → `[..., H, dh]`."""

    def close(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Add attention `[..., H, dh]` to the residual stream `[..., d]`, then the feed-forward part."""


class SoftmaxNetwork(Protocol):
    """A network of such layers."""

    config: ModelConfig
    blocks: nn.ModuleList

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by name."""

    def _embed_history(self, history: Tensor, is_event: Tensor) -> Tensor: ...

    def _embed_candidates(self, candidates: Tensor) -> Tensor: ...

    def _read_scores(self, target_tokens: Tensor) -> Tensor: ...


def is_softmax_network(network: RankingNetwork) -> bool:
    """Whether a network has exactly the parameters that the peers read."""
    schema, layers = network.config.schema, range(network.config.network.layers)
    tables = {field.name for field in schema.history_fields + schema.candidate_fields}
    expected = {f"embeddings.{name}.weight" for name in tables} | {"positions.weight", "types.weight"}
    parts = {f"blocks.{layer}.{part}" for layer in layers for part in LINEAR_PARTS + NORM_PARTS}
    expected |= {f"{part}.{kind}" for part in parts | {"score_norm", "score"} for kind in ("weight", "bias")}
    return {name for name, _ in network.named_parameters()} == expected


def choose_peers(config: ModelConfig, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which of the peers by name run the configuration's network, and which do not."""
    fits = is_softmax_network(build_shape(config))
    chosen = [name for name in names if fits or name in FOR_ANY_NETWORK]
    return chosen, [name for name in names if name not in chosen]
