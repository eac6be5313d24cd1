"""Weights of a network: drawn from a seed, or read from a safetensors file (never from a pickle)."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kvcast.contract.errors import ConfigError
from kvcast.network.interface import RankingNetwork


def draw_weights(network: RankingNetwork, seed: int) -> None:
    """Set every parameter at random; the same seed gives the same weights."""
    network.initialise(torch.Generator().manual_seed(seed))


def load_weights(network: RankingNetwork, path: Path) -> None:
    """Set every parameter from a safetensors file.

    Raises:
        ConfigError: the file cannot be read, or names, shapes or dtypes differ; all differences are listed.
    """
    expected = network.state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 not a dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"weights {path}: cannot be read as safetensors: {error}") from error
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: not a parameter of {type(network).__name__}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        wanted, got = expected[name], found[name]
        if (wanted.shape, wanted.dtype) != (got.shape, got.dtype):
            problems.append(f"{name}: expected {wanted.dtype} {list(wanted.shape)}, got {got.dtype} {list(got.shape)}")
        elif not got.isfinite().all():
            problems.append(f"{name}: expected finite numbers, got NaN or infinity")
    if problems:
        raise ConfigError(f"weights {path} do not fit {network.config.name}:\n  " + "\n  ".join(sorted(problems)))
    network.load_state_dict(found)
