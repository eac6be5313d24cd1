"""What several tests need: small configurations, random requests, free ports."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcast.networks.interface import RankingNetwork, build_network
from kvcast.networks.weights import draw_weights
from kvcast.protocol.config import ModelConfig, NetworkConfig, load_config
from kvcast.protocol.schema import FeatureSchema, Field, Limits, Workload
from kvcast.server.repository import find_free_ports as find_free_ports  # noqa: PLC0414 for the tests

Ids = npt.NDArray[np.int64]
TOLERANCE = 1e-5  # on scores, in fp32; nothing here is looser
# What `tiny_repository` holds: the fields, limits and workload of `tiny`, and fewer layers.
EXPORTED_TOML = Path(__file__).parent / "tiny.toml"


def make_config(
    *, layers: int = 2, heads: int = 2, head_width: int = 8, history_fields: int = 2, candidate_fields: int = 4
) -> ModelConfig:
    """Return a small configuration whose first field is shared by both sides."""
    item = Field("item", 120)
    history = (item, *(Field(f"event_{index}", 64 + index) for index in range(1, history_fields)))
    candidate = (item, *(Field(f"attribute_{index}", 70 + index) for index in range(1, candidate_fields)))
    return ModelConfig(
        name="small",
        network=NetworkConfig("transformer", layers, heads, heads * head_width),
        schema=FeatureSchema(history, candidate),
        limits=Limits(history=64, candidates=32),
        workload=Workload(history=10, candidates=5),
    )


def make_network(config: ModelConfig, seed: int = 0) -> RankingNetwork:
    """Return a network with random weights."""
    network = build_network(config)
    draw_weights(network, seed)
    return network


def draw_rows(fields: tuple[Field, ...], shape: tuple[int, ...], generator: np.random.Generator) -> Ids:
    """Return random ids, unknown (0) included, `[*shape, fields]`."""
    return np.stack([generator.integers(0, field.vocab_size, shape) for field in fields], axis=-1)


def draw_request(config: ModelConfig, length: int, count: int, seed: int) -> tuple[Ids, Ids]:
    """Return a random history [L, fields] and candidates [N, T], some ids unknown and some events padding."""
    generator = np.random.default_rng(seed)
    history = draw_rows(config.schema.history_fields, (length,), generator)
    return history, draw_rows(config.schema.candidate_fields, (count,), generator)


def tiny_config(**changes: Any) -> ModelConfig:
    """Return the `tiny` configuration, with changes."""
    return dataclasses.replace(load_config("tiny"), **changes)


def choose_cases(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return every other combination, in which each value still meets each of the neighbouring axis; all if thorough.

    `make test-chaos` and `make test-deploy` are (KVCAST_THOROUGH); `make test` has half an hour.
    """
    places = itertools.product(*(range(len(axis)) for axis in axes))
    chosen = [place for place in places if os.environ.get("KVCAST_THOROUGH") or sum(place) % 2 == 0]
    return [tuple(axis[index] for axis, index in zip(axes, place, strict=True)) for place in chosen]
