"""Files of a run that hold tensors: weights, and the checkpoint that an interrupted run resumes from.

Both are safetensors with JSON in the header: reading them executes no code. A file is replaced atomically, so a process
that dies during a write leaves the old one.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvcast.train.errors import TrainingError

# The key in the header of the state that is not a tensor.
STATE_KEY = "kvcast.checkpoint"
SEPARATOR = "/"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run: groups of named tensors, and a JSON document."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        flat = {
            f"{group}{SEPARATOR}{name}": tensor
            for group, tensors in self.tensors.items()
            for name, tensor in tensors.items()
        }
        write_tensors(path, flat, {STATE_KEY: json.dumps(self.state)})


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors are on the CPU.

    Raises:
        TrainingError: the file cannot be read, or is no checkpoint.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            state = (file.metadata() or {}).get(STATE_KEY)
            for key in file.keys():  # noqa: SIM118 not a dict
                group, _, name = key.partition(SEPARATOR)
                groups.setdefault(group, {})[name] = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"checkpoint {path}: cannot be read as safetensors: {error}") from error
    if state is None:
        raise TrainingError(f"checkpoint {path}: expected {STATE_KEY} in its header; this is not a checkpoint")
    return Checkpoint(groups, json.loads(state))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = _sort_metadata(save(own, dict(metadata)))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def pack_optimiser(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return an optimiser's state as named tensors, and its parameter groups as JSON."""
    packed = optimiser.state_dict()
    tensors = {
        f"{index}{SEPARATOR}{name}": torch.as_tensor(value)
        for index, values in packed["state"].items()
        for name, value in values.items()
    }
    return tensors, packed["param_groups"]


def unpack_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Load the state that `pack_optimiser` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(SEPARATOR)
        state.setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def pack_random_state() -> dict[str, Tensor]:
    """Return the states of PyTorch's random number generators, for networks with dropout."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def unpack_random_state(states: Mapping[str, Tensor]) -> None:
    """Set PyTorch's random number generators."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _sort_metadata(content: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted; the library writes it in no fixed order."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text + content[8 + length :]
