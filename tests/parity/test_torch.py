"""The three calls of the torch network against each other and against the independent float64 implementation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcast.networks.attention import attend, attend_user_and_item, pack_user_kv
from kvcast.networks.interface import RankingNetwork
from tests.parity.reference import score_candidates
from tests.support import TOLERANCE, draw_request, make_config, make_network

SIZES = {
    "layers": st.integers(1, 4),
    "heads": st.integers(1, 4),
    "head_width": st.sampled_from([1, 4, 8, 16]),
    "history_fields": st.integers(1, 3),
    "candidate_fields": st.integers(1, 5),
}


def rank_shared(network: RankingNetwork, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    user_kv = network.encode_user(torch.from_numpy(history)[None])
    return network.fuse(user_kv, torch.from_numpy(candidates)[None])[0].numpy()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.fixed_dictionaries(SIZES),
    length=st.integers(0, 20),
    count=st.integers(1, 6),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_cached_path_equals_monolith_and_the_independent_implementation(sizes, length, count, padding, seed):
    config = make_config(**sizes)
    network = make_network(config, seed)
    history, candidates = draw_request(config, length, count, seed)
    places = np.random.default_rng(seed).integers(0, length + 1, padding)
    padded = np.insert(history, places, 0, axis=0)

    shared = rank_shared(network, padded, candidates)
    monolith = network(torch.from_numpy(padded)[None], torch.from_numpy(candidates)[None])[0].numpy()
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    reference = score_candidates(weights, config, padded, candidates)

    np.testing.assert_allclose(shared, monolith, rtol=0, atol=TOLERANCE)
    if sizes["head_width"] > 1:  # a layer norm over two numbers magnifies what fp32 rounds, in both paths alike
        np.testing.assert_allclose(shared, reference, rtol=0, atol=TOLERANCE)
    in_float64 = rank_shared(network.double(), padded, candidates)
    np.testing.assert_allclose(in_float64, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_undirected_monolith_equals_the_independent_implementation(seed):
    config = make_config(layers=3)
    network = make_network(config, seed)
    history, candidates = draw_request(config, 9, 4, seed)
    undirected = network(torch.from_numpy(history)[None], torch.from_numpy(candidates)[None], "undirected")[0].numpy()
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    reference = score_candidates(weights, config, history, candidates, undirected=True)
    np.testing.assert_allclose(undirected, reference, rtol=0, atol=TOLERANCE)
    blind = score_candidates(weights, config, history, candidates)
    assert np.abs(undirected - blind).max() > 1e-3, "the two masks must be tellable apart"


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 2, 8]),
    length=st.integers(0, 12),
    count=st.integers(1, 5),
    tokens=st.integers(1, 4),
    scale=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sink_attention_equals_plain_attention(heads, width, length, count, tokens, scale, seed):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    query, key, value = (normal(1, count, tokens, heads, width) * scale for _ in range(3))
    user_key, user_value = normal(1, length, heads, width) * scale, normal(1, length, heads, width)
    is_event = torch.rand(1, length, generator=draw) < 0.8
    shared = attend_user_and_item(query, key, value, *pack_user_kv(user_key, user_value, is_event))
    for candidate in range(count):
        keys = torch.cat([key[:, candidate], user_key[:, is_event[0]]], dim=1).transpose(1, 2)
        values = torch.cat([value[:, candidate], user_value[:, is_event[0]]], dim=1).transpose(1, 2)
        plain = attend(query[:, candidate].transpose(1, 2), keys, values, torch.zeros(()).double()).transpose(1, 2)
        torch.testing.assert_close(shared[:, candidate], plain, rtol=0, atol=1e-9)


def test_users_of_a_batch_do_not_touch_each_other():
    config = make_config()
    network = make_network(config)
    first, candidates = draw_request(config, 12, 5, seed=1)
    second, others = draw_request(config, 7, 5, seed=2)
    padded = np.pad(second, ((0, 5), (0, 0)))
    together = network.fuse(
        network.encode_user(torch.from_numpy(np.stack([first, padded]))),
        torch.from_numpy(np.stack([candidates, others])),
    ).numpy()
    np.testing.assert_allclose(together[0], rank_shared(network, first, candidates), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(together[1], rank_shared(network, second, others), rtol=0, atol=TOLERANCE)
