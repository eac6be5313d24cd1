"""What a network offers to be exported and served: three calls with the same weights.

A family is a class of this interface, named in the TOML as `family = "package.module:Class"`, or `"file.py:Class"` for
a file beside the TOML, or by its short name. Nothing but `SHORT_NAMES` and its own files may know it.
docs/bring-your-own.md writes one from start to end.
"""

import abc
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kvcast.networks.branch import choose
from kvcast.protocol.config import ModelConfig, Option
from kvcast.protocol.errors import ConfigError
from kvcast.protocol.schema import KVLayout

MaskKind = Literal["target_blind", "undirected"]
# Packages that families written for earlier versions import, and what they are called now.
MOVED = {"kvcast.contract": "kvcast.protocol", "kvcast.network": "kvcast.networks"}
# The families that come with the project, by the short names that a TOML may give: a module can move, a name stays.
SHORT_NAMES = {
    "transformer": "kvcast.networks.transformer:Transformer",
    "hstu": "kvcast.networks.hstu:HSTU",
}


class UserKV(NamedTuple):
    """Per-layer user KV in the contract's layout, a tensor a layer.

    keys: M tensors `[B, H, key_rows, slots]`; values: M tensors `[B, H, slots, value_columns]`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class RankingNetwork(nn.Module, abc.ABC):
    """A sequence ranker whose history is encoded once and shared by all candidates.

    A family must offer `kv_layout`, `initialise`, `encode_user`, `fuse` and `run_monolith`; it may override `rank` and
    `count_layer_flops`, list `options`, and declare a `version`.

    It may rely on: ids within their vocabularies, L and N within the limits, fp32 parameters, evaluation mode, no
    gradients. Where it is served there is at least one event (padding, for a user without history) and one candidate.

    It must keep, and export proves, in torch and again through the ONNX files (`export/proofs.py`; the first, of the
    graphs, in `export/equality.py`):

    0. *Graphs = network.* The graphs compute what the calls compute in torch, so every operator must be one that ONNX
       Runtime computes as PyTorch does (docs/bring-your-own.md lists those that are known to differ).
    1. *User KV ignores candidates.* Histories see no candidate, in any layer; the same history gives the same bits each
       time (no dropout, no state), and nothing writes into KV that it was given.
    2. *N candidates together = each alone.* A score depends on no other candidate: no normalisation, sorting, ranking
       or attention over the axis N, and no slot number.
    3. *Permuting candidates permutes scores.*
    4. *Different candidates get different scores.*
    5. *Padding changes nothing.* A history event that is 0 in every field is padding: in front, behind, between events,
       beside the longer history of another user of the batch; a history of padding alone is an empty one. A position
       counts real events, a sum leaves padding out, a mean divides by real events or by a constant, and nothing is
       normalised over the axis L. A slot that `kv_layout` calls padding is one.
    6. *Cached path = monolith.* `fuse` on `encode_user`, and `rank`, score as `run_monolith` does, to 1e-5.

    All calls are traced for any number of users, events and candidates: sizes come from the tensors that are given, and
    a choice by their content is `torch.where` or `branch.choose`, not a Python `if`.
    """

    options: ClassVar[Mapping[str, Option]] = {}
    """The family's own options, `[network.options]` in the TOML, and what they are where it leaves them out.

    The type of that value is the option's type. Read them with `get_option`.
    """

    version: ClassVar[int]
    """What the release and `kv_id` know of the family's code; to be raised with every change of what it computes.

    It counts where the class and each of its bases below this one declares its own. A family that declares none is
    known by the text of its files instead, in which every change counts, a comment too: nothing can be forgotten.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Build the network of a configuration.

        Raises:
            ConfigError: it has an option that the family does not, or one of another type.
        """
        super().__init__()
        self.config = config
        for name, value in config.network.options.items():
            check_option(type(self), name, value)

    def get_option(self, name: str) -> Option:
        """Return the value of one of `options`."""
        return self.config.network.options.get(name, self.options[name])

    @property
    @abc.abstractmethod
    def kv_layout(self) -> KVLayout:
        """The layout of this network's user KV, in any shape that suits it; the runtime moves KV by these numbers."""

    @abc.abstractmethod
    def initialise(self, generator: torch.Generator) -> None:
        """Fill every parameter with random numbers drawn from `generator`."""

    @abc.abstractmethod
    def encode_user(self, history: Tensor) -> UserKV:
        """Encode histories INT64 `[B, L, history_fields]` into user KV, whatever the candidates will be."""

    @abc.abstractmethod
    def fuse(self, user_kv: UserKV, candidates: Tensor) -> Tensor:
        """Score candidates INT64 `[B, N, T]` against their user's KV: FP32 `[B, N]`.

        It should not copy the KV over candidates: what is `[B, H, …]` stays so, and the N·T tokens of all candidates
        are rows of one product with it.
        """

    def rank(self, history: Tensor, candidates: Tensor, past: UserKV, use_past: Tensor) -> tuple[Tensor, UserKV]:
        """Encode and fuse in one call, or fuse with the KV that an earlier call made: one graph for both.

        A family may override it where it can do better than one call after the other (rows of both sides in one
        GEMM, a weight named once); export proves that it gives the same scores.

        Args:
            history: INT64 `[B, L, history_fields]`; not read if `use_past`, when one padding event does.
            candidates: INT64 `[B, N, T]`.
            past: user KV of an earlier call; read only if `use_past`, else of any number of slots.
            use_past: BOOL, one element.

        Returns:
            Scores FP32 `[B, N]`, and the KV of `history`.
        """
        made = self.encode_user(history)

        def fuse_past(candidates: tuple[Tensor], *kv: tuple[Tensor, ...]) -> Tensor:
            return self.fuse(UserKV(*kv[:2]), *candidates)

        def fuse_made(candidates: tuple[Tensor], *kv: tuple[Tensor, ...]) -> Tensor:
            return self.fuse(UserKV(*kv[2:]), *candidates)

        return choose(use_past, fuse_past, fuse_made, (candidates,), *past, *made), made

    @abc.abstractmethod
    def run_monolith(self, history: Tensor, candidates: Tensor, mask: MaskKind) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Score every candidate in a full sequence of its own, the traditional way; the slow reference.

        Written apart from the other two calls, as it was trained, so that their equality says something.

        Returns:
            Scores FP32 `[B, N]`, and per layer the keys of the user tokens `[B, N, H, L, dh]`, which show
            whether the history has seen the candidate.
        """

    def forward(self, history: Tensor, candidates: Tensor, mask: MaskKind = "target_blind") -> Tensor:
        """Return the scores of `run_monolith`: FP32 `[B, N]`."""
        scores, _ = self.run_monolith(history, candidates, mask)
        return scores

    def count_layer_flops(self) -> tuple[float, float]:
        """Return the FLOPs of one layer, for a token and for each token that it looks at: for the cost model of perf/.

        As it stands: 2 a weight of the linear layers, and attention's scores and sums over the width d. A family whose
        layers do other work overrides it.
        """
        weights = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return 2 * weights / self.config.network.layers, 4 * self.config.network.width


def check_option(family: type[RankingNetwork], name: str, value: Option) -> None:
    """Check one option of a configuration.

    Raises:
        ConfigError: the family has no such option, or it has another type.
    """
    if name not in family.options:
        known = ", ".join(sorted(family.options)) or "none"
        raise ConfigError(f"network.options: {family.__name__} has no option {name!r} (it has: {known})")
    wanted = type(family.options[name])
    if not (type(value) is wanted or (wanted is float and type(value) is int)):
        raise ConfigError(f"network.options.{name}: expected {wanted.__name__}, got {value!r}")


def build_network(config: ModelConfig) -> RankingNetwork:
    """Build the network that `config.network.family` names, in evaluation mode, its weights not yet set.

    Raises:
        ConfigError: the module or class does not exist, is no complete `RankingNetwork`, or refuses the configuration.
    """
    name = config.network.family
    if ":" not in name and name not in SHORT_NAMES:
        known = ", ".join(SHORT_NAMES)
        raise ConfigError(f"network.family: expected {known}, 'package.module:Class' or 'file.py:Class', got {name!r}")
    module_name, _, class_name = SHORT_NAMES.get(name, name).rpartition(":")
    try:
        family = getattr(_import_module(module_name, config.network.folder), class_name)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        hint = "" if module_name.endswith(".py") else " (a file is named by its path: file.py:Class)"
        if moved := MOVED.get(str(getattr(error, "name", ""))):
            hint = f" (it is {moved} now; CHANGELOG.md lists what has moved)"
        raise ConfigError(f"network.family: cannot import {name!r}: {error}{hint}") from error
    if not (isinstance(family, type) and issubclass(family, RankingNetwork)):
        raise ConfigError(f"network.family: expected a subclass of RankingNetwork, got {name!r}")
    missing = sorted(getattr(family, "__abstractmethods__", ()))
    if missing:
        raise ConfigError(f"network.family: {name!r} lacks {', '.join(missing)} of RankingNetwork")
    network: RankingNetwork = family(config)
    return network.eval().requires_grad_(False)


def _import_module(name: str, folder: Path) -> ModuleType:
    """Import a module by its name, or from the path of its file, once."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = (folder / name).resolve()
    if str(path) not in sys.modules:
        spec = importlib.util.spec_from_file_location(str(path), path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # before it runs, as Python does: dataclasses and the fingerprint look there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[spec.name]
            raise
    return sys.modules[str(path)]
