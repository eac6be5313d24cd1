"""Weights of a network: drawn from a seed, or read from a safetensors file (never from a pickle)."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvcast.networks.interface import MaskKind, RankingNetwork
from kvcast.protocol.errors import ConfigError

# In a safetensors file's metadata: the mask that the weights were trained with, and whether they saw histories.
MASK_METADATA_KEY = "kvcast.mask"
HISTORY_METADATA_KEY = "kvcast.history"
ENCODED, NONE = "encoded", "none"


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from: a safetensors file or a seed; without either, what the configuration comes with.

    accept_undirected: take a file that says it was trained with the undirected mask.
    """

    file: Path | None = None
    seed: int | None = None
    accept_undirected: bool = False


def set_weights(network: RankingNetwork, source: WeightsSource) -> MaskKind | None:
    """Set every parameter, from seed 0 if nothing is named; return the mask of training, where a file says it.

    Raises:
        ConfigError: as `load_weights`.
    """
    if source.file is not None:
        return load_weights(network, source.file, accept_undirected=source.accept_undirected)
    draw_weights(network, source.seed or 0)
    return None


def draw_weights(network: RankingNetwork, seed: int) -> None:
    """Set every parameter at random; the same seed gives the same weights."""
    network.initialise(torch.Generator().manual_seed(seed))


def load_weights(network: RankingNetwork, path: Path, *, accept_undirected: bool = False) -> MaskKind | None:
    """Set every parameter from a safetensors file.

    Args:
        network: its names, shapes and dtypes are expected.
        path: the file.
        accept_undirected: take weights that say that they were trained with the undirected mask.

    Returns:
        The mask that the file says it was trained with; None where it says nothing, which is taken for target-blind.

    Raises:
        ConfigError: the file cannot be read, or names, shapes or dtypes differ (all differences are listed), or its
            mask is not the one that is served, or they never saw a history.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights {path}: cannot be read as safetensors: {error}") from error
    mask = metadata.get(MASK_METADATA_KEY)
    if mask not in (None, *get_args(MaskKind)):
        known = " or ".join(get_args(MaskKind))
        raise ConfigError(f"weights {path}: expected {MASK_METADATA_KEY} to be {known}, got {mask!r}")
    problems = _find_problems(network, found)
    if problems:
        raise ConfigError(f"weights {path} do not fit {network.config.name}:\n  " + "\n  ".join(sorted(problems)))
    if mask == "undirected" and not accept_undirected:
        raise ConfigError(
            f"weights {path}: expected {MASK_METADATA_KEY} target_blind, got undirected: with the mask that is served "
            "they score otherwise than in training; train with that mask, or accept it (--accept-undirected)"
        )
    if metadata.get(HISTORY_METADATA_KEY) == NONE:
        raise ConfigError(
            f"weights {path}: expected weights that were trained with histories, got {HISTORY_METADATA_KEY} {NONE}: "
            "they are a baseline to compare with, and what they make of a history means nothing"
        )
    network.load_state_dict(found)
    return mask


def _find_problems(network: RankingNetwork, found: dict[str, Tensor]) -> list[str]:
    """Return a line for each tensor that is missing, unknown, or not as the network has it."""
    expected = network.state_dict()
    problems = [
        f"{name}: missing, expected {_describe(wanted)}" for name, wanted in expected.items() if name not in found
    ]
    problems += [
        f"{name}: not a parameter of {type(network).__name__}, got {_describe(got)}"
        for name, got in found.items()
        if name not in expected
    ]
    for name in expected.keys() & found.keys():
        wanted, got = expected[name], found[name]
        if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
            problems.append(f"{name}: expected {_describe(wanted)}, got {_describe(got)}")
        elif not got.isfinite().all():
            problems.append(f"{name}: expected finite numbers, got NaN or infinity")
    return problems


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
