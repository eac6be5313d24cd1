"""The second family's three calls against each other and against an independent float64 implementation."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kvcast.networks.hstu import LONGEST_DIFFERENCE, UNKNOWN_BUCKET, list_buckets
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.config import ModelConfig
from kvcast.protocol.schema import FeatureSchema, Field
from tests.parity.hstu_reference import score_candidates
from tests.parity.test_torch import SIZES, rank_shared
from tests.support import TOLERANCE, draw_request, make_config, make_network


def make_hstu_config(*, has_time: bool = True, **sizes: int) -> ModelConfig:
    """Return a small configuration, its last history field a time."""
    config = make_config(**sizes)
    fields = (*config.schema.history_fields, Field("hour", 5000))
    options = {"time_field": "hour"} if has_time else {}
    network = dataclasses.replace(config.network, family="hstu", options=options)
    return dataclasses.replace(config, network=network, schema=FeatureSchema(fields, config.schema.candidate_fields))


def read_weights(network: RankingNetwork) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    has_time=st.booleans(),
    length=st.integers(0, 12),
    count=st.integers(1, 4),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_cached_path_equals_monolith_and_the_independent_implementation(sizes, has_time, length, count, padding, seed):
    config = make_hstu_config(has_time=has_time, **sizes)
    network = make_network(config, seed)
    history, candidates = draw_request(config, length, count, seed)
    draw = np.random.default_rng(seed)
    history[draw.random(length) < 0.2, -1] = 0  # a time that is not known
    padded = np.insert(history, draw.integers(0, length + 1, padding), 0, axis=0)

    shared = rank_shared(network, padded, candidates)
    monolith = network(torch.from_numpy(padded)[None], torch.from_numpy(candidates)[None])[0].numpy()
    reference = score_candidates(read_weights(network), config, padded, candidates)

    np.testing.assert_allclose(shared, monolith, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(shared, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(2))
def test_undirected_monolith_equals_the_independent_implementation(seed):
    config = make_hstu_config(layers=3)
    network = make_network(config, seed)
    history, candidates = draw_request(config, 9, 4, seed)
    undirected = network(torch.from_numpy(history)[None], torch.from_numpy(candidates)[None], "undirected")[0].numpy()
    reference = score_candidates(read_weights(network), config, history, candidates, undirected=True)
    np.testing.assert_allclose(undirected, reference, rtol=0, atol=TOLERANCE)
    assert np.abs(undirected - rank_shared(network, history, candidates)).max() > 1e-3


def test_time_and_order_matter_and_the_day_that_is_counted_from_does_not():
    config = make_hstu_config()
    network = make_network(config)
    history, candidates = draw_request(config, 12, 4, seed=1)
    history[:, -1] = np.sort(np.random.default_rng(1).integers(1, 2000, 12))
    scores = rank_shared(network, history, candidates)
    later, denser, turned = history.copy(), history.copy(), history[::-1].copy()
    later[:, -1] += 2500
    denser[:, -1] = history[:, -1] // 16 + 1
    turned[:, -1] = history[:, -1]
    np.testing.assert_array_equal(rank_shared(network, later, candidates), scores)
    assert np.abs(rank_shared(network, denser, candidates) - scores).max() > 1e-3
    assert np.abs(rank_shared(network, turned, candidates) - scores).max() > 1e-3


def test_buckets_double():
    buckets = list_buckets()
    for difference in (0, 1, 2, 3, 4, 7, 8, 1023, 1024, LONGEST_DIFFERENCE - 1, LONGEST_DIFFERENCE):
        assert buckets[difference] == difference.bit_length()
    assert buckets.max() < UNKNOWN_BUCKET == 22


class LargestTensor(TorchDispatchMode):
    """Watches how many elements the largest tensor has that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: D105
        result = function(*args, **(kwargs or {}))
        is_made = isinstance(result, torch.Tensor) and result.is_contiguous()
        self.elements = max(self.elements, result.untyped_storage().nbytes() // 4 if is_made else 0)
        return result


def test_fusion_expands_nothing_of_the_user_over_candidates():
    heads, width, length, count, tokens = 2, 16, 60, 30, 4
    network = make_network(make_hstu_config(heads=heads, head_width=width, candidate_fields=tokens))
    history, candidates = draw_request(network.config, length, count, seed=0)
    user_kv = network.encode_user(torch.from_numpy(history)[None])
    with LargestTensor() as largest:
        network.fuse(user_kv, torch.from_numpy(candidates)[None])
    scores = heads * count * tokens * length
    assert scores <= largest.elements < count * heads * (width + 1) * length
