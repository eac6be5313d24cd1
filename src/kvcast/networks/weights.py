"""Weights of a network: drawn from a seed, or read from a safetensors file (never from a pickle)."""

from collections.abc import Callable, Iterable, Mapping
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
# What wrappers put into the names of weights, and what they are.
WRAPPERS = {"module": "DistributedDataParallel or DataParallel", "_orig_mod": "torch.compile"}
# Every number of these is one of FP32.
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from: a safetensors file or a seed; without either, what the configuration comes with.

    accept_undirected: take a file that says it was trained with the undirected mask.
    """

    file: Path | None = None
    seed: int | None = None
    accept_undirected: bool = False


def set_weights(
    network: RankingNetwork, source: WeightsSource, say: Callable[[str], None] = lambda _: None
) -> MaskKind | None:
    """Set every parameter, from seed 0 if nothing is named; return the mask of training, where a file says it.

    Raises:
        ConfigError: as `load_weights`.
    """
    if source.file is not None:
        return load_weights(network, source.file, accept_undirected=source.accept_undirected, say=say)
    draw_weights(network, source.seed or 0)
    return None


def draw_weights(network: RankingNetwork, seed: int) -> None:
    """Set every parameter at random; the same seed gives the same weights."""
    network.initialise(torch.Generator().manual_seed(seed))


def list_ties(network: RankingNetwork) -> list[list[str]]:
    """Return the names of every weight that has several: one parameter in two places of the network."""
    names: dict[int, list[str]] = {}
    for name, weight in network.state_dict(keep_vars=True).items():
        names.setdefault(id(weight), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def name_once(network: RankingNetwork, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights without the further names of tied ones, as safetensors stores no memory twice."""
    further = {name for names in list_ties(network) for name in names[1:]}
    return {name: weight for name, weight in weights.items() if name not in further}


def name_fully(network: RankingNetwork, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with all names of tied ones, of which one is enough."""
    known = [(names, next((name for name in names if name in weights), None)) for names in list_ties(network)]
    return {name: weights[first] for names, first in known if first is not None for name in names} | dict(weights)


def load_weights(
    network: RankingNetwork,
    path: Path,
    *,
    accept_undirected: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> MaskKind | None:
    """Set every parameter from a safetensors file.

    FP16 and BF16 are widened to FP32, which changes no number. Of a tied weight's names the file may have one or all.

    Args:
        network: its names, shapes and dtypes are expected.
        path: the file.
        accept_undirected: take weights that say that they were trained with the undirected mask.
        say: is told what was widened.

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
    widened = sorted({str(got.dtype) for got in found.values() if got.dtype in NARROW})
    found = {name: got.float() if got.dtype in NARROW else got for name, got in found.items()}
    problems = _find_problems(network, name_fully(network, found))
    if problems:
        raise ConfigError(f"weights {path} do not fit {network.config.name}:\n  " + "\n  ".join(problems))
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
    network.load_state_dict(name_fully(network, found))
    if widened:
        say(f"weights {path}: {' and '.join(widened)}, widened to torch.float32, which changes no number")
    return mask


def _find_problems(network: RankingNetwork, found: dict[str, Tensor]) -> list[str]:
    """Return a line for each tensor that is missing, unknown, or not as the network has it."""
    expected = network.state_dict()
    unwrapped = {_unwrap(name): got for name, got in found.items()}
    if len(unwrapped) == len(found) and not expected.keys() & found.keys() and expected.keys() & unwrapped.keys():
        return [_describe_wrapper(found), *_find_problems(network, name_fully(network, unwrapped))]
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
    problems += [
        f"{name}: expected the numbers of {names[0]}, as both are one parameter, got others"
        for names in list_ties(network)
        for name in names[1:]
        if name in found and names[0] in found and not torch.equal(found[name], found[names[0]])
    ]
    return sorted(problems)


def _unwrap(name: str) -> str:
    """Return a weight's name without the parts that wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _describe_wrapper(names: Iterable[str]) -> str:
    parts = {part for name in names for part in name.split(".")[:-1]}
    wrappers = ", ".join(f"{part}. ({what})" for part, what in WRAPPERS.items() if part in parts)
    return (
        f"the names are those of a wrapped network: {wrappers}: save the state_dict() of the network inside "
        "(wrapped.module, compiled._orig_mod), or rename: {'.'.join(part for part in name.split('.') if part not in "
        f"{tuple(WRAPPERS)}): weight for name, weight in weights.items()}}"
    )


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
