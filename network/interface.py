"""What a network offers to be exported and served: three calls with the same weights.

To add a family, write a file beside `transformer.py` with a class of this interface and name it in the TOML as
`family = "module:Class"`. Nothing outside that file may know the family.
"""

import abc
import importlib
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvcast.contract.config import ModelConfig
from kvcast.contract.errors import ConfigError
from kvcast.contract.schema import KVLayout
from kvcast.network.branch import choose

MaskKind = Literal["target_blind", "undirected"]


class UserKV(NamedTuple):
    """Per-layer user KV in the contract's layout, a tensor a layer.

    keys: M tensors `[B, H, key_rows, slots]`; values: M tensors `[B, H, slots, value_columns]`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class RankingNetwork(nn.Module, abc.ABC):
    """A sequence ranker whose history is encoded once and shared by all candidates.

    Preconditions of every call: ids lie within their vocabularies, L and N within the limits; history events
    that are 0 in every field are padding, may stand anywhere and must not change any score. A call must not let
    a candidate's score depend on another candidate or on its slot (no normalisation across candidates).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    @property
    @abc.abstractmethod
    def kv_layout(self) -> KVLayout:
        """The layout of this network's user KV."""

    @abc.abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Fill every parameter with random numbers drawn from `generator`."""

    @abc.abstractmethod
    def encode_user(self, history: Tensor) -> UserKV:
        """Encode histories INT64 `[B, L, history_fields]` into user KV, whatever the candidates will be."""

    @abc.abstractmethod
    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        """Score candidates INT64 `[B, N, T]` against their user's KV: FP32 `[B, N]`."""

    def rank(self, history: Tensor, candidates: Tensor, kept: UserKV, use_kept: Tensor) -> tuple[Tensor, UserKV]:
        """Encode and fuse in one call, or fuse with the KV that an earlier call made: one graph for both.

        A family may override it where it can do better than one call after the other (rows of both sides in one
        GEMM, a weight named once); export proves that it gives the same scores.

        Args:
            history: INT64 `[B, L, history_fields]`; not read if `use_kept`, when one padding event does.
            candidates: INT64 `[B, N, T]`.
            kept: user KV of an earlier call; read only if `use_kept`, else of any number of slots.
            use_kept: BOOL, one element.

        Returns:
            Scores FP32 `[B, N]`, and the KV of `history`.
        """
        made = self.encode_user(history)

        def fuse_kept(candidates: tuple[Tensor], *kv: tuple[Tensor, ...]) -> Tensor:
            return self.fuse(UserKV(*kv[:2]), *candidates)

        def fuse_made(candidates: tuple[Tensor], *kv: tuple[Tensor, ...]) -> Tensor:
            return self.fuse(UserKV(*kv[2:]), *candidates)

        return choose(use_kept, fuse_kept, fuse_made, (candidates,), *kept, *made), made

    @abc.abstractmethod
    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Score every candidate in a full sequence of its own, the traditional way; the slow reference.

        Returns:
            Scores FP32 `[B, N]`, and per layer the keys of the user tokens `[B, N, H, L, dh]`, which show
            whether the history has seen the candidate.
        """

    def forward(self, history: Tensor, candidates: Tensor, mask: MaskKind = "target_blind") -> Tensor:
        """Return the scores of `run_monolith`: FP32 `[B, N]`."""
        scores, _ = self.run_monolith(history, candidates, mask)
        return scores


def build_network(config: ModelConfig) -> RankingNetwork:
    """Build the network that `config.network.family` names, in evaluation mode, its weights not yet set.

    Raises:
        ConfigError: the module or class does not exist, or is no `RankingNetwork`.
    """
    module_name, _, class_name = config.network.family.partition(":")
    try:
        family = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"network.family: cannot import {config.network.family!r}: {error}") from error
    if not (isinstance(family, type) and issubclass(family, RankingNetwork)):
        raise ConfigError(f"network.family: expected a subclass of RankingNetwork, got {config.network.family!r}")
    network: RankingNetwork = family(config)
    return network.eval().requires_grad_(False)
